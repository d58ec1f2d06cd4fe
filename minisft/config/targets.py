"""Resolve target names, suffixes and patterns to the module paths that an adapter changes.

The matching rules are PEFT's (a list item equals the path or a dotted suffix of it; a pattern must
match the full path), so an exported config has the same meaning in PEFT.
"""

import dataclasses
import re
from collections.abc import Iterable

from minisft.config.errors import UserError, closest, flag, wrong
from minisft.config.lora import LoraConfig, matches
from minisft.config.model import EMBEDDING_NAMES, LINEAR_NAMES, ModelConfig

ALL_LINEAR = "all-linear"
PATTERN_PREFIX = "re:"
PATTERN_EXAMPLE = r"re:.*\.(q_proj|v_proj)"
# PEFT's keys of the embedding's adapter, A [R, V] and B [D, R], and of trained rows [tokens, D].
EMBEDDING_A, EMBEDDING_B = (f"model.embed_tokens.lora_embedding_{x}" for x in "AB")
TOKEN_ROWS = "model.embed_tokens.token_adapter.trainable_tokens_delta"
EMBEDDING_PATHS = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}


def split_targets(lora: LoraConfig) -> LoraConfig:
    """Move embed_tokens and lm_head from target_modules to modules_to_save; return a new config.

    Both modules are trained as copies, so naming them in target_modules or in modules_to_save has
    the same meaning. The path "model.embed_tokens" counts as embed_tokens. The result has each
    name once, in the order of EMBEDDING_NAMES.
    Raises UserError if modules_to_save names any other module.
    """
    short = {path: name for name, path in EMBEDDING_PATHS.items()}
    targets = [short.get(item, item) for item in lora.target_modules]
    saved = [short.get(item, item) for item in lora.modules_to_save]
    for name in saved:
        if name not in EMBEDDING_NAMES:
            raise wrong("an item of modules_to_save", name, " or ".join(EMBEDDING_NAMES))
    return dataclasses.replace(
        lora,
        target_modules=tuple(item for item in targets if item not in EMBEDDING_NAMES),
        modules_to_save=tuple(n for n in EMBEDDING_NAMES if n in saved or n in targets),
    )


def match_targets(lora: LoraConfig, cfg: ModelConfig) -> list[str]:
    """Return the module paths that LoRA adapts, in the order of `cfg.linear_paths()`.

    Items of target_modules are names or dotted suffixes ("q_proj", "0.mlp.up_proj"), "all-linear",
    or one "re:PATTERN" that must match a full path. embed_tokens and lm_head are left out, because
    they are trained as copies. layers_to_transform and exclude_modules narrow the result.
    Raises UserError for an item that matches nothing, a malformed pattern, a pattern that matches a
    module that LoRA cannot adapt, a layer that does not exist, or an empty result.
    """
    lora = split_targets(lora)
    found = _named_targets(lora, cfg)
    if lora.layers_to_transform:
        found = _in_layers(found, lora, cfg)
    return _not_excluded(found, lora.exclude_modules) if lora.exclude_modules else found


def _named_targets(lora: LoraConfig, cfg: ModelConfig) -> list[str]:
    items, paths = lora.target_modules, list(cfg.linear_paths())
    known = [*LINEAR_NAMES, *EMBEDDING_NAMES, ALL_LINEAR]
    if not items:
        raise UserError(
            f"target_modules names no linear module; add some of {', '.join(LINEAR_NAMES)}"
        )
    special = next(filter(is_special, items), None)
    if special and len(items) > 1:
        raise UserError(f"target_modules mixes {special!r} with others; it must stand alone")
    if special:
        pattern = special.removeprefix(PATTERN_PREFIX)
        return paths if pattern == special else _match_pattern(pattern, lora, cfg)
    for item in items:
        if not any(is_target(path, [item]) for path in paths):
            near = closest(item, known + paths)
            guess = f" Perhaps you meant {near!r}." if near else ""
            raise UserError(
                f"target_modules item {item!r} matches no linear of this model.{guess} Known "
                f"names: {', '.join(known)}, or a pattern as {PATTERN_PREFIX}PATTERN"
            )
    return [path for path in paths if is_target(path, items)]


def _match_pattern(pattern: str, lora: LoraConfig, cfg: ModelConfig) -> list[str]:
    compiled, linears = _compiled(pattern, "target_modules"), cfg.linear_paths()
    # As in PEFT, a pattern does not match the modules in modules_to_save.
    copies = {EMBEDDING_PATHS[name] for name in lora.modules_to_save}
    matched = [p for p in _module_paths(cfg) if p not in copies and compiled.fullmatch(p)]
    others = [path for path in matched if path not in linears]
    given = f"target_modules pattern {pattern!r}"
    if others:
        raise UserError(
            f"{given} also matches {others[0]!r}; match linears only: {PATTERN_EXAMPLE}"
        )
    if not matched:
        raise UserError(f"{given} matches no module; match whole paths, as {PATTERN_EXAMPLE} does")
    return matched


def _compiled(pattern: str, name: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as e:
        problem = f"is not a regular expression: {e}; an example is {PATTERN_EXAMPLE}"
        raise UserError(f"{name} pattern {pattern!r} {problem}") from None


def _in_layers(found: list[str], lora: LoraConfig, cfg: ModelConfig) -> list[str]:
    layers, count = lora.layers_to_transform, cfg.num_hidden_layers
    if lora.target_modules[0].startswith(PATTERN_PREFIX):
        raise UserError("layers_to_transform does not go with a target_modules pattern; drop one")
    if max(layers) >= count:
        raise UserError(f"layers_to_transform names layer {max(layers)}, but the model has {count}")
    kept = [path for path in found if int(path.split(".")[2]) in layers]
    if not kept:
        raise UserError("layers_to_transform leaves none of the target_modules")
    return kept


def _not_excluded(found: list[str], items: tuple[str, ...]) -> list[str]:
    if items[0].startswith(PATTERN_PREFIX):
        compiled = _compiled(items[0].removeprefix(PATTERN_PREFIX), "--exclude-modules")
        kept = [path for path in found if not compiled.fullmatch(path)]
    else:
        kept = [path for path in found if not is_target(path, items)]
    if len(kept) in (0, len(found)):
        raise UserError(
            f"--exclude-modules {', '.join(items)} matches {'none' if kept else 'all'} of the "
            f"{len(found)} target modules; drop it or change it"
        )
    return kept


def check_patterns(lora: LoraConfig, cfg: ModelConfig) -> None:
    """Raise UserError for a key of rank_pattern or alpha_pattern that matches no adapted module."""
    paths = _adapted(lora, cfg)
    for name in ("rank_pattern", "alpha_pattern"):
        for key, _ in getattr(lora, name):
            if not any(matches(key, path) for path in paths):
                raise UserError(f"{flag(name)} names {key!r}, which matches no adapted module")


def scaling_ratios(lora: LoraConfig, cfg: ModelConfig) -> tuple[tuple[str, float], ...]:
    """Return (path, scale / lora.scaling) of adapted modules whose scale is not lora.scaling.

    An adapted embedding is included even if its scale equals lora.scaling.
    """
    if not (lora.rank_pattern or lora.alpha_pattern or lora.lora_embeddings):
        return ()
    ratios = ((path, lora.scaling_of(path) / lora.scaling) for path in _adapted(lora, cfg))
    embedding = EMBEDDING_PATHS["embed_tokens"]
    return tuple((path, ratio) for path, ratio in ratios if ratio != 1 or path == embedding)


def _adapted(lora: LoraConfig, cfg: ModelConfig) -> list[str]:
    """Return the paths of adapted modules: linears, and the embedding if lora_embeddings."""
    embedding = [EMBEDDING_PATHS["embed_tokens"]] if lora.lora_embeddings else []
    return [*match_targets(lora, cfg), *embedding]


def is_special(item: str) -> bool:
    """Return whether a target item is "all-linear" or "re:PATTERN" instead of a module name."""
    return item.lower() == ALL_LINEAR or item.startswith(PATTERN_PREFIX)


def is_target(path: str, items: Iterable[str]) -> bool:
    """Return whether a module path equals one of the items or ends in a dot and the item."""
    return any(f".{path}".endswith(f".{item}") for item in items)


def adapter_shapes(lora: LoraConfig, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every trained tensor of an adapter; all tensors are float32.

    In order: for each module, "PATH.lora_A.weight" [r, in], "PATH.lora_B.weight" [out, r] (r from
    rank_pattern) and, with DoRA, "PATH.lora_magnitude_vector" [out]; the embedding's A [r, vocab]
    and B [hidden, r]; trained token rows [tokens, hidden]; trained copies under their checkpoint
    names [vocab, hidden]. With a tied base, embed_tokens and lm_head both mean the same copy,
    "model.embed_tokens.weight".
    Raises UserError if `match_targets` does, and for settings that exclude each other.
    """
    linears, shapes = cfg.linear_paths(), {}
    for path in match_targets(lora, cfg):
        out_features, in_features = linears[path]
        r = lora.rank_of(path)
        if lora.splits_weights and r > (most := min(out_features, in_features)):
            side = f"the shorter side of [{out_features}, {in_features}]"
            why = f"at most {most}, {side}, for init_lora_weights {lora.init_lora_weights}"
            raise wrong(f"the rank of {path}", r, why)
        shapes[f"{path}.lora_A.weight"] = (r, in_features)
        shapes[f"{path}.lora_B.weight"] = (out_features, r)
        if lora.use_dora:
            shapes[f"{path}.lora_magnitude_vector"] = (out_features,)
    if lora.lora_embeddings:
        r = _embedding_rank(lora, cfg)
        shapes[EMBEDDING_A] = (r, cfg.vocab_size)
        shapes[EMBEDDING_B] = (cfg.hidden_size, r)
    if lora.trainable_token_indices:
        _check_token_indices(lora, cfg)
        shapes[TOKEN_ROWS] = (len(lora.trainable_token_indices), cfg.hidden_size)
    # In a tied base both names mean the same matrix, which gets one entry.
    for name in split_targets(lora).modules_to_save:
        path = EMBEDDING_PATHS["embed_tokens" if cfg.tie_word_embeddings else name]
        shapes[f"{path}.weight"] = (cfg.vocab_size, cfg.hidden_size)
    return shapes


def _embedding_rank(lora: LoraConfig, cfg: ModelConfig) -> int:
    rivals = {
        "modules_to_save embed_tokens": _saves_embedding(lora, cfg),
        "trainable_token_indices": bool(lora.trainable_token_indices),
        "use_dora": lora.use_dora,
        f"init_lora_weights {lora.init_lora_weights}": lora.splits_weights,
        "a target_modules pattern": any(t.startswith(PATTERN_PREFIX) for t in lora.target_modules),
    }
    for name, given in rivals.items():
        if given:
            raise UserError(f"--lora-embeddings does not go with {name}; drop one")
    return lora.rank_of(EMBEDDING_PATHS["embed_tokens"])


def _check_token_indices(lora: LoraConfig, cfg: ModelConfig) -> None:
    name, last, rows = "trainable_token_indices", max(lora.trainable_token_indices), cfg.vocab_size
    if last >= rows:
        raise UserError(f"{name} names token {last}, but the embedding has {rows} rows")
    if _saves_embedding(lora, cfg):
        raise UserError(f"{name} has no effect where the whole embedding is trained; drop one")


def _saves_embedding(lora: LoraConfig, cfg: ModelConfig) -> bool:
    """Return whether a trained copy replaces the embedding (in a tied base: or the head)."""
    saved = split_targets(lora).modules_to_save
    return "embed_tokens" in saved or (bool(saved) and cfg.tie_word_embeddings)


def _module_paths(cfg: ModelConfig) -> list[str]:
    """Return the path of every module of the Hugging Face model, including containers, norms."""
    parts = ["", ".self_attn", ".mlp", ".mlp.act_fn", ".input_layernorm"]
    parts.append(".post_attention_layernorm")
    layers = [f"model.layers.{i}{part}" for i in range(cfg.num_hidden_layers) for part in parts]
    outside = ["model", "model.layers", "model.norm", "model.rotary_emb", *EMBEDDING_PATHS.values()]
    return [*outside, *layers, *cfg.linear_paths()]
