"""config.json, as Hugging Face writes it, to `ModelConfig`."""

from __future__ import annotations

import dataclasses
from typing import Any

from minisft.config.errors import UserError
from minisft.config.model import ModelConfig, RopeConfig

MAX_LAYERS = 10_000  # what a config.json may ask for: every layer's names are listed
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_MODEL_FIELDS = {  # config.json key -> (type, required)
    "vocab_size": (int, True),
    "hidden_size": (int, True),
    "intermediate_size": (int, True),
    "num_hidden_layers": (int, True),
    "num_attention_heads": (int, True),
    "num_key_value_heads": (int, False),
    "head_dim": (int, False),
    "max_position_embeddings": (int, False),
    "rms_norm_eps": (float, False),
    "initializer_range": (float, False),
    "tie_word_embeddings": (bool, False),
    "attention_bias": (bool, False),
    "mlp_bias": (bool, False),
}


def parse_model_config(raw: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """config.json (transformers v4 or v5 layout) -> ModelConfig.

    `source` names the file in errors. Raises UserError for another architecture, a RoPE type that
    is not implemented, a missing field, or a field of the wrong type.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{source}: expected a JSON object, found {type(raw).__name__}")
    model_type = raw.get("model_type")
    architectures = raw.get("architectures") or []
    if model_type != "llama":
        raise UserError(
            f"{source}: model_type is {model_type!r} (architectures {architectures}); minisft "
            "implements 'llama' (LlamaForCausalLM). Use a Llama checkpoint"
        )
    if architectures and architectures != ["LlamaForCausalLM"] and architectures != ["LlamaModel"]:
        raise UserError(
            f"{source}: architectures is {architectures}; expected ['LlamaForCausalLM']"
        )
    _check_quantization(raw.get("quantization_config"), source)
    values = {
        key: _typed(raw, key, kind, required, source)
        for key, (kind, required) in _MODEL_FIELDS.items()
    }
    positive = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    for key in (*positive, "max_position_embeddings"):
        if values[key] is not None and values[key] < 1:
            raise UserError(f"{source}: {key} is {values[key]}; expected a positive integer")
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    values["num_key_value_heads"] = values["num_key_value_heads"] or heads
    if heads % values["num_key_value_heads"]:
        raise UserError(
            f"{source}: num_attention_heads={heads} is not a multiple of "
            f"num_key_value_heads={values['num_key_value_heads']}"
        )
    if not values["head_dim"]:
        if hidden % heads:
            raise UserError(
                f"{source}: hidden_size={hidden} is not a multiple of num_attention_heads={heads} "
                "and head_dim is not given"
            )
        values["head_dim"] = hidden // heads
    if values["head_dim"] % 2:
        raise UserError(f"{source}: head_dim={values['head_dim']} is odd; RoPE needs an even one")
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(
            f"{source}: hidden_act is {activation!r}; the Llama block here computes 'silu'"
        )
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    given = {k: (v if v is not None else defaults[k]) for k, v in values.items()}
    eos = raw.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int for i in ids):
        raise UserError(f"{source}: eos_token_id is {eos!r}; expected a token id, or a list of ids")
    return ModelConfig(
        **given,
        rope=parse_rope(raw, given["max_position_embeddings"], source),
        dtype=_dtype_name(raw.get("dtype") or raw.get("torch_dtype"), source),
        eos_token_ids=tuple(ids),
    )


def parse_rope(raw: dict[str, Any], max_positions: int, source: str = "config.json") -> RopeConfig:
    """The RoPE fields of config.json, v4 (`rope_theta`, `rope_scaling`) or v5 (`rope_parameters`).

    A theta inside the dict wins over a top-level one; `type` is the old spelling of `rope_type`.
    Raises UserError for a type that is not implemented or a parameter that it lacks.
    """
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise UserError(f"{source}: rope_scaling is {scaling!r}; expected a JSON object")
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise UserError(
            f"{source}: RoPE type {rope_type!r} is not implemented; known types: "
            f"{', '.join(ROPE_TYPES)}"
        )
    partial = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UserError(f"{source}: partial_rotary_factor is {partial}; only 1.0 is implemented")
    needs = {
        "linear": ["factor"],
        "dynamic": ["factor"],
        "yarn": ["factor"],
        "llama3": ["factor", "low_freq_factor", "high_freq_factor"],
    }.get(rope_type, [])
    missing = [key for key in needs if scaling.get(key) is None]
    if missing:
        raise UserError(f"{source}: RoPE type {rope_type!r} needs {', '.join(missing)}")
    known = {f.name for f in dataclasses.fields(RopeConfig)} - {"rope_type", "rope_theta"}
    given = {k: v for k, v in scaling.items() if k in known and v is not None}
    for key, value in given.items():
        boolean = isinstance(value, bool)
        number = isinstance(value, (int, float)) and not boolean and abs(value) < 1e12
        if not (boolean if key == "truncate" else number):
            raise UserError(f"{source}: RoPE parameter {key} is {value!r}; expected a number")
    if rope_type in ("llama3", "yarn"):
        original = _typed(raw, "original_max_position_embeddings", int, False, source)
        given["original_max_position_embeddings"] = (
            original or given.get("original_max_position_embeddings") or max_positions
        )
    theta = scaling.get("rope_theta", raw.get("rope_theta"))
    theta = 10000.0 if theta is None else theta
    if not isinstance(theta, (int, float)) or isinstance(theta, bool) or not (1 < theta < 1e30):
        raise UserError(f"{source}: rope_theta is {theta!r}; expected a number above 1")
    if not given.get("factor", 1.0) > 0:
        raise UserError(f"{source}: RoPE factor is {given['factor']!r}; expected a positive number")
    return RopeConfig(rope_type=rope_type, rope_theta=float(theta), **given)


def _check_quantization(raw: Any, source: str) -> None:
    """Only bitsandbytes' 4-bit formats are read; which of them, the tensors tell."""
    if not raw:
        return
    if not isinstance(raw, dict):
        raise UserError(f"{source}: quantization_config is {raw!r}; expected a JSON object")
    method = raw.get("quant_method", "bitsandbytes")
    four_bit = raw.get("load_in_4bit") or raw.get("_load_in_4bit")
    if method != "bitsandbytes" or not four_bit:
        detail = "" if method != "bitsandbytes" else " without load_in_4bit"
        raise UserError(
            f"{source}: quantization_config says quant_method={method!r}{detail}; this version "
            "reads bitsandbytes' 4-bit and 16- and 32-bit checkpoints. Use the unquantised base"
        )


def _typed(raw: dict, key: str, kind: type, required: bool, source: str) -> Any:
    value = raw.get(key)
    if value is None:
        if required:
            raise UserError(f"{source}: {key} is missing; a Llama config.json must give it")
        return None
    ok = isinstance(value, (int, float) if kind is float else kind)
    if not ok or (kind is not bool and isinstance(value, bool)):
        raise UserError(f"{source}: {key} is {value!r}; expected {kind.__name__}")
    most = MAX_LAYERS if key == "num_hidden_layers" else 2**31 - 1
    if kind is not bool and not 0 <= value <= most:  # nan is refused as well
        raise UserError(f"{source}: {key} is {value}; expected 0 to {most}")
    return value


def _dtype_name(value: Any, source: str) -> str | None:
    name = None if value is None else str(value).removeprefix("torch.")
    if name not in (None, "auto", "bfloat16", "float16", "float32"):
        raise UserError(f"{source}: dtype is {value!r}; expected bfloat16, float16 or float32")
    return None if name == "auto" else name
