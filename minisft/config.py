"""Every setting of a run and of a model, as frozen dataclasses. Standard library only.

`TrainConfig` is the flag list of scripts/train.py; `ModelConfig` is what config.json means.
Checks live in `__post_init__` or at the point of parsing; derived values are properties.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Something the user can cause and mend: one line that says what, the value, and the remedy.

    Scripts print it without a traceback and leave with exit code 2.
    """


LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDING_NAMES = ("embed_tokens", "lm_head")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


# ------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class RopeConfig:
    """The rotary embedding as transformers v5 spells it in `rope_parameters`.

    Fields that a type does not use stay None. Mathematics: `minisft.nn.rope_inverse_frequencies`.
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """What a Llama config.json says, with the family's defaults filled in."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope: RopeConfig = RopeConfig()
    dtype: str | None = None  # as stored: "bfloat16", "float16", "float32", or None if not said
    initializer_range: float = 0.02
    eos_token_ids: tuple[int, ...] = ()

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """`{"self_attn.q_proj": (out, in), ...}` for the seven linears of one layer."""
        D, I = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, D),
            "self_attn.k_proj": (kv, D),
            "self_attn.v_proj": (kv, D),
            "self_attn.o_proj": (D, q),
            "mlp.gate_proj": (I, D),
            "mlp.up_proj": (I, D),
            "mlp.down_proj": (D, I),
        }

    def linear_paths(self) -> dict[str, tuple[int, int]]:
        """Module path -> (out_features, in_features) of every linear that LoRA may adapt."""
        return {
            f"model.layers.{i}.{name}": shape
            for i in range(self.num_hidden_layers)
            for name, shape in self.linear_shapes().items()
        }

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint under its HF key: the one declaration of the layout.

        A tied head has no key of its own.
        """
        D, V = self.hidden_size, self.vocab_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
        biased = {n: self.attention_bias for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        biased |= {n: self.mlp_bias for n in ("gate_proj", "up_proj", "down_proj")}
        for i in range(self.num_hidden_layers):
            for name, (out, in_) in self.linear_shapes().items():
                shapes[f"model.layers.{i}.{name}.weight"] = (out, in_)
                if biased[name.split(".")[-1]]:
                    shapes[f"model.layers.{i}.{name}.bias"] = (out,)
            shapes[f"model.layers.{i}.input_layernorm.weight"] = (D,)
            shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (D,)
        shapes["model.norm.weight"] = (D,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (V, D)
        return shapes


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
        raise UserError(f"{source}: architectures is {architectures}; expected ['LlamaForCausalLM']")
    if raw.get("quantization_config"):
        method = (raw["quantization_config"] or {}).get("quant_method")
        raise UserError(
            f"{source}: quantization_config says quant_method={method!r}; this version reads 16- and "
            "32-bit checkpoints. Use the unquantised base"
        )
    values = {key: _typed(raw, key, kind, required, source) for key, (kind, required) in _MODEL_FIELDS.items()}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"):
        if values[key] < 1:
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
        raise UserError(f"{source}: hidden_act is {activation!r}; the Llama block here computes 'silu'")
    defaults = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    given = {k: (v if v is not None else defaults[k]) for k, v in values.items()}
    eos = raw.get("eos_token_id")
    return ModelConfig(
        **given,
        rope=parse_rope(raw, given["max_position_embeddings"], source),
        dtype=_dtype_name(raw.get("dtype") or raw.get("torch_dtype"), source),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
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
            f"{source}: RoPE type {rope_type!r} is not implemented; known types: {', '.join(ROPE_TYPES)}"
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
        if not isinstance(value, bool if key == "truncate" else (int, float)):
            raise UserError(f"{source}: RoPE parameter {key} is {value!r}; expected a number")
    if rope_type in ("llama3", "yarn"):
        original = raw.get("original_max_position_embeddings")
        given["original_max_position_embeddings"] = (
            original or given.get("original_max_position_embeddings") or max_positions
        )
    theta = scaling.get("rope_theta", raw.get("rope_theta"))
    theta = 10000.0 if theta is None else theta
    if not isinstance(theta, (int, float)) or isinstance(theta, bool) or theta <= 1:
        raise UserError(f"{source}: rope_theta is {theta!r}; expected a number above 1")
    if not given.get("factor", 1.0) > 0:
        raise UserError(f"{source}: RoPE factor is {given['factor']!r}; expected a positive number")
    return RopeConfig(rope_type=rope_type, rope_theta=float(theta), **given)


def _typed(raw: dict, key: str, kind: type, required: bool, source: str) -> Any:
    value = raw.get(key)
    if value is None:
        if required:
            raise UserError(f"{source}: {key} is missing; a Llama config.json must give it")
        return None
    ok = isinstance(value, (int, float) if kind is float else kind)
    if not ok or (kind is not bool and isinstance(value, bool)):
        raise UserError(f"{source}: {key} is {value!r}; expected {kind.__name__}")
    return value


def _dtype_name(value: Any, source: str) -> str | None:
    name = None if value is None else str(value).removeprefix("torch.")
    if name not in (None, "auto", "bfloat16", "float16", "float32"):
        raise UserError(f"{source}: dtype is {value!r}; expected bfloat16, float16 or float32")
    return None if name == "auto" else name


def load_json(path: Path) -> Any:
    """Read one JSON file; UserError names the file, and the line where it is malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 at byte {e.start}") from None
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno}: malformed JSON ({e.msg})") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None


# --------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class LoraConfig:
    """One LoRA adapter: rank, scale and where it sits, in PEFT's terms."""

    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] = LINEAR_NAMES  # suffixes, "all-linear", or one "re:PATTERN"
    modules_to_save: tuple[str, ...] = ()  # of embed_tokens, lm_head: trained copies

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
