"""Write and strictly parse adapter_config.json in the layout of PEFT 0.21.

Parsing raises UserError for a field that asks for more than LoRA, DoRA and the options of
`LoraConfig`. PEFT would ignore an unknown field with a warning and compute another model.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, TypeGuard

from minisft.config.errors import UserError
from minisft.config.lora import LoraConfig, matches
from minisft.config.model import LINEAR_NAMES, ModelConfig
from minisft.config.targets import (
    ALL_LINEAR,
    PATTERN_PREFIX,
    adapter_shapes,
    is_special,
    match_targets,
    split_targets,
)
from minisft.files.disk import load_json_object, naming

CONFIG_NAME = "adapter_config.json"

# Fields that PEFT 0.21.2 writes for plain LoRA and that `adapter_config_dict` does not fill.
_PLAIN_FIELDS: dict[str, Any] = {
    "alora_invocation_tokens": None, "arrow_config": None, "auto_mapping": None, "bias": "none",
    "corda_config": None, "eva_config": None, "fan_in_fan_out": False, "inference_mode": True,
    "kasa_config": None, "layer_replication": None, "layers_pattern": None, "loftq_config": {},
    "lora_bias": False, "lora_ga_config": None, "megatron_config": None,
    "megatron_core": "megatron.core", "monteclora_config": None, "peft_type": "LORA",
    "peft_version": "0.21.2", "qalora_group_size": 16, "target_parameters": None,
    "task_type": "CAUSAL_LM", "use_bdlora": None, "use_qalora": False, "velora_config": None,
}  # fmt: skip
# First the fields that `parse_adapter_config` reads, then fields that do not affect the output.
_KNOWN_FIELDS = {
    "lora_alpha", "lora_dropout", "modules_to_save", "r", "target_modules", "use_rslora",
    "ensure_weight_tying", "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform",
    "exclude_modules", "trainable_token_indices",
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version",
    "qalora_group_size", "revision",
}  # fmt: skip
# Accepted values. Other init_lora_weights, such as PiSSA, change the base weights.
_PLAIN_VALUES = {
    "bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal"),
    "peft_type": ("LORA",), "task_type": ("CAUSAL_LM",),
}  # fmt: skip


def adapter_config_dict(
    lora: LoraConfig, cfg: ModelConfig, base_model_name_or_path: str, revision: str | None = None
) -> dict[str, Any]:
    """Return the content of adapter_config.json, with exactly the keys that PEFT 0.21.2 writes.

    "all-linear" becomes the seven suffixes and "re:PATTERN" the bare pattern; embed_tokens and
    lm_head are in modules_to_save only.
    Raises UserError for targets that do not fit cfg (`match_targets`) or an empty base name.
    """
    if not base_model_name_or_path:
        remedy = "give the hub id or the directory of the base model"
        raise UserError(f"base_model_name_or_path is empty; {remedy}")
    match_targets(lora, cfg)
    lora = split_targets(lora)
    targets = _names_or_pattern(lora.target_modules)
    if lora.target_modules[0].lower() == ALL_LINEAR:
        targets = list(LINEAR_NAMES)
    if lora.lora_embeddings:
        adapter_shapes(lora, cfg)  # raises UserError for options that lora_embeddings excludes
        targets = [*targets, "embed_tokens"]
    alpha = lora.lora_alpha
    return _PLAIN_FIELDS | {
        "base_model_name_or_path": base_model_name_or_path,
        "ensure_weight_tying": cfg.tie_word_embeddings and bool(lora.modules_to_save),
        # Some readers require an integer, so 16.0 is written as 16.
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": lora.lora_dropout,
        "modules_to_save": list(lora.modules_to_save) or None,
        "r": lora.r,
        "revision": revision,
        "target_modules": targets,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "init_lora_weights": "gaussian" if lora.init_lora_weights == "gaussian" else True,
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": {k: int(v) if v.is_integer() else v for k, v in lora.alpha_pattern},
        "layers_to_transform": list(lora.layers_to_transform) or None,
        "exclude_modules": _names_or_pattern(lora.exclude_modules) or None,
        "trainable_token_indices": list(lora.trainable_token_indices) or None,
    }


def read_adapter_config(directory: str | Path) -> dict[str, Any]:
    """Return the JSON object in adapter_config.json, its fields unchecked.

    Gives access to fields that `load_adapter` does not return, such as base_model_name_or_path.
    Raises UserError if the file is missing, malformed, or not an object.
    """
    return load_json_object(Path(directory) / CONFIG_NAME)


def parse_adapter_config(raw: dict[str, Any], source: Path) -> LoraConfig:
    """Convert the fields of adapter_config.json to a LoraConfig.

    Raises UserError naming `source` and the field for a malformed value, or for a variant of LoRA
    that is not implemented.
    """
    with naming(source):
        _refuse_variants(raw)
        _check_scalars(raw)
        lora = LoraConfig(
            r=raw["r"],
            lora_alpha=raw["lora_alpha"],
            lora_dropout=float(raw.get("lora_dropout") or 0.0),
            use_rslora=bool(raw.get("use_rslora")),
            target_modules=(),
            modules_to_save=tuple(raw.get("modules_to_save") or ()),
            use_dora=bool(raw.get("use_dora")),
            rank_pattern=_parse_pattern(raw, "rank_pattern"),
            alpha_pattern=_parse_pattern(raw, "alpha_pattern"),
            layers_to_transform=_parse_numbers(raw, "layers_to_transform"),
            trainable_token_indices=_parse_numbers(raw, "trainable_token_indices"),
            exclude_modules=_parse_names(raw, "exclude_modules"),
        )
        # Call split_targets before the targets are set: it would turn the target embed_tokens into
        # a trained copy, but in a PEFT file that target means LoRA on the embedding.
        lora = split_targets(lora)
        targets = _parse_names(raw, "target_modules")
    linears = tuple(t for t in targets if t not in ("embed_tokens", "model.embed_tokens"))
    return dataclasses.replace(lora, target_modules=linears, lora_embeddings=linears != targets)


def _names_or_pattern(items: tuple[str, ...]) -> str | list[str]:
    """Convert target or excluded modules to PEFT's form: a list of names, or one pattern (str)."""
    if items and items[0].startswith(PATTERN_PREFIX):
        return items[0].removeprefix(PATTERN_PREFIX)
    return list(items)


def _refuse_variants(raw: dict[str, Any]) -> None:
    if "peft_type" not in raw:
        raise UserError("peft_type is missing; expected 'LORA'. Is this an adapter?")
    for key, value in raw.items():
        if key in _KNOWN_FIELDS:
            continue
        # `not value` would also match 0, which can be a layer or a count and does not mean "unset".
        empty = value is None or value is False or value in ({}, [])
        if (empty and key != "peft_type") or value in _PLAIN_VALUES.get(key, ()):
            continue
        wanted = " or ".join(repr(v) for v in _PLAIN_VALUES.get(key, (None,)))
        remedy = f"Merge the adapter with the tool that wrote it, or train without {key}"
        if key == "init_lora_weights":
            remedy = "PEFT makes it plain: path_initial_model_for_weight_conversion on saving"
        expected = f"only plain LoRA is implemented (expected {wanted})"
        raise UserError(f"{key} is {_short(value)}; {expected}. {remedy}")


def _check_scalars(raw: dict[str, Any]) -> None:
    r, alpha, dropout = raw.get("r"), raw.get("lora_alpha"), raw.get("lora_dropout") or 0.0
    _expect(type(r) is int and r > 0, raw, "r", "a positive integer")
    _expect(_is_number(alpha) and alpha > 0, raw, "lora_alpha", "a positive number")
    _expect(_is_number(dropout) and 0 <= dropout < 1, raw, "lora_dropout", "0 <= p < 1")
    for key in ("use_rslora", "ensure_weight_tying", "use_dora"):
        _expect(isinstance(raw.get(key), bool | None), raw, key, "true or false")
    saved = raw.get("modules_to_save")
    _expect(saved is None or _are_names(saved), raw, "modules_to_save", "a list of names")


def _parse_pattern(raw: dict[str, Any], key: str) -> tuple[tuple[str, Any], ...]:
    pattern = raw.get(key) or {}
    kind, kinds = (int, (int,)) if key == "rank_pattern" else (float, (int, float))
    ok = isinstance(pattern, dict) and all(type(v) in kinds and v > 0 for v in pattern.values())
    _expect(ok, raw, key, "names with numbers above 0")
    for name in pattern:
        matches(name, "")  # raises UserError if it is not a regular expression
    return tuple((name, kind(value)) for name, value in pattern.items())


def _parse_numbers(raw: dict[str, Any], key: str) -> tuple[int, ...]:
    """Parse layer indices or token ids, given as a number, a list, or {"embed_tokens": list}."""
    value = raw.get(key)
    numbers = [value] if type(value) is int else value or []
    if isinstance(numbers, dict) and set(numbers) == {"embed_tokens"}:
        numbers = numbers["embed_tokens"]
    ok = isinstance(numbers, list) and all(type(i) is int and i >= 0 for i in numbers)
    owner = ", of embed_tokens" if key == "trainable_token_indices" else ""
    _expect(ok, raw, key, f"numbers from 0{owner}")
    return tuple(numbers)


def _parse_names(raw: dict[str, Any], key: str) -> tuple[str, ...]:
    are_targets = key == "target_modules"
    names: Any = raw.get(key) if are_targets else raw.get(key) or []
    if isinstance(names, str):
        is_all = are_targets and names.lower() == ALL_LINEAR
        return (ALL_LINEAR if is_all else PATTERN_PREFIX + names,)
    # PEFT takes list items literally, so a list may not contain "all-linear" or a pattern.
    ok = _are_names(names) and not (are_targets and (not names or any(map(is_special, names))))
    _expect(ok, raw, key, "a list of names or a pattern")
    return tuple(names)


def _expect(ok: bool, raw: dict[str, Any], key: str, expected: str) -> None:
    if not ok:
        found = _short(raw[key]) if key in raw else "missing"
        raise UserError(f"{key} is {found}; expected {expected}")


def _are_names(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
