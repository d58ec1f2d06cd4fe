"""Write and strictly read LoRA adapters in the layout of PEFT 0.21.

A directory holds adapter_config.json, adapter_model.safetensors and README.md. A tensor's key is
"base_model.model." + its name in minisft; there is no other mapping. PEFT's reader is not used: it
loads some damaged adapters silently or with a warning (a missing tensor stays zero, a tensor
without the prefix is ignored). This reader refuses them.
"""

import dataclasses
import hashlib
import json
import re
import warnings
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisft.config.errors import UserError
from minisft.config.lora import LoraConfig
from minisft.config.model import ModelConfig
from minisft.config.targets import (
    EMBEDDING_A,
    EMBEDDING_B,
    PATTERN_PREFIX,
    adapter_shapes,
    is_special,
)
from minisft.files import adapter_config
from minisft.files.adapter_config import CONFIG_NAME
from minisft.files.disk import naming, write_text, writing
from minisft.files.safetensors import Header, iter_tensors, read_header, save_file
from minisft.variants.pissa import initial_half, is_pair

WEIGHTS_NAME = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
# Metadata keys of the weights file, for facts that have no field in PEFT's config.
DIGEST_KEY = "minisft_digest"
FOUR_BIT_KEY = "minisft_load_in_4bit"
KIND_KEY = "minisft_base_4bit"  # the kind of 4 bits: `quant_state.kinds`
EMBED_KEY, HEAD_KEY = "model.embed_tokens.weight", "lm_head.weight"
_DIGESTED_IF_SET = ("use_dora", "layers_to_transform", "exclude_modules")
Shapes = dict[str, tuple[int, ...]]


def save_adapter(
    directory: str | Path,
    tensors: dict[str, Tensor],
    lora: LoraConfig,
    cfg: ModelConfig,
    base_model_name_or_path: str,
    *,
    revision: str | None = None,
    base_4bit: str = "",
) -> None:
    """Write the weights and the config of an adapter, loadable by PEFT, transformers and vLLM.

    tensors: exactly the names and shapes of `adapter_shapes(lora, cfg)`, of any float dtype, on any
    device; written as float32. With a tied base, the one trained copy is written under both keys.
    base_4bit: quantisation of the adapter's base (`quant_state.kinds`), "" if not in 4 bits; stored
    in the metadata, for `base_in_4bit` and `other_4bit`.
    Each file is written atomically, the config last.
    Raises UserError if the directory cannot be written, ValueError if the tensors do not fit.
    """
    directory = Path(directory)
    expected = adapter_shapes(lora, cfg)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        name = min(n for n in found.keys() | expected if found.get(n) != expected.get(n))
        wrong = f"{name} is {found.get(name)}, expected {expected.get(name)}"
        raise ValueError(f"tensors do not fit the LoRA config: {wrong}")
    config = adapter_config.adapter_config_dict(lora, cfg, base_model_name_or_path, revision)
    stored = {KEY_PREFIX + name: tensor.detach().float() for name, tensor in tensors.items()}
    if cfg.tie_word_embeddings and EMBED_KEY in tensors:
        stored[KEY_PREFIX + HEAD_KEY] = stored[KEY_PREFIX + EMBED_KEY]
    metadata = {DIGEST_KEY: _digest(config), FOUR_BIT_KEY: json.dumps(bool(base_4bit))}
    metadata |= {KIND_KEY: base_4bit} if base_4bit else {}
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    save_file(stored, directory / WEIGHTS_NAME, {"format": "pt", **metadata})
    # The config is written last. The weights file holds its digest: after a crash between the two
    # writes, reading finds new weights beside an old config and refuses them.
    write_text(directory / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")


def base_in_4bit(directory: str | Path) -> bool | None:
    """Return whether the adapter belongs on a 4-bit base; None if the file does not record it.

    PEFT's files do not record it. Raises UserError if the weights file is missing or malformed.
    """
    stated = read_header(Path(directory) / WEIGHTS_NAME).metadata.get(FOUR_BIT_KEY)
    return None if stated is None else stated == "true"


def other_4bit(directory: str | Path, served: str) -> str:
    """Return a warning if the adapter was trained on a 4-bit kind other than `served`, else "".

    served: `quant_state.kinds` of the base to use the adapter with, "" if not in 4 bits. Returns ""
    if the file does not record the kind of the base that the adapter was trained on.
    """
    trained = read_header(Path(directory) / WEIGHTS_NAME).metadata.get(KIND_KEY, served)
    if not served or trained == served:
        return ""
    problem = f"was trained on a base in 4 bits, {trained}; this one is {served}, another model"
    return f"{directory} {problem}. Give --model the base that it was trained on"


def read_initial_lora(file: Path, prefix: str) -> dict[str, Tensor]:
    """Return the initial A and B of a PiSSA or OLoRA adapter, under the names of A and B.

    file: the adapter's weights, whose keys start with `prefix`. See `minisft.variants.pissa`.
    """
    tensors = ((key.removeprefix(prefix), tensor) for key, tensor in iter_tensors(file))
    return {name: initial_half(name, tensor) for name, tensor in tensors if is_pair(name)}


def load_adapter(directory: str | Path, cfg: ModelConfig) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Read an adapter directory written by minisft or PEFT; return (lora, tensors).

    tensors: the names and shapes of `adapter_shapes(lora, cfg)`, float32 on CPU, owning their
    memory (float16 and bfloat16 files are upcast). Only adapter_config.json and
    adapter_model.safetensors are opened.
    Raises UserError naming the field or tensor if part of the adapter would change or be lost.
    Warns about harmless defects: a target without tensors, a tensor without a known meaning.
    """
    directory = Path(directory)
    source, path = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    raw = adapter_config.read_adapter_config(directory)
    lora = adapter_config.parse_adapter_config(raw, source)
    if not path.exists() and (pickle := directory / "adapter_model.bin").exists():
        raise UserError(
            f"{pickle}: a pickle can run code and is never opened; convert it to {WEIGHTS_NAME} "
            "(PEFT: save_pretrained) in an environment that you trust"
        )
    header = read_header(path)
    keys = _keys_by_name(header, path)
    lora = _without_dead_targets(lora, keys, source)
    with naming(source):
        expected = adapter_shapes(lora, cfg)
    has_tied_copy = cfg.tie_word_embeddings and bool(lora.modules_to_save)
    if has_tied_copy:
        if not raw.get("ensure_weight_tying") and not {EMBED_KEY, HEAD_KEY} <= keys.keys():
            found = f"modules_to_save is {raw['modules_to_save']} with ensure_weight_tying false"
            problem = "so embedding and head differ; only tied copies are implemented"
            remedy = "Train with ensure_weight_tying=True"
            raise UserError(f"{source}: {found} on a tied base, {problem}. {remedy}")
        expected |= {HEAD_KEY: (cfg.vocab_size, cfg.hidden_size)}
    _check_names(keys, expected, cfg, path)
    _check_shapes(keys, expected, header, lora, path)
    _check_digest(raw, lora, header, source)
    tensors = _read_tensors(keys, expected, path)
    if has_tied_copy and not torch.equal(tensors.pop(HEAD_KEY), tensors[EMBED_KEY]):
        both = f"{KEY_PREFIX + HEAD_KEY} and {KEY_PREFIX + EMBED_KEY}"
        remedy = "Train with ensure_weight_tying=True, or use an untied base"
        raise UserError(f"{path}: {both} differ, but this base ties them. {remedy}")
    return lora, tensors


def _digest(config: dict[str, Any]) -> str:
    """Return the SHA-256 (hex) of the adapter_config.json fields that change the output."""
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
    # Digested only if set, so that adapters from before these options existed keep their digests.
    fields |= {key: config[key] for key in _DIGESTED_IF_SET if config.get(key)}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _keys_by_name(header: Header, path: Path) -> dict[str, str]:
    """Return name in minisft -> key in the file; a key without the prefix is its own name."""
    names: dict[str, str] = {}
    for key in header.tensors:
        # PEFT removes the adapter's name, "default", from keys on saving; some other tools do not.
        name = re.sub(r"\.(lora_[AB]|modules_to_save)\.default\.", r".\1.", key)
        name = name.removeprefix(KEY_PREFIX).replace(".modules_to_save.", ".")
        if not key.startswith(KEY_PREFIX) and (".lora_" in key or name in (EMBED_KEY, HEAD_KEY)):
            problem = f"lacks the prefix {KEY_PREFIX!r}, so PEFT would ignore it"
            raise UserError(f"{path}: tensor {key!r} {problem}. Export the adapter again")
        if name in names:
            raise UserError(f"{path}: tensors {names[name]!r} and {key!r} are the same one")
        names[name] = key
    if not any(".lora_A" in name or ".lora_B" in name for name in names):
        example = f"{KEY_PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
        found = f"no adapter tensors ({len(names)} others); expected keys such as {example}"
        raise UserError(f"{path}: holds {found}. Export the adapter again")
    return names


def _without_dead_targets(lora: LoraConfig, keys: Iterable[str], source: Path) -> LoraConfig:
    """Remove target names without a tensor in any layer (PEFT does not adapt them), with a warning.

    If exclude_modules explains the missing tensors, remove the exclusion too, without a warning.
    """
    if not lora.target_modules or is_special(lora.target_modules[0]):
        return lora
    trained = {_last(name.partition(".lora_")[0]) for name in keys if ".lora_" in name}
    live = tuple(item for item in lora.target_modules if _last(item) in trained)
    dead = [item for item in lora.target_modules if item not in live]
    excluded = lora.exclude_modules
    if dead and excluded:
        pattern, names = excluded[0].startswith(PATTERN_PREFIX), set(map(_last, dead))
        kept = () if pattern else tuple(item for item in excluded if _last(item) not in names)
        if pattern or len(kept) < len(excluded):
            return dataclasses.replace(lora, target_modules=live, exclude_modules=kept)
    if dead:
        problem = f"names {', '.join(map(repr, dead))}, for which the file has no tensors"
        warnings.warn(f"{source}: target_modules {problem}; ignored", stacklevel=3)
    return dataclasses.replace(lora, target_modules=live)


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _check_names(keys: dict[str, str], expected: Shapes, cfg: ModelConfig, path: Path) -> None:
    """Raise UserError for a missing tensor, or a surplus one that would change the output."""
    surplus = [name for name in keys if name not in expected]
    base = cfg.weight_shapes().keys() | {HEAD_KEY}
    copied = "model.embed_tokens.base_layer.weight" if EMBEDDING_A in expected else ""
    for name in surplus:
        problem = ""
        if ".lora_" in name:
            problem = _lora_problem(name, expected, cfg)
        elif name.replace(".base_layer.", ".") in base and name != copied:
            where = f"modules_to_save in {CONFIG_NAME} does not name it"
            remedy = "Name it there, or remove it"
            problem = f"replaces a weight of the base model, but {where}. {remedy}"
        elif ".token_adapter." in name:
            where = f"trainable_token_indices in {CONFIG_NAME} does not name them"
            problem = f"holds trained tokens, but {where}. Restore the original config"
        if problem:
            raise UserError(f"{path}: tensor {keys[name]!r} {problem}")
    missing = [name for name in expected if name not in keys]
    if missing:
        problem = f"{KEY_PREFIX + missing[0]!r} is missing ({len(missing)} in all)"
        cause = "The adapter is incomplete (export it again) or was trained on another base"
        raise UserError(f"{path}: tensor {problem}; {CONFIG_NAME} asks for it. {cause}")
    for name in surplus:
        copy = name == copied
        what = "is PEFT's copy of the base's embedding" if copy else "has no known meaning"
        warnings.warn(f"{path}: tensor {keys[name]!r} {what}; ignored", stacklevel=3)


def _lora_problem(name: str, expected: Container[str], cfg: ModelConfig) -> str:
    """Return the reason why a LoRA tensor that the config does not declare is an error."""
    module, _, kind = name.partition(".lora_")
    restore = f"in {CONFIG_NAME}. Restore the original config"
    if name in (EMBEDDING_A, EMBEDDING_B):
        return f"adapts the embedding, but target_modules does not name embed_tokens {restore}"
    if kind not in ("A.weight", "B.weight", "magnitude_vector"):
        wanted = "lora_A.weight and lora_B.weight of linear modules"
        return f"belongs to a LoRA variant that is not implemented; expected {wanted}"
    if module not in cfg.linear_paths():
        problem = f"is not a linear of this model ({cfg.num_hidden_layers} layers)"
        return f"adapts {module!r}, which {problem}. Was the adapter trained on another base?"
    if kind == "magnitude_vector" and f"{module}.lora_A.weight" in expected:
        return f"belongs to DoRA, but use_dora is false {restore}"
    problem = f"in {CONFIG_NAME}, target_modules does not cover {module!r}"
    return f"would be dropped by PEFT: {problem}. Add {_last(module)!r} to target_modules"


def _check_shapes(
    keys: dict[str, str], expected: Shapes, header: Header, lora: LoraConfig, path: Path
) -> None:
    for name, shape in expected.items():
        dtype, found = header.tensors[keys[name]][:2]
        where = f"{path}: tensor {keys[name]!r} is"
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise UserError(f"{where} {dtype}; expected float32, float16 or bfloat16")
        if found == shape:
            continue
        module, is_lora, kind = name.rpartition(".lora_")
        axis = 0 if kind == "A.weight" else 1  # of the rank
        same_size = len(found) == 2 and found[1 - axis] == shape[1 - axis]
        remedy = "Was the adapter trained on another base?"
        if found == shape[::-1]:
            remedy = "It is transposed: export the adapter again"
        elif is_lora and "embedding" not in name and same_size:
            remedy = f"Its rank is {found[axis]}, {CONFIG_NAME} says r={lora.rank_of(module)}"
        raise UserError(f"{where} {list(found)}, expected {list(shape)}. {remedy}")


def _check_digest(raw: dict[str, Any], lora: LoraConfig, header: Header, source: Path) -> None:
    """Raise UserError if the config was edited after training.

    A changed lora_alpha fits every tensor shape, so only the digest in the weights file reveals it.
    """
    targets = raw["target_modules"]
    live = targets if isinstance(targets, str) else list(lora.target_modules)
    # Accept both: a target without tensors is harmless, whether added before or after saving.
    digests = {_digest(raw | {"target_modules": live}), _digest(raw)}
    if header.metadata.get(DIGEST_KEY, _digest(raw)) not in digests:
        raise UserError(
            f"{source}: adapter_config.json was changed after training: r={lora.r}, "
            f"lora_alpha={lora.lora_alpha}, use_rslora={lora.use_rslora}, target_modules and "
            "modules_to_save do not give the digest in the weights file. Restore the original"
        )


def _read_tensors(keys: dict[str, str], expected: Iterable[str], path: Path) -> dict[str, Tensor]:
    tensors = {}
    names = {keys[name]: name for name in expected}
    for key, tensor in iter_tensors(path, names):
        tensor = tensor.to(torch.float32, copy=True)  # a copy: the original is a view of the file
        if not torch.isfinite(tensor).all():
            problem = "holds NaN or infinite values; the training run diverged"
            raise UserError(f"{path}: tensor {key!r} {problem}. Use an earlier checkpoint")
        tensors[names[key]] = tensor
    return tensors
