"""Going on from a checkpoint: which one, whether it is this run's, and what changed since."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from minisft.config.errors import UserError, flag
from minisft.config.targets import adapter_shapes, split_targets
from minisft.config.train import TrainConfig
from minisft.files.adapter import read_initial_lora
from minisft.files.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint_,
    read_facts,
    rotate,
    set_aside_newer,
)
from minisft.files.disk import load_json
from minisft.files.export import trained_file
from minisft.files.load import Base
from minisft.session.outputs import OUTPUT, RUN, TrainOutput, plain
from minisft.session.report import say
from minisft.step import State

# A checkpoint made under other values of these is not a checkpoint of this run.
_FIXED_ON_RESUME = (
    "dtype", "load_in_4bit", "max_length", "lora_r", "lora_alpha", "lora_dropout", "use_rslora",
    "target_modules", "modules_to_save", "full_finetuning", "optim", "packing", "packing_strategy",
    "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
    "loss_type", "label_smoothing", "neftune_noise_alpha", "use_dora", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "exclude_modules", "init_lora_weights",
    "trainable_token_indices", "lora_embeddings",
)  # fmt: skip


def finished(out: Path, config: TrainConfig) -> TrainOutput | None:
    """The result of a complete run that is being resumed, or None.

    Settings that a checkpoint fixes are compared first: with others, resuming is refused later on.
    """
    result = out / ("model.safetensors" if config.full_finetuning else "adapter_model.safetensors")
    shards = out / "model.safetensors.index.json"
    which = config.resume_from_checkpoint
    if not which or not (out / OUTPUT).exists():
        return None
    if which != "auto" and not Path(which).is_dir():
        return None  # refused by name later on
    if not result.exists() and not (config.full_finetuning and shards.exists()):
        return None
    names = (*_FIXED_ON_RESUME, "model", "dataset", "load_best_model_at_end")
    try:
        raw, then = load_json(out / OUTPUT), load_json(out / RUN)["config"]
        output = TrainOutput(raw["global_step"], raw["training_loss"], raw["metrics"])
        steps, epoch = int(output.global_step), float(output.metrics["epoch"])
        patience = config.early_stopping_patience
        early = 0 < patience <= output.metrics.get("evaluations_since_best", 0)
        changed = any(then.get(name, False) != plain(getattr(config, name)) for name in names)
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as e:
        say(f"{out / OUTPUT} or {RUN} is damaged ({e!r}): made again from the checkpoint")
        return None
    complete = epoch >= config.num_train_epochs
    if config.max_steps > 0:
        complete = steps == config.max_steps  # more of them: refused later on
    if changed or not (complete or early):
        return None
    ignored = ("resume_from_checkpoint", "overwrite_output_dir", "preview", "max_steps")
    now = {name: plain(getattr(config, name, was)) for name, was in then.items()}
    differ = [name for name in then if now[name] != then[name] and name not in ignored]
    last = [path.resolve() for path in list_checkpoints(out)[-1:]]
    if differ and which != "auto" and [Path(which).resolve()] != last:
        return None  # from an earlier state, the run would end otherwise
    say(f"{out}: complete already ({steps} steps); nothing to do")
    done = (out / OUTPUT).stat().st_mtime
    for name in (*(source for source, _ in config.sources), config.eval_dataset):
        if name and Path(name).is_file() and Path(name).stat().st_mtime > done:
            say(
                f"warning: {name} has changed since: it changes nothing. For a run with it, give a "
                "new --output-dir"
            )
    for name in differ:
        say(
            f"warning: {flag(name)} is {now[name]!r} now and was {then[name]!r}: it changes "
            "nothing. For a run with it, give a new --output-dir"
        )
    return output


def saved_initial_lora(out: Path, config: TrainConfig) -> dict[str, Tensor]:
    """What the adapter of the run that is resumed started from, if it is a part of the base.

    Kept, not computed again: another machine's decomposition differs in its last bits.
    """
    if not (config.lora and config.lora.splits_weights):
        return {}
    file, prefix = trained_file(config.lora)
    which = config.resume_from_checkpoint
    path = find_checkpoint(out, which, lambda line: None) if which else None
    if path and (path / file).exists():
        return read_initial_lora(path / file, prefix)
    if config.init_lora_weights == "pissa":
        say("start   all singular values of every adapted weight; pissa_niter_4 is far quicker")
    return {}


def resume_(
    state: State,
    out: Path,
    config: TrainConfig,
    model: Base,
    facts: dict[str, Any],
    total_steps: int,
) -> bool:
    """Continue from the checkpoint that was asked for, if there is one; refuse another run's.

    Whether it was saved with its step's evaluation in it, where there was one to make.
    """
    if not config.resume_from_checkpoint:
        return True
    path = find_checkpoint(out, config.resume_from_checkpoint, say)
    if path is None:
        say(f"{out} holds no complete checkpoint: starting from step 0")
        return True
    file, prefix = trained_file(model.lora)
    if not (path / file).exists():
        raise UserError(
            f"{path}: no {file}; was it made with{'' if model.lora else 'out'} --full-finetuning?"
        )
    then = read_facts(path)
    if problems := _resume_problems(then, config, model, facts):
        raise UserError(
            f"{path} was made with other settings: {'; '.join(problems)}. "
            "Use the same, or a new --output-dir"
        )
    load_checkpoint_(path, state, file, prefix, model.start)
    _check_best_(state, out, config, then["config"], total_steps)
    if state.step > total_steps:
        raise UserError(
            f"{path} is beyond the end of this run, which has {total_steps} steps; raise "
            "--max-steps or --num-train-epochs, or resume from an older checkpoint"
        )
    say(f"resuming from {path} at step {state.step}")
    if config.dry_run:
        return True
    if names := set_aside_newer(out, state.step):
        say(f"{', '.join(names)}: beyond step {state.step}, renamed to abandoned-checkpoint-N")
    # A kill may have come between a save and its rotation.
    rotate(out, config.save_total_limit, state.best_step)
    for name, value in then["config"].items():
        now = plain(getattr(config, name, value))
        if now != value and name not in ("resume_from_checkpoint", "overwrite_output_dir"):
            say(f"{flag(name)} is {now!r} now; the checkpoint was made with {value!r}")
    return bool(then.get("evaluated", True))


def _check_best_(
    state: State, out: Path, config: TrainConfig, then: dict[str, Any], total_steps: int
) -> None:
    """The best evaluation so far is one of this run's kind, with a checkpoint if that is wanted.

    UserError where it was told by another number or on other rows. One that no checkpoint was kept
    of, or only elsewhere, is forgotten: the best is sought from here on.
    """
    if not state.best_step or not config.keeps_best:
        return
    names = ("metric_for_best_model", "greater_is_better", "eval_dataset")
    differ = [n for n in names if n in then and then[n] != plain(getattr(config, n))]
    if differ and state.step < total_steps:
        found = "; ".join(f"{flag(n)} was {then[n]!r}, now {getattr(config, n)!r}" for n in differ)
        raise UserError(
            f"the best evaluation so far, step {state.best_step}'s, cannot be compared with those "
            f"to come: {found}. Use the same, or a new --output-dir"
        )
    best = out / f"checkpoint-{state.best_step}"
    if config.load_best_model_at_end and state.best_step != state.step and not best.exists():
        say(
            f"the best evaluation so far, step {state.best_step}'s, has no checkpoint in {out}: "
            "the best is sought from here on"
        )
        state.best_step, state.best_value, state.evaluations_since_best = 0, None, 0


def _resume_problems(
    then: dict[str, Any], config: TrainConfig, model: Base, facts: dict[str, Any]
) -> list[str]:
    """What tells a checkpoint from one of this run, a difference each."""
    settings = {"load_in_4bit": False} | then["config"]  # as before there was the flag
    found = []
    for name in _FIXED_ON_RESUME:
        if name not in settings:
            continue
        was, now = settings[name], plain(getattr(config, name))
        if was != now and not (name == "target_modules" and _same_targets(was, config, model)):
            found.append(f"{flag(name)} was {was!r}, now {now!r}")
    if facts["data_hash"] and then["data_hash"] != facts["data_hash"]:
        found.append("the training rows differ (their hash has changed)")
    if then["base_digest"] != facts["base_digest"]:
        found.append("the base model's config.json differs")
    if then["weights_digest"] != facts["weights_digest"]:
        found.append("the base model's weights differ")
    return found


def _same_targets(was: Any, config: TrainConfig, model: Base) -> bool:
    """Whether two spellings (`all-linear`, the seven names) mean the same modules."""
    if model.lora is None or config.lora is None or not isinstance(was, list):
        return False
    try:
        before = dataclasses.replace(config.lora, target_modules=tuple(was))
        return adapter_shapes(split_targets(before), model.cfg) == (
            adapter_shapes(model.lora, model.cfg)
        )
    except UserError:
        return False
