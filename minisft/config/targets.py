"""Which modules an adapter touches: target names, suffixes and patterns -> module paths.

Standard library only. The matching rules are PEFT's (list: equal or dotted suffix; string: the
whole path must match the pattern), so an exported config means the same thing there as here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from minisft.config.errors import UserError, closest, flag
from minisft.config.lora import LoraConfig, matches
from minisft.config.model import EMBEDDING_NAMES, LINEAR_NAMES, ModelConfig

ALL_LINEAR = "all-linear"
PATTERN_PREFIX = "re:"
PATTERN_EXAMPLE = r"re:.*\.(q_proj|v_proj)"
# PEFT's names of what is trained of the embedding: an adapter, [R, V] and [D, R]; rows [tokens, D].
EMBEDDING_A, EMBEDDING_B = (f"model.embed_tokens.lora_embedding_{x}" for x in "AB")
TOKEN_ROWS = "model.embed_tokens.token_adapter.trainable_tokens_delta"
EMBEDDING_PATHS = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}


def split_targets(lora: LoraConfig) -> LoraConfig:
    """Move embed_tokens and lm_head from target_modules to modules_to_save.

    Both are trained as full copies here, so naming one among the targets means the same as naming
    it in modules_to_save. The full path "model.embed_tokens" counts as embed_tokens; the result
    has each name once, in the order of EMBEDDING_NAMES.
    Raises UserError if modules_to_save names any other module.
    """
    short = {path: name for name, path in EMBEDDING_PATHS.items()}
    targets = [short.get(item, item) for item in lora.target_modules]
    saved = [short.get(item, item) for item in lora.modules_to_save]
    for name in saved:
        if name not in EMBEDDING_NAMES:
            raise UserError(
                f"modules_to_save names {name!r}; trained copies are implemented for "
                f"{' and '.join(EMBEDDING_NAMES)}. Remove it"
            )
    return dataclasses.replace(
        lora,
        target_modules=tuple(item for item in targets if item not in EMBEDDING_NAMES),
        modules_to_save=tuple(n for n in EMBEDDING_NAMES if n in saved or n in targets),
    )


def match_targets(lora: LoraConfig, cfg: ModelConfig) -> list[str]:
    """The module paths that LoRA adapts, in the order of `cfg.linear_paths()`.

    Items of target_modules are names or dotted suffixes ("q_proj", "0.mlp.up_proj"), "all-linear",
    or one "re:PATTERN" that must match a whole path; embed_tokens and lm_head are no targets but
    trained copies (`split_targets`). layers_to_transform and exclude_modules narrow the result.
    Raises UserError for an item that matches nothing, a malformed pattern, a pattern that matches a
    module that LoRA cannot adapt, a layer that does not exist, and if no module is left.
    """
    lora = split_targets(lora)
    found = _named_targets(lora, cfg)
    if lora.layers_to_transform:
        found = _in_layers(found, lora, cfg)
    return _not_excluded(found, lora.exclude_modules) if lora.exclude_modules else found


def _named_targets(lora: LoraConfig, cfg: ModelConfig) -> list[str]:
    items, paths = lora.target_modules, list(cfg.linear_paths())
    if not items:
        raise UserError(
            "target_modules names no linear module; LoRA needs at least one of "
            f"{', '.join(LINEAR_NAMES)}, or {ALL_LINEAR!r}"
        )
    special = [item for item in items if is_special(item)]
    if special and len(items) > 1:
        raise UserError(
            f"target_modules mixes {special[0]!r} with other items ({', '.join(items)}); it must "
            "stand alone. Give either it or a list of names"
        )
    if special:
        pattern = items[0].removeprefix(PATTERN_PREFIX)
        return paths if pattern == items[0] else _match_pattern(pattern, lora, cfg)
    for item in items:
        if not any(is_target(path, [item]) for path in paths):
            known = [*LINEAR_NAMES, *EMBEDDING_NAMES, ALL_LINEAR]
            near = closest(item, known + paths)
            guess = f" Perhaps you meant {near!r}." if near else ""
            raise UserError(
                f"target_modules item {item!r} matches no linear of this model.{guess} Known "
                f"names: {', '.join(known)}, or a pattern as {PATTERN_PREFIX}PATTERN"
            )
    return [path for path in paths if is_target(path, items)]


def _match_pattern(pattern: str, lora: LoraConfig, cfg: ModelConfig) -> list[str]:
    compiled, linears = _compiled(pattern, "target_modules"), cfg.linear_paths()
    # PEFT leaves modules_to_save out of the matching.
    copies = {EMBEDDING_PATHS[name] for name in lora.modules_to_save}
    matched = [p for p in module_paths(cfg) if p not in copies and compiled.fullmatch(p)]
    others = [path for path in matched if path not in linears]
    if others:
        raise UserError(
            f"target_modules pattern {pattern!r} also matches {others[0]!r}, which LoRA cannot "
            f"adapt; narrow it to the linears, as {PATTERN_EXAMPLE} does"
        )
    if not matched:
        raise UserError(
            f"target_modules pattern {pattern!r} matches no module; it must match a whole path, "
            f"such as 'model.layers.0.self_attn.q_proj', as {PATTERN_EXAMPLE} does"
        )
    return matched


def _compiled(pattern: str, name: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as e:
        where = "" if e.pos is None else f" at position {e.pos}"
        raise UserError(
            f"{name} pattern {pattern!r} is not a regular expression: {e.msg}{where}; "
            f"an example is {PATTERN_EXAMPLE}"
        ) from None


def _in_layers(found: list[str], lora: LoraConfig, cfg: ModelConfig) -> list[str]:
    layers, count = lora.layers_to_transform, cfg.num_hidden_layers
    if lora.target_modules[0].startswith(PATTERN_PREFIX):
        raise UserError(
            "layers_to_transform does not go with a target_modules pattern, which can name the "
            "layers itself; drop one"
        )
    if max(layers) >= count:
        raise UserError(
            f"layers_to_transform names layer {max(layers)}, but the model has {count} "
            f"(0 to {count - 1})"
        )
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
    """(path, scale over lora.scaling) of the adapted modules that patterns scale otherwise.

    An adapted embedding is always among them.
    """
    if not (lora.rank_pattern or lora.alpha_pattern or lora.lora_embeddings):
        return ()
    ratios = ((path, lora.scaling_of(path) / lora.scaling) for path in _adapted(lora, cfg))
    embedding = EMBEDDING_PATHS["embed_tokens"]
    return tuple((path, ratio) for path, ratio in ratios if ratio != 1 or path == embedding)


def _adapted(lora: LoraConfig, cfg: ModelConfig) -> list[str]:
    """The linears that are adapted, and the embedding where it is too."""
    embedding = [EMBEDDING_PATHS["embed_tokens"]] if lora.lora_embeddings else []
    return [*match_targets(lora, cfg), *embedding]


def is_special(item: str) -> bool:
    """Whether a target item is "all-linear" or a "re:PATTERN" and not a module name."""
    return item.lower() == ALL_LINEAR or item.startswith(PATTERN_PREFIX)


def is_target(path: str, items: Iterable[str]) -> bool:
    """Whether a module path equals one of the items or ends in a dot and that item."""
    return any(path == item or path.endswith("." + item) for item in items)


def adapter_shapes(lora: LoraConfig, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every trained tensor, all float32: the one declaration of an adapter.

    LoRA pairs "PATH.lora_A.weight" [r, in] and "PATH.lora_B.weight" [out, r], r the module's own
    (rank_pattern), with DoRA "PATH.lora_magnitude_vector" [out]; then the embedding's pair
    [r, vocab] and [hidden, r], trained token rows [tokens, hidden], and the trained copies under
    their checkpoint names [vocab, hidden]. With a tied base there is one copy,
    "model.embed_tokens.weight", whichever of the two names was asked for.
    Raises UserError as `match_targets` does.
    """
    linears, shapes = cfg.linear_paths(), {}
    for path in match_targets(lora, cfg):
        out_features, in_features = linears[path]
        r = lora.rank_of(path)
        if lora.splits_weights and r > min(out_features, in_features):
            raise UserError(
                f"{path} has rank {r}, but init_lora_weights {lora.init_lora_weights} takes its "
                f"start from a weight of [{out_features}, {in_features}]; lower the rank"
            )
        shapes[f"{path}.lora_A.weight"] = (r, in_features)
        shapes[f"{path}.lora_B.weight"] = (out_features, r)
        if lora.use_dora:
            shapes[f"{path}.lora_magnitude_vector"] = (out_features,)
    if lora.lora_embeddings:
        r = _embedding_rank(lora, cfg)
        shapes[EMBEDDING_A] = (r, cfg.vocab_size)
        shapes[EMBEDDING_B] = (cfg.hidden_size, r)
    if lora.trainable_token_indices:
        shapes[TOKEN_ROWS] = (len(_token_indices(lora, cfg)), cfg.hidden_size)
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


def _token_indices(lora: LoraConfig, cfg: ModelConfig) -> tuple[int, ...]:
    indices = lora.trainable_token_indices
    if max(indices) >= cfg.vocab_size:
        raise UserError(
            f"trainable_token_indices names token {max(indices)}, but the embedding has "
            f"{cfg.vocab_size} rows"
        )
    if _saves_embedding(lora, cfg):
        raise UserError(
            "trainable_token_indices has no effect where the whole embedding is trained "
            f"(modules_to_save {', '.join(split_targets(lora).modules_to_save)}); drop one"
        )
    return indices


def _saves_embedding(lora: LoraConfig, cfg: ModelConfig) -> bool:
    """Whether a trained copy replaces the embedding; with a tied base, a copy of the head does."""
    saved = split_targets(lora).modules_to_save
    return "embed_tokens" in saved or (bool(saved) and cfg.tie_word_embeddings)


def module_paths(cfg: ModelConfig) -> list[str]:
    """The path of every module of the Hugging Face model, containers and norms included."""
    layer_parts = ["", ".self_attn", ".mlp", ".mlp.act_fn"]
    layer_parts += [".input_layernorm", ".post_attention_layernorm"]
    layers = [
        f"model.layers.{i}{part}" for i in range(cfg.num_hidden_layers) for part in layer_parts
    ]
    outside = ["model", "model.layers", "model.norm", "model.rotary_emb", *EMBEDDING_PATHS.values()]
    return [*outside, *layers, *cfg.linear_paths()]
