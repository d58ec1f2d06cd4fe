"""What settings mean together: checks that involve two of them, and values derived from several.

The derived values are the properties of `TrainConfig`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.config.errors import UserError, flag, wrong
from minisft.config.fields import as_flag, idle_settings, settings
from minisft.config.lora import LoraConfig, matches

if TYPE_CHECKING:
    from minisft.config.train import TrainConfig

_WAVES = ("linear", "cosine", "1-sqrt")
# What --lr-scheduler-kwargs may give to each schedule; the others take nothing.
_SCHEDULE_OPTIONS = {
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": (
        "num_decay_steps", "num_stable_steps", "min_lr_ratio", "num_cycles", "warmup_type",
        "decay_type",
    ),
}  # fmt: skip


def normalize_(config: TrainConfig) -> None:
    """Store every setting in one form: current spellings, str for paths, tuples for lists.

    Raises UserError for a value of the wrong type.
    """
    new = {name: s.normalized(getattr(config, name)) for name, s in settings(type(config)).items()}
    # Trainer's report_to="none".
    new["report_to"] = tuple(name for name in new["report_to"] if name != "none")
    if new["full_finetuning"]:
        new["load_in_4bit"] = False
    for name, value in new.items():
        object.__setattr__(config, name, value)


def check(config: TrainConfig) -> None:
    """Raise UserError for the first value, or pair of settings, that cannot be used."""
    for name, setting in settings(type(config)).items():
        setting.check(getattr(config, name))
    # No setting that the user gave is ignored silently.
    for name, why, remedy in idle_settings(config):
        if remedy:
            given = as_flag(name, getattr(config, name))
            raise UserError(f"{given} has no effect with {why}; {remedy}")
    _check_evaluation(config)
    # They raise for a malformed part: better now than after the base model is loaded.
    for derived in (lora, column_map, scheduler_options):
        derived(config)
    read = [Path(name).resolve() for name in (*dict(sources(config)), config.eval_dataset)]
    written = config.preview_json
    if written and Path(written).resolve() in read:
        raise UserError(f"--preview-json {written} is a file of rows that is read; name another")


def _check_evaluation(config: TrainConfig) -> None:
    """Evaluation needs rows; choosing the best model needs evaluations and checkpoints."""
    strategy, best = config.eval_strategy, config.load_best_model_at_end
    chooses_best = {
        "--load-best-model-at-end": best,
        "--early-stopping-patience": config.early_stopping_patience,
        "--save-strategy best": config.save_strategy == "best",
    }
    if strategy != "no" and not config.eval_dataset:
        raise UserError(f"--eval-strategy {strategy} needs --eval-dataset; give one")
    for name, given in chooses_best.items():
        if given and strategy == "no":
            raise UserError(f"{name} needs --eval-strategy steps or epoch; give one")
    if best and config.save_strategy == "no":
        raise UserError("--load-best-model-at-end needs checkpoints; use --save-strategy best")
    if config.eval_generate and not config.eval_dataset:
        raise UserError("--eval-generate takes its prompts from --eval-dataset; give one")


def lora(config: TrainConfig) -> LoraConfig | None:
    """The adapter's settings, or None with full_finetuning."""
    if config.full_finetuning:
        return None
    # Every other setting of LoraConfig has the same name here.
    names = {field.name: field.name for field in dataclasses.fields(LoraConfig)} | {"r": "lora_r"}
    given: dict[str, Any] = {theirs: getattr(config, ours) for theirs, ours in names.items()}
    for name in ("rank_pattern", "alpha_pattern"):
        given[name] = _pattern(config, name)
    for name in ("layers_to_transform", "trainable_token_indices"):
        given[name] = _whole_numbers(config, name)
    return LoraConfig(**given)


def _pattern(config: TrainConfig, name: str) -> tuple[tuple[str, float], ...]:
    """`--rank-pattern q_proj=8` as (("q_proj", 8),): ranks are int, alphas float."""
    pairs, whole = [], name == "rank_pattern"
    for item in getattr(config, name):
        key, _, text = item.rpartition("=")
        value = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0
        if not key or value <= 0 or (whole and value != int(value)):
            raise wrong(flag(name), item, f"MODULE=a {'whole ' * whole}number above 0")
        matches(key, "")  # raises for a malformed regular expression
        pairs.append((key, int(value) if whole else value))
    return tuple(pairs)


def _whole_numbers(config: TrainConfig, name: str) -> tuple[int, ...]:
    items = getattr(config, name)
    for item in items:
        if not item.isdecimal():
            raise wrong(flag(name), item, f"{settings(type(config))[name].items.what}, from 0")
    numbers = tuple(map(int, items))
    if len(set(numbers)) != len(numbers):
        raise wrong(flag(name), " ".join(items), "each once")
    return numbers


def sources(config: TrainConfig) -> list[tuple[str, float | None]]:
    """`--dataset a.jsonl:0.7 b.jsonl:0.3` as [("a.jsonl", 0.7), ("b.jsonl", 0.3)].

    None where no weights are given. Weights sum to 1.
    """
    found: list[tuple[str, float | None]] = []
    for item in config.dataset:
        name, _, text = item.rpartition(":")
        weight = _number(text)
        # A file name may end in a colon and a number.
        if not name or weight is None or Path(item).exists():
            found.append((item, None))
        elif 0 < weight < math.inf:
            found.append((name, weight))
        else:
            raise wrong("--dataset", item, "a weight above 0")
    given = [weight for _, weight in found if weight is not None]
    if given and len(given) != len(found):
        raise wrong("--dataset", " ".join(config.dataset), "a weight for every dataset, or none")
    total = sum(given)
    return [(name, None if weight is None else weight / total) for name, weight in found]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def base_name(config: TrainConfig) -> str:
    """The base model as an adapter records it: the hub id, or the directory's absolute path."""
    path = Path(config.model).expanduser()
    return str(path.resolve()) if path.is_dir() else config.model


def serves_in_4bit(config: TrainConfig) -> bool:
    """Whether the adapter belongs on a 4-bit base: it was trained through one, and that base still
    holds what the adapter started as (a PiSSA or OLoRA base lacks it)."""
    return config.load_in_4bit and not (config.lora and config.lora.splits_weights)


def keeps_best(config: TrainConfig) -> bool:
    """Whether the run depends on which evaluation is the best."""
    by_name = config.load_best_model_at_end or config.early_stopping_patience
    return bool(by_name or config.save_strategy == "best")


def best_metric(config: TrainConfig) -> tuple[str, bool]:
    """("eval_loss", False): the metric that decides the best evaluation; whether greater wins."""
    name = config.metric_for_best_model.removeprefix("eval_")
    greater = config.greater_is_better
    return f"eval_{name}", name != "loss" if greater is None else greater


def column_map(config: TrainConfig) -> dict[str, str]:
    """`--columns prompt=question` as {"prompt": "question"}."""
    pairs = [item.split("=", 1) for item in config.columns]
    for item, pair in zip(config.columns, pairs, strict=True):
        if len(pair) != 2 or not all(pair):
            raise wrong("--columns", item, "NAME=COLUMN, such as prompt=question")
    if len({ours for ours, _ in pairs}) < len(pairs):
        raise wrong("--columns", " ".join(config.columns), "each NAME once")
    return {ours: theirs for ours, theirs in pairs if ours != theirs}


def scheduler_options(config: TrainConfig) -> dict[str, Any]:
    """`--lr-scheduler-kwargs num_cycles=2` as {"num_cycles": 2.0}, checked for the schedule."""
    kind, rate = config.lr_scheduler_type, config.learning_rate
    given = dict(_scheduler_option(kind, item) for item in config.lr_scheduler_kwargs)
    needs = f"--lr-scheduler-type {kind} needs --lr-scheduler-kwargs"
    if kind == "warmup_stable_decay" and "num_decay_steps" not in given:
        raise UserError(f"{needs} num_decay_steps=N")
    if kind == "cosine_with_min_lr" and ("min_lr" in given) == ("min_lr_rate" in given):
        raise UserError(f"{needs} min_lr=RATE or min_lr_rate=SHARE, and not both")
    # transformers' default of lr_end.
    ends = {"lr_end": 1e-7} | given if kind == "polynomial" else given
    for name in ("min_lr", "lr_end"):
        if name in ends and not rate > ends[name]:
            end = f"--lr-scheduler-kwargs {name}={ends[name]:g}"
            raise UserError(f"{end} is not below --learning-rate {rate:g}")
    return given


def _scheduler_option(kind: str, item: str) -> tuple[str, Any]:
    """`num_cycles=2` as ("num_cycles", 2.0)."""
    name, _, text = item.partition("=")
    known, number = _SCHEDULE_OPTIONS.get(kind, ()), _number(text)
    if name not in known:
        names = f"--lr-scheduler-type {kind} knows these names: {', '.join(known) or 'none'}"
        raise wrong("--lr-scheduler-kwargs", item, f"NAME=VALUE, and {names}")
    if name.endswith("_type"):
        if text not in _WAVES:
            raise wrong("--lr-scheduler-kwargs", item, f"one of {', '.join(_WAVES)}")
        return name, text
    if number is None or not 0 <= number < math.inf:
        raise wrong("--lr-scheduler-kwargs", item, "a number, 0 or more")
    return name, number
