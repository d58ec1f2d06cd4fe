"""LoRA adapters on disk, in the layout of PEFT 0.21: a strict reader and a complete writer.

A directory holds adapter_config.json, adapter_model.safetensors and README.md. A tensor's key is
"base_model.model." + its name in minisft; there is no other mapping. Where PEFT would load a
damaged adapter with a warning or with none, the reader here refuses it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any, TypeGuard

import torch
import yaml
from torch import Tensor

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
from minisft.files.disk import load_json, replace_synced
from minisft.files.quant_state import OURS
from minisft.files.safetensors import Header, iter_tensors, read_header, save_file

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
CARD_NAME = "README.md"
KEY_PREFIX = "base_model.model."
DIGEST_KEY = "minisft_digest"
FOUR_BIT_KEY = "minisft_load_in_4bit"  # PEFT's config has no word for it
KIND_KEY = "minisft_base_4bit"  # nor for the kind of 4 bits: `quant_state.kinds`
PEFT_VERSION = "0.21.2"  # whose layout is followed
EMBED_KEY, HEAD_KEY = "model.embed_tokens.weight", "lm_head.weight"

# What PEFT writes for a plain adapter besides the fields that `adapter_config_dict` fills in.
_PLAIN_FIELDS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": PEFT_VERSION,
    "qalora_group_size": 16,
    "rank_pattern": {},
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "velora_config": None,
}
_USE = """```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/directory")
```
"""
_FOUR_BIT_USE = """Trained on the base in 4 bits (NF4, double quantisation). To load it on the same:

```python
from peft import AutoPeftModelForCausalLM
from transformers import BitsAndBytesConfig

model = AutoPeftModelForCausalLM.from_pretrained(
    "path/to/this/directory",
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
)
```
"""
_STORED_USE = "Trained on the base as it is stored, in 4 bits ({kind}).\n\n" + _USE
# Fields that may hold anything: they do not change what the adapter computes.
_FREE_FIELDS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision"),
}
_READ_FIELDS = {
    *("lora_alpha", "lora_dropout", "modules_to_save", "r", "target_modules", "use_rslora"),
    *("ensure_weight_tying", "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform"),
    *("exclude_modules", "trainable_token_indices"),
}
# Initialisations that leave the base weights as they are; others train against a changed base.
_PLAIN_VALUES = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal"),
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
}


# ------------------------------------------------------------------------------------- the writer


def adapter_config_dict(
    lora: LoraConfig,
    cfg: ModelConfig,
    base_model_name_or_path: str,
    *,
    tied: bool,
    revision: str | None,
) -> dict[str, Any]:
    """The content of adapter_config.json: every key that PEFT 0.21.2 writes, and no other.

    "all-linear" becomes the seven suffixes and "re:PATTERN" the bare pattern; embed_tokens and
    lm_head are in modules_to_save only. `tied`: the base shares embedding and head.
    Raises UserError for targets that do not fit cfg (`match_targets`) or an empty base name.
    """
    if not base_model_name_or_path:
        raise UserError(
            "base_model_name_or_path is empty; an adapter without it cannot be loaded by name. "
            "Give the hub id or the directory of the base model"
        )
    match_targets(lora, cfg)
    lora = split_targets(lora)
    targets = _names_or_pattern(lora.target_modules)
    if lora.target_modules[0].lower() == ALL_LINEAR:
        targets = list(LINEAR_NAMES)
    if lora.lora_embeddings:
        adapter_shapes(lora, cfg)  # refuses what does not go with it
        targets = [*targets, "embed_tokens"]
    alpha = lora.lora_alpha
    return _PLAIN_FIELDS | {
        "base_model_name_or_path": base_model_name_or_path,
        "ensure_weight_tying": tied and bool(lora.modules_to_save),
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,  # some readers want int
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


def _names_or_pattern(items: tuple[str, ...]) -> str | list[str]:
    """As PEFT has them: a list of names, or one expression as a string."""
    if items and items[0].startswith(PATTERN_PREFIX):
        return items[0].removeprefix(PATTERN_PREFIX)
    return list(items)


def save_adapter(
    directory: str | Path,
    tensors: dict[str, Tensor],
    lora: LoraConfig,
    cfg: ModelConfig,
    base_model_name_or_path: str,
    *,
    revision: str | None = None,
    card: str | None = None,
    base_4bit: str = "",
) -> None:
    """Write an adapter that PEFT, transformers and vLLM load: weights, config, optional README.

    tensors: exactly the names and shapes of `adapter_shapes(lora, cfg)`, any float dtype and
    device; written as float32. base_4bit: `quant_state.kinds` of the base in 4 bits that it belongs
    on, "" for none; kept in the file's metadata for `base_in_4bit` and `other_4bit`. With a tied
    base the one trained copy has both keys.
    The config is written last, each file whole or not at all; `card`: text from `model_card`.
    Raises UserError if the directory cannot be written, ValueError if tensors do not fit.
    """
    directory, tied = Path(directory), cfg.tie_word_embeddings
    expected = adapter_shapes(lora, cfg)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        wrong = sorted(n for n in found.keys() | expected if found.get(n) != expected.get(n))
        raise ValueError(
            f"tensors do not fit the LoRA config: {wrong[0]} is {found.get(wrong[0])}, expected "
            f"{expected.get(wrong[0])} ({len(wrong)} such)"
        )
    config = adapter_config_dict(lora, cfg, base_model_name_or_path, tied=tied, revision=revision)
    stored = {KEY_PREFIX + name: tensor.detach().float() for name, tensor in tensors.items()}
    if tied and EMBED_KEY in tensors:
        stored[KEY_PREFIX + HEAD_KEY] = stored[KEY_PREFIX + EMBED_KEY]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{directory}: cannot be created ({e.strerror})") from None
    metadata = {DIGEST_KEY: _digest(config), FOUR_BIT_KEY: json.dumps(bool(base_4bit))}
    metadata |= {KIND_KEY: base_4bit} if base_4bit else {}
    save_file(stored, directory / WEIGHTS_NAME, {"format": "pt", **metadata})
    if card is not None:
        _write_text(directory / CARD_NAME, card)
    _write_text(directory / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")


def model_card(facts: dict[str, Any], base_4bit: str = "") -> str:
    """README.md of an adapter: YAML front matter for the hub, then the facts as tables.

    facts["base_model"] (a hub id or path) is required. Other scalars, such as data_hash, form the
    table "Run"; a dict, such as config or losses, becomes a table of its own under its key.
    base_4bit: as for `save_adapter`.
    Raises UserError if base_model is missing.
    """
    base = facts.get("base_model")
    if not base:
        raise UserError("model card: base_model is missing; give the hub id of the base model")
    front = {
        "base_model": base,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": [f"base_model:adapter:{base}", "lora", "sft", "minisft"],
    }
    run = {k: v for k, v in facts.items() if not isinstance(v, dict) and k != "base_model"}
    tables = {"run": run} | {k: v for k, v in facts.items() if isinstance(v, dict)}
    if base_4bit == OURS:
        use = _FOUR_BIT_USE
    else:
        use = _STORED_USE.format(kind=base_4bit) if base_4bit else _USE
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# LoRA adapter for {' '.join(str(base).split())}\n",
        "Trained by supervised fine-tuning with minisft.\n",
        use,
    ]
    for title, rows in tables.items():
        if rows:
            lines = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]
            head = f"## {title.replace('_', ' ').capitalize()}\n\n| | |\n|---|---|\n"
            sections.append(head + "\n".join(lines) + "\n")
    return "\n".join(sections)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        replace_synced(temporary, path)
    except OSError as e:
        reason = f"{e.strerror}; check the path and free space"
        raise UserError(f"{path}: cannot be written ({reason})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _digest(config: dict[str, Any]) -> str:
    """sha256 over the fields of adapter_config.json that change the result, order-independent."""
    targets = config["target_modules"]
    fields = {
        "alpha_pattern": config.get("alpha_pattern") or {},
        "lora_alpha": float(config["lora_alpha"]),
        "modules_to_save": sorted(config.get("modules_to_save") or []),
        "r": config["r"],
        "rank_pattern": config.get("rank_pattern") or {},
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "use_rslora": bool(config.get("use_rslora")),
    }
    fields |= {
        k: config[k]
        for k in ("use_dora", "layers_to_transform", "exclude_modules")
        if config.get(k)
    }
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


# ------------------------------------------------------------------------------------- the reader


def read_adapter_config(directory: str | Path) -> dict[str, Any]:
    """The raw content of adapter_config.json, unchecked but for being a JSON object.

    For facts that `load_adapter` does not return, such as base_model_name_or_path and revision.
    Raises UserError if the file is missing or malformed.
    """
    path = Path(directory) / CONFIG_NAME
    raw = load_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def base_in_4bit(directory: str | Path) -> bool | None:
    """Whether the adapter belongs on a base in 4 bits; None if the file does not say (PEFT's).

    Raises UserError if the weights file is missing or malformed.
    """
    said = read_header(Path(directory) / WEIGHTS_NAME).metadata.get(FOUR_BIT_KEY)
    return None if said is None else said == "true"


def other_4bit(directory: str | Path, served: str) -> str:
    """What to warn of where an adapter trained on a base in 4 bits meets `served`, another kind.

    served: `quant_state.kinds` of the base that it is about to be used on, "" for none. "" where
    there is nothing to say, or the file does not say what it was trained on.
    """
    said = read_header(Path(directory) / WEIGHTS_NAME).metadata.get(KIND_KEY, served)
    if not served or said == served:
        return ""
    return (
        f"{directory} was trained on a base in 4 bits, {said}; this one is {served}, another "
        "model. Give --model the base that it was trained on"
    )


def load_adapter(directory: str | Path, cfg: ModelConfig) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read an adapter directory written by minisft or PEFT -> (lora, tensors).

    tensors: the names and shapes of `adapter_shapes(lora, cfg)`, float32 on CPU, owning their
    memory (float16 and bfloat16 files are upcast). Only adapter_config.json and
    adapter_model.safetensors are opened.
    Raises UserError naming the field or tensor for anything that would change or lose part of the
    adapter; warns about what is harmless: a surplus target, a tensor of no known meaning.
    """
    directory = Path(directory)
    raw, source = read_adapter_config(directory), str(directory / CONFIG_NAME)
    lora = _parse_config(raw, source)
    path = directory / WEIGHTS_NAME
    if not path.exists() and (directory / PICKLE_NAME).exists():
        raise UserError(
            f"{directory / PICKLE_NAME}: a pickle can run code and is never opened; convert it to "
            f"{WEIGHTS_NAME} (PEFT: save_pretrained) in an environment that you trust"
        )
    header = read_header(path)
    stored = _stored_names(header, path)
    adapted = _adapted_modules(stored, path, cfg)
    lora = _without_dead_targets(lora, adapted, source)
    _check_targets(lora, cfg, adapted, source)
    expected = adapter_shapes(lora, cfg)
    if cfg.tie_word_embeddings and lora.modules_to_save:
        _check_tying(raw, stored, source)
        expected |= {HEAD_KEY: (cfg.vocab_size, cfg.hidden_size)}
    _check_names(stored, expected, cfg, path)
    _check_shapes(stored, expected, header, path, lora)
    _check_digest(raw, lora, header, source)
    tensors = _read_tensors(stored, expected, path)
    if cfg.tie_word_embeddings and lora.modules_to_save:
        head = tensors.pop(HEAD_KEY)
        if not torch.equal(head, tensors[EMBED_KEY]):
            raise UserError(
                f"{path}: {KEY_PREFIX + HEAD_KEY} and {KEY_PREFIX + EMBED_KEY} differ, but this "
                "base ties them. Train with ensure_weight_tying=True, or use an untied base"
            )
    return lora, tensors


def _parse_config(raw: dict[str, Any], source: str) -> LoraConfig:
    """adapter_config.json -> LoraConfig; refuses every variant that is not plain LoRA."""
    if "peft_type" not in raw:
        raise UserError(f"{source}: peft_type is missing; expected 'LORA'. Is this an adapter?")
    for key, value in raw.items():
        if key in _FREE_FIELDS or key in _READ_FIELDS:
            continue
        empty = value is None or value is False or value in ({}, [])  # 0 is a layer, not empty
        plain = (empty and key != "peft_type") or value in _PLAIN_VALUES.get(key, ())
        if not plain:
            wanted = " or ".join(repr(v) for v in _PLAIN_VALUES.get(key, (None,)))
            remedy = f"Merge the adapter with the tool that wrote it, or train without {key}"
            if key == "init_lora_weights":
                remedy = "PEFT makes it plain: path_initial_model_for_weight_conversion on saving"
            raise UserError(
                f"{source}: {key} is {_short(value)}; only plain LoRA is implemented (expected "
                f"{wanted}). {remedy}"
            )
    r, alpha, dropout = raw.get("r"), raw.get("lora_alpha"), raw.get("lora_dropout") or 0.0
    if type(r) is not int or r < 1:
        raise UserError(f"{source}: r is {_stated(raw, 'r')}; expected a positive integer")
    if not (_is_number(alpha) and alpha > 0):
        stated = _stated(raw, "lora_alpha")
        raise UserError(f"{source}: lora_alpha is {stated}; expected a positive number")
    if not (_is_number(dropout) and 0 <= dropout < 1):
        raise UserError(f"{source}: lora_dropout is {_short(dropout)}; expected 0 <= p < 1")
    for key in ("use_rslora", "ensure_weight_tying", "use_dora"):
        if not isinstance(raw.get(key), bool | None):
            raise UserError(f"{source}: {key} is {_short(raw[key])}; expected true or false")
    saved = raw.get("modules_to_save")
    if saved is not None and not _are_names(saved):
        raise UserError(f"{source}: modules_to_save is {_short(saved)}; expected a list of names")
    lora = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=float(dropout),
        use_rslora=bool(raw.get("use_rslora")),
        target_modules=(),
        modules_to_save=tuple(saved or ()),
        use_dora=bool(raw.get("use_dora")),
        rank_pattern=_parse_pattern(raw, "rank_pattern", source),
        alpha_pattern=_parse_pattern(raw, "alpha_pattern", source),
        layers_to_transform=_parse_numbers(raw, "layers_to_transform", source),
        trainable_token_indices=_parse_numbers(raw, "trainable_token_indices", source),
        exclude_modules=_parse_excluded(raw, source),
    )
    # Among the targets of a file, embed_tokens means LoRA on the embedding, not a copy.
    try:
        lora = split_targets(lora)
    except UserError as e:
        raise UserError(f"{source}: {e}") from None
    targets = _parse_targets(raw, source)
    embedding = [t for t in targets if t in ("embed_tokens", "model.embed_tokens")]
    kept = tuple(t for t in targets if t not in embedding)
    return dataclasses.replace(lora, target_modules=kept, lora_embeddings=bool(embedding))


def _parse_pattern(raw: dict[str, Any], name: str, source: str) -> tuple[tuple[str, Any], ...]:
    pattern = raw.get(name) or {}
    kind = int if name == "rank_pattern" else (int, float)
    if not isinstance(pattern, dict) or not all(
        isinstance(v, kind) and not isinstance(v, bool) and v > 0 for v in pattern.values()
    ):
        raise UserError(
            f"{source}: {name} is {_short(pattern)}; expected names with numbers above 0"
        )
    try:
        for key in pattern:
            matches(key, "")
    except UserError as e:
        raise UserError(f"{source}: {e}") from None
    return tuple((k, v if name == "rank_pattern" else float(v)) for k, v in pattern.items())


def _parse_numbers(raw: dict[str, Any], name: str, source: str) -> tuple[int, ...]:
    """Numbers of layers, or of tokens of embed_tokens."""
    value = raw.get(name)
    numbers = [value] if type(value) is int else value or []
    if isinstance(numbers, dict) and set(numbers) == {"embed_tokens"}:
        numbers = numbers["embed_tokens"]
    if not isinstance(numbers, list) or not all(type(i) is int and i >= 0 for i in numbers):
        raise UserError(
            f"{source}: {name} is {_short(numbers)}; expected numbers from 0"
            + (", of embed_tokens" if name == "trainable_token_indices" else "")
        )
    return tuple(numbers)


def _parse_excluded(raw: dict[str, Any], source: str) -> tuple[str, ...]:
    items = raw.get("exclude_modules") or []
    if isinstance(items, str):
        return (PATTERN_PREFIX + items,)
    if not _are_names(items):
        raise UserError(
            f"{source}: exclude_modules is {_short(items)}; expected a list of names or a pattern"
        )
    return tuple(items)


def _parse_targets(raw: dict[str, Any], source: str) -> tuple[str, ...]:
    targets = raw.get("target_modules")
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return (ALL_LINEAR,)
    if isinstance(targets, str):
        return (PATTERN_PREFIX + targets,)
    # Inside a list PEFT takes every item literally, so the two special forms are not allowed there.
    if targets and _are_names(targets) and not any(map(is_special, targets)):
        return tuple(targets)
    stated = _stated(raw, "target_modules")
    raise UserError(f"{source}: target_modules is {stated}; expected a list of names or a pattern")


def _stored_names(header: Header, path: Path) -> dict[str, str]:
    """Name in minisft -> key in the file; keys without the prefix keep their whole name."""
    names: dict[str, str] = {}
    for key in header.tensors:
        # PEFT drops its adapter name on saving; other tools forget to.
        name = re.sub(r"\.(lora_[AB]|modules_to_save)\.default\.", r".\1.", key)
        name = name.removeprefix(KEY_PREFIX).replace(".modules_to_save.", ".")
        if not key.startswith(KEY_PREFIX) and (".lora_" in key or name in (EMBED_KEY, HEAD_KEY)):
            raise UserError(
                f"{path}: tensor {key!r} lacks the prefix {KEY_PREFIX!r}, so PEFT would ignore it. "
                "Rename the tensors, or export the adapter again"
            )
        if name in names:
            raise UserError(f"{path}: tensors {names[name]!r} and {key!r} are the same one")
        names[name] = key
    return names


def _adapted_modules(stored: dict[str, str], path: Path, cfg: ModelConfig) -> list[str]:
    """Paths of the modules that have LoRA tensors in the file; refuses unknown kinds and places."""
    linears, adapted = cfg.linear_paths(), {}
    for name, key in stored.items():
        if ".lora_" not in name:
            continue
        module, _, kind = name.partition(".lora_")
        if module == "model.embed_tokens" and kind in ("embedding_A", "embedding_B"):
            continue  # whether the config names it is for _check_names
        if kind not in ("A.weight", "B.weight", "magnitude_vector"):
            raise UserError(
                f"{path}: tensor {key!r} belongs to a LoRA variant that is not implemented; "
                "expected lora_A.weight and lora_B.weight of linear modules"
            )
        if module not in linears:
            raise UserError(
                f"{path}: tensor {key!r} adapts {module!r}, which is no linear of this model "
                f"({cfg.num_hidden_layers} layers). Was the adapter trained on another base?"
            )
        adapted[module] = None
    if not adapted:
        raise UserError(
            f"{path}: holds no adapter tensors ({len(stored)} others); expected keys such as "
            f"{KEY_PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight. Export the adapter again"
        )
    return list(adapted)


def _without_dead_targets(lora: LoraConfig, adapted: list[str], source: str) -> LoraConfig:
    """Drop list items whose module name has no tensor in any layer: PEFT leaves those at zero.

    An exclusion that is why they have none goes with them.
    """
    if not lora.target_modules or is_special(lora.target_modules[0]):
        return lora
    trained = {path.rsplit(".", 1)[-1] for path in adapted}
    live = tuple(item for item in lora.target_modules if item.rsplit(".", 1)[-1] in trained)
    dead = [item for item in lora.target_modules if item not in live]
    names = {item.rsplit(".", 1)[-1] for item in dead}
    excluded = lora.exclude_modules
    if dead and excluded:
        pattern = excluded[0].startswith(PATTERN_PREFIX)
        kept = () if pattern else tuple(i for i in excluded if i.rsplit(".", 1)[-1] not in names)
        if pattern or len(kept) < len(excluded):
            return dataclasses.replace(lora, target_modules=live, exclude_modules=kept)
    if dead:
        warnings.warn(
            f"{source}: target_modules names {', '.join(map(repr, dead))}, for which the file has "
            "no tensors; ignored",
            stacklevel=3,
        )
    return dataclasses.replace(lora, target_modules=live)


def _check_targets(lora: LoraConfig, cfg: ModelConfig, adapted: list[str], source: str) -> None:
    try:
        targeted = set(match_targets(lora, cfg)) if lora.target_modules else set()
    except UserError as e:
        raise UserError(f"{source}: {e}") from None
    for module in adapted:
        if module not in targeted:
            name = module.rsplit(".", 1)[-1]
            raise UserError(
                f"{source}: target_modules does not cover {module!r}, but {WEIGHTS_NAME} holds its "
                f"LoRA tensors and PEFT would drop them. Add {name!r} to target_modules"
            )


def _check_tying(raw: dict[str, Any], stored: dict[str, str], source: str) -> None:
    """A tied base has one trained copy; refuse a file where embedding and head went apart."""
    if not raw.get("ensure_weight_tying") and not {EMBED_KEY, HEAD_KEY} <= stored.keys():
        raise UserError(
            f"{source}: modules_to_save is {raw['modules_to_save']} with ensure_weight_tying false "
            "on a tied base, so embedding and head differ; only tied copies are implemented. "
            "Train with ensure_weight_tying=True"
        )


def _check_names(
    stored: dict[str, str], expected: dict[str, tuple[int, ...]], cfg: ModelConfig, path: Path
) -> None:
    missing = [name for name in expected if name not in stored]
    if missing:
        raise UserError(
            f"{path}: tensor {KEY_PREFIX + missing[0]!r} is missing ({len(missing)} in all); "
            f"{CONFIG_NAME} asks for it. The adapter is incomplete (export it again) or "
            "was trained on another base"
        )
    base = cfg.weight_shapes().keys() | {HEAD_KEY}
    for name, key in stored.items():
        if name in expected:
            continue
        if name == "model.embed_tokens.lora_embedding_A" or name.endswith("lora_embedding_B"):
            raise UserError(
                f"{path}: tensor {key!r} adapts the embedding, but target_modules in {CONFIG_NAME} "
                "does not name embed_tokens. Restore the original config"
            )
        copied = "model.embed_tokens.base_layer.weight"
        if name == copied and "model.embed_tokens.lora_embedding_A" in expected:
            warnings.warn(
                f"{path}: tensor {key!r} is PEFT's copy of the base's embedding; ignored",
                stacklevel=3,
            )
            continue
        if name.replace(".base_layer.", ".") in base:
            raise UserError(
                f"{path}: tensor {key!r} replaces a weight of the base model, but modules_to_save "
                f"in {CONFIG_NAME} does not name it. Name it there, or remove the tensor"
            )
        if name.endswith(".lora_magnitude_vector"):
            raise UserError(
                f"{path}: tensor {key!r} belongs to DoRA, but use_dora in {CONFIG_NAME} is false. "
                "Restore the original config"
            )
        if ".token_adapter." in name:
            raise UserError(
                f"{path}: tensor {key!r} holds trained tokens, but trainable_token_indices in "
                f"{CONFIG_NAME} does not name them. Restore the original config"
            )
        warnings.warn(f"{path}: tensor {key!r} has no known meaning; ignored", stacklevel=3)


def _check_shapes(
    stored: dict[str, str],
    expected: dict[str, tuple[int, ...]],
    header: Header,
    path: Path,
    lora: LoraConfig,
) -> None:
    for name, shape in expected.items():
        info = header.tensors[stored[name]]
        if info.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise UserError(
                f"{path}: tensor {stored[name]!r} is {info.dtype}; expected float32, float16 or "
                "bfloat16"
            )
        if info.shape == shape:
            continue
        remedy = "Was the adapter trained on another base?"
        if info.shape == shape[::-1]:
            remedy = "It is transposed: export the adapter again"
        elif ".lora_" in name and "embedding" not in name:
            axis = 0 if name.endswith("lora_A.weight") else 1
            if len(info.shape) == 2 and info.shape[1 - axis] == shape[1 - axis]:
                r = lora.rank_of(name.rsplit(".lora_", 1)[0])
                remedy = f"Its rank is {info.shape[axis]}, {CONFIG_NAME} says r={r}"
        raise UserError(
            f"{path}: tensor {stored[name]!r} is {list(info.shape)}, expected {list(shape)}. "
            f"{remedy}"
        )


def _check_digest(raw: dict[str, Any], lora: LoraConfig, header: Header, source: str) -> None:
    """A changed alpha fits every shape; only the digest of an adapter written here betrays it."""
    targets = raw["target_modules"]
    live = targets if isinstance(targets, str) else list(lora.target_modules)
    effective = raw | {"target_modules": live}
    digests = {_digest(effective), _digest(raw)}
    if header.metadata.get(DIGEST_KEY, _digest(raw)) not in digests:
        raise UserError(
            f"{source}: adapter_config.json was changed after training: r={lora.r}, "
            f"lora_alpha={lora.lora_alpha}, use_rslora={lora.use_rslora}, target_modules and "
            "modules_to_save do not give the digest in the weights file. Restore the original"
        )


def _read_tensors(
    stored: dict[str, str], expected: dict[str, tuple[int, ...]], path: Path
) -> dict[str, Tensor]:
    tensors = {}
    by_key = {stored[name]: name for name in expected}
    for key, tensor in iter_tensors(path, by_key):
        tensor = tensor.to(torch.float32, copy=True)  # off the mapped file
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{path}: tensor {key!r} holds NaN or infinite values; the training run diverged. "
                "Use an earlier checkpoint"
            )
        tensors[by_key[key]] = tensor
    return tensors


def _are_names(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _stated(raw: dict[str, Any], key: str) -> str:
    return _short(raw[key]) if key in raw else "missing"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
