"""Parse and validate Hugging Face's config.json into a `ModelConfig`."""

import dataclasses
import typing
from typing import Any

from minisft.config.errors import UserError, wrong
from minisft.config.model import ModelConfig, RopeConfig

# An absurd num_hidden_layers in a damaged config.json would make listing the weights endless.
MAX_LAYERS = 10_000
# RoPE type -> parameters that the type requires.
_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_POSITIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip


def parse_model_config(raw: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """Parse config.json, in the layout of transformers v4 or v5, to a ModelConfig.

    source: the file's name for errors. Raises UserError for an unsupported architecture or RoPE
    type, a missing field, or a field with an invalid value.
    """
    _check_family(raw, source)
    _check_quantization(raw.get("quantization_config"), source)
    values = _read_fields(raw, source)
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    kv_heads = values["num_key_value_heads"] = values["num_key_value_heads"] or heads
    if heads % kv_heads:
        names = f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
        raise UserError(f"{source}: {names}")
    if not values["head_dim"] and hidden % heads:
        names = f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}"
        raise UserError(f"{source}: {names}, and head_dim is not given")
    values["head_dim"] = values["head_dim"] or hidden // heads
    if values["head_dim"] % 2:
        raise UserError(f"{source}: head_dim={values['head_dim']} is odd; RoPE needs an even one")
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise wrong(f"{source}: hidden_act", activation, "'silu', which the Llama block computes")
    eos = raw.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int for i in ids):
        raise wrong(f"{source}: eos_token_id", eos, "a token id, or a list of ids")
    positions = values.get("max_position_embeddings", ModelConfig.max_position_embeddings)
    return ModelConfig(
        **values,
        rope=parse_rope(raw, positions, source),
        dtype=_dtype_name(raw.get("dtype") or raw.get("torch_dtype"), source),
        eos_token_ids=tuple(ids),
    )


def parse_rope(raw: dict[str, Any], max_positions: int, source: str = "config.json") -> RopeConfig:
    """Parse config.json's RoPE fields: v4 `rope_theta` and `rope_scaling`, v5 `rope_parameters`.

    A rope_theta inside the dict overrides the top-level rope_theta. `type` is the old spelling of
    `rope_type`. Raises UserError for an unsupported type or a missing parameter.
    """
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise wrong(f"{source}: rope_scaling", scaling, "a JSON object")
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    # Look it up in a list, because a JSON value may be unhashable.
    if rope_type not in list(_ROPE_NEEDS):
        raise wrong(f"{source}: RoPE type", rope_type, f"one of {', '.join(_ROPE_NEEDS)}")
    partial = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise wrong(f"{source}: partial_rotary_factor", partial, "1.0")
    missing = [key for key in _ROPE_NEEDS[rope_type] if scaling.get(key) is None]
    if missing:
        raise UserError(f"{source}: RoPE type {rope_type!r} needs {', '.join(missing)}")
    given = _rope_parameters(scaling, source)
    if rope_type in ("llama3", "yarn"):
        name = "original_max_position_embeddings"
        given[name] = _typed(raw, name, int, source) or given.get(name) or max_positions
    theta = scaling.get("rope_theta", raw.get("rope_theta"))
    theta = 10000.0 if theta is None else theta
    if not _is_number(theta) or not 1 < theta < 1e30:
        raise wrong(f"{source}: rope_theta", theta, "a number above 1")
    if not given.get("factor", 1.0) > 0:
        raise wrong(f"{source}: RoPE factor", given["factor"], "a positive number")
    return RopeConfig(rope_type=rope_type, rope_theta=float(theta), **given)


def _rope_parameters(scaling: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the RoPE parameters that RopeConfig has as fields; drop unknown keys."""
    known = {f.name for f in dataclasses.fields(RopeConfig)} - {"rope_type", "rope_theta"}
    given = {k: v for k, v in scaling.items() if k in known and v is not None}
    for key, value in given.items():
        number = _is_number(value) and abs(value) < 1e12
        if not (isinstance(value, bool) if key == "truncate" else number):
            raise wrong(f"{source}: RoPE parameter {key}", value, "a number")
    return given


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_family(raw: Any, source: str) -> None:
    if not isinstance(raw, dict):
        raise UserError(f"{source}: expected a JSON object, found {type(raw).__name__}")
    architectures, kind = raw.get("architectures") or [], raw.get("model_type")
    if kind != "llama":
        raise wrong(f"{source}: model_type", kind, "'llama'. Use a Llama checkpoint")
    if architectures and architectures not in (["LlamaForCausalLM"], ["LlamaModel"]):
        raise wrong(f"{source}: architectures", architectures, "['LlamaForCausalLM']")


def _check_quantization(raw: Any, source: str) -> None:
    """Raise UserError unless the weights are unquantised or in a 4-bit bitsandbytes format."""
    if not raw:
        return
    if not isinstance(raw, dict):
        raise wrong(f"{source}: quantization_config", raw, "a JSON object")
    method = raw.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes" or not (raw.get("load_in_4bit") or raw.get("_load_in_4bit")):
        found = f"quant_method={method!r}" + " without load_in_4bit" * (method == "bitsandbytes")
        expected = "this version reads bitsandbytes' 4-bit. Use the unquantised base"
        raise UserError(f"{source}: quantization_config says {found}; {expected}")


def _read_fields(raw: dict[str, Any], source: str) -> dict[str, Any]:
    """Read ModelConfig's numbers and bools; fields with a default there may be missing."""
    kinds, values = typing.get_type_hints(ModelConfig), {}
    for field in dataclasses.fields(ModelConfig):
        name, kind = field.name, kinds[field.name]
        if kind not in (bool, int, float):
            continue
        value = _typed(raw, name, kind, source)
        # These two may be missing: parse_model_config derives their defaults from other fields.
        if value is not None or name in ("num_key_value_heads", "head_dim"):
            values[name] = value
        elif field.default is dataclasses.MISSING:
            raise UserError(f"{source}: {name} is missing; a Llama config.json must give it")
    return values


def _typed(raw: dict, key: str, kind: type, source: str) -> Any:
    value = raw.get(key)
    if value is None:
        return None
    ok = isinstance(value, (int, float) if kind is float else kind)
    if not ok or (kind is not bool and isinstance(value, bool)):
        raise wrong(f"{source}: {key}", value, kind.__name__)
    least = 1 if key in _POSITIVE else 0
    most = MAX_LAYERS if key == "num_hidden_layers" else 2**31 - 1
    # This form of the comparison also rejects nan.
    if kind is not bool and not least <= value <= most:
        raise wrong(f"{source}: {key}", value, f"{least} to {most}")
    return value


def _dtype_name(value: Any, source: str) -> str | None:
    name = None if value is None else str(value).removeprefix("torch.")
    if name not in (None, "auto", "bfloat16", "float16", "float32"):
        raise wrong(f"{source}: dtype", value, "bfloat16, float16 or float32")
    return None if name == "auto" else name
