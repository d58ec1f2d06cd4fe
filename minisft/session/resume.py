"""Resuming: which checkpoint, whether it fits this run, and which settings have changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from minisft.config.errors import UserError, flag
from minisft.config.fields import fixed_on_resume
from minisft.config.names import respelled
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
from minisft.session.context import Run
from minisft.session.outputs import OUTPUT, RUN, TrainOutput, plain
from minisft.session.report import say


def finished_before(out: Path, config: TrainConfig) -> TrainOutput | None:
    """Returns the result if the run to resume is complete already, else None.

    Also None if a setting has changed that a checkpoint fixes: `resume_` refuses those.
    """
    result = out / ("model.safetensors" if config.full_finetuning else "adapter_model.safetensors")
    shards = out / "model.safetensors.index.json"
    which = config.resume_from_checkpoint
    if not which or not (out / OUTPUT).exists():
        return None
    if which != "auto" and not Path(which).is_dir():
        return None  # `find_checkpoint` refuses it
    if not result.exists() and not (config.full_finetuning and shards.exists()):
        return None
    names = (*fixed_on_resume(type(config)), "model", "dataset", "load_best_model_at_end")
    try:
        raw = load_json(out / OUTPUT)
        then = {k: respelled(k, v) for k, v in load_json(out / RUN)["config"].items()}
        output = TrainOutput(raw["global_step"], raw["training_loss"], raw["metrics"])
        steps, epoch = int(output.global_step), float(output.metrics["epoch"])
        patience = config.early_stopping_patience
        early = 0 < patience <= output.metrics.get("evaluations_since_best", 0)
        changed = any(then.get(name, False) != plain(getattr(config, name)) for name in names)
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as e:
        say(f"{out / OUTPUT} or {RUN} is damaged ({e!r}): resuming from the last checkpoint")
        return None
    complete = epoch >= config.num_train_epochs
    if config.max_steps > 0:
        complete = steps == config.max_steps  # `resume_` refuses a run that has done more
    if changed or not (complete or early):
        return None
    ignored = ("resume_from_checkpoint", "overwrite_output_dir", "preview", "max_steps")
    now = {name: plain(getattr(config, name, was)) for name, was in then.items()}
    differ = [name for name in then if now[name] != then[name] and name not in ignored]
    last = [path.resolve() for path in list_checkpoints(out)[-1:]]
    if differ and which != "auto" and [Path(which).resolve()] != last:
        return None  # from an earlier checkpoint, other settings lead to another result
    say(f"{out}: complete already ({steps} steps); nothing to do")
    _warn_of_changes(out, config, then, differ)
    return output


def _warn_of_changes(
    out: Path, config: TrainConfig, then: dict[str, Any], differ: list[str]
) -> None:
    """Warn of data files and settings that have changed since a run that is complete already.

    then: the settings of the complete run. differ: names of those that are different now.
    """
    remedy = "the finished run is not affected. To use it, give a new --output-dir"
    done = (out / OUTPUT).stat().st_mtime
    for name in (*(source for source, _ in config.sources), config.eval_dataset):
        if name and Path(name).is_file() and Path(name).stat().st_mtime > done:
            say(f"warning: {name} has changed since: {remedy}")
    for name in differ:
        now = plain(getattr(config, name, then[name]))
        say(f"warning: {flag(name)} is {now!r} now and was {then[name]!r}: {remedy}")


def saved_initial_lora(out: Path, config: TrainConfig) -> dict[str, Tensor]:
    """Returns the initial A and B of the run to resume, if PiSSA or OLoRA computed them, else {}.

    Read from the checkpoint, because a decomposition on another machine differs in its last bits.
    """
    if not (config.lora and config.lora.splits_weights):
        return {}
    file, prefix = trained_file(config.lora)
    which = config.resume_from_checkpoint
    path = find_checkpoint(out, which, lambda line: None) if which else None
    if path and (path / file).exists():
        return read_initial_lora(path / file, prefix)
    if config.init_lora_weights == "pissa":
        say("start   full SVD of every adapted weight; pissa_niter_4 is much faster")
    return {}


def resume_(run: Run) -> None:
    """Load the checkpoint of --resume-from-checkpoint, if there is one, into run.state.

    Raises UserError for a checkpoint of another run. Sets run.evaluated.
    """
    config, state, out = run.config, run.state, run.out
    if not config.resume_from_checkpoint:
        return
    path = find_checkpoint(out, config.resume_from_checkpoint, say)
    if path is None:
        say(f"{out} holds no complete checkpoint: starting from step 0")
        return
    file, prefix = trained_file(run.base.lora)
    if not (path / file).exists():
        raise UserError(
            f"{path}: no {file}; was it made with{'' if run.base.lora else 'out'} "
            "--full-finetuning?"
        )
    then = read_facts(path)
    then["config"] = {k: respelled(k, v) for k, v in then["config"].items()}
    if problems := _resume_problems(then, config, run.base, run.facts):
        raise UserError(
            f"{path} was made with other settings: {'; '.join(problems)}. "
            "Use the same, or a new --output-dir"
        )
    load_checkpoint_(path, state, file, prefix, run.base.initial_lora)
    _check_best_(run, then["config"])
    if state.step > run.total_steps:
        raise UserError(
            f"{path} is beyond the end of this run, which has {run.total_steps} steps; raise "
            "--max-steps or --num-train-epochs, or resume from an older checkpoint"
        )
    say(f"resuming from {path} at step {state.step}")
    if config.dry_run:
        return
    if names := set_aside_newer(out, state.step):
        say(f"{', '.join(names)}: later than step {state.step}, renamed to abandoned-checkpoint-N")
    # A kill may have come between saving a checkpoint and deleting older ones.
    rotate(out, config.save_total_limit, state.best_step)
    for name, value in then["config"].items():
        now = plain(getattr(config, name, value))
        if now != value and name not in ("resume_from_checkpoint", "overwrite_output_dir"):
            say(f"{flag(name)} is {now!r} now; the checkpoint was made with {value!r}")
    run.evaluated = bool(then.get("evaluated", True))


def _check_best_(run: Run, then: dict[str, Any]) -> None:
    """Check that the best evaluation so far is comparable with later ones; forget it if it is lost.

    Raises UserError if it used another metric or other rows. then: the settings of the checkpoint's
    run. If its checkpoint is missing, the search for the best starts over.
    """
    config, state = run.config, run.state
    if not state.best_step or not config.keeps_best:
        return
    names = ("metric_for_best_model", "greater_is_better", "eval_dataset")
    differ = [n for n in names if n in then and then[n] != plain(getattr(config, n))]
    if differ and state.step < run.total_steps:
        found = "; ".join(f"{flag(n)} was {then[n]!r}, now {getattr(config, n)!r}" for n in differ)
        raise UserError(
            f"the best evaluation so far, at step {state.best_step}, cannot be compared with later "
            f"ones: {found}. Use the same, or a new --output-dir"
        )
    best = run.out / f"checkpoint-{state.best_step}"
    if config.load_best_model_at_end and state.best_step != state.step and not best.exists():
        say(
            f"the best evaluation so far, at step {state.best_step}, has no checkpoint in "
            f"{run.out}: the search for the best starts over"
        )
        state.best_step, state.best_value, state.evaluations_since_best = 0, None, 0


def _resume_problems(
    then: dict[str, Any], config: TrainConfig, base: Base, facts: dict[str, Any]
) -> list[str]:
    """Differences that make the checkpoint incompatible with this run, one string each."""
    # Checkpoints from before the flag existed have no load_in_4bit.
    settings = {"load_in_4bit": False} | then["config"]
    found = []
    for name in fixed_on_resume(type(config)):
        if name not in settings:
            continue
        was, now = settings[name], plain(getattr(config, name))
        if was != now and not (name == "target_modules" and _same_targets(was, config, base)):
            found.append(f"{flag(name)} was {was!r}, now {now!r}")
    if facts["data_hash"] and then["data_hash"] != facts["data_hash"]:
        found.append("the training rows differ (their hash has changed)")
    if then["base_digest"] != facts["base_digest"]:
        found.append("the base model's config.json differs")
    if then["weights_digest"] != facts["weights_digest"]:
        found.append("the base model's weights differ")
    return found


def _same_targets(was: Any, config: TrainConfig, base: Base) -> bool:
    """Whether two spellings of --target-modules (`all-linear`, the list) match the same modules."""
    if base.lora is None or config.lora is None or not isinstance(was, list):
        return False
    try:
        before = dataclasses.replace(config.lora, target_modules=tuple(was))
        return adapter_shapes(split_targets(before), base.cfg) == (
            adapter_shapes(base.lora, base.cfg)
        )
    except UserError:
        return False
