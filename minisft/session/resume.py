"""Resuming: choose the checkpoint, check that it fits the run, report changed settings."""

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
from minisft.session.context import Run
from minisft.session.outputs import OUTPUT, RUN, TrainOutput, plain_config
from minisft.session.report import say


def finished_before(out: Path, config: TrainConfig) -> TrainOutput | None:
    """Returns the result if the run to resume is already complete, else None.

    Also None if the checkpoint is missing or a setting changed that must not: see `resume_`.
    """
    which, now = config.resume_from_checkpoint, plain_config(config)
    weights = [out / trained_file(config.lora)[0], out / "model.safetensors.index.json"]
    if not which or not (out / OUTPUT).exists() or not any(path.exists() for path in weights):
        return None
    if which != "auto" and not Path(which).is_dir():
        return None
    names = (*fixed_on_resume(type(config)), "model", "dataset", "load_best_model_at_end")
    try:
        raw = load_json(out / OUTPUT)
        then = {k: respelled(k, v) for k, v in load_json(out / RUN)["config"].items()}
        output = TrainOutput(raw["global_step"], raw["training_loss"], raw["metrics"])
        steps, epoch = int(output.global_step), float(output.metrics["epoch"])
        patience = config.early_stopping_patience
        early = 0 < patience <= output.metrics.get("evaluations_since_best", 0)
        changed = any(then.get(name, False) != now[name] for name in names)
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as e:
        say(f"{out / OUTPUT} or {RUN} is damaged ({e!r}): resuming from the last checkpoint")
        return None
    complete = epoch >= config.num_train_epochs
    if config.max_steps > 0:
        complete = steps == config.max_steps  # `resume_` refuses a run that has done more
    if changed or not (complete or early):
        return None
    ignored = ("resume_from_checkpoint", "overwrite_output_dir", "preview", "max_steps")
    differ = [n for n, was in then.items() if now.get(n, was) != was and n not in ignored]
    last = [path.resolve() for path in list_checkpoints(out)[-1:]]
    if differ and which != "auto" and [Path(which).resolve()] != last:
        return None  # from an earlier checkpoint, other settings lead to another result
    say(f"{out}: complete already ({steps} steps); nothing to do")
    remedy = "the finished run is not affected. To use it, give a new --output-dir"
    for name in (*(source for source, _ in config.sources), config.eval_dataset):
        changed_at = Path(name).stat().st_mtime if name and Path(name).is_file() else 0
        if changed_at > (out / OUTPUT).stat().st_mtime:
            say(f"warning: {name} has changed since: {remedy}")
    for name in differ:
        say(f"warning: {flag(name)} is {now[name]!r} now and was {then[name]!r}: {remedy}")
    return output


def saved_initial_lora(out: Path, config: TrainConfig) -> dict[str, Tensor]:
    """Returns the initial A and B of the run to resume, if PiSSA or OLoRA computed them, else {}.

    Reads the checkpoint, because repeating the decomposition may change the last bits.
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
    """Load the checkpoint of --resume-from-checkpoint, if any, into run.state; set run.evaluated.

    Raises UserError if the checkpoint does not fit this run or is beyond the run's last step.
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
        made = "with" if run.base.lora else "without"
        raise UserError(f"{path}: no {file}; was it made {made} --full-finetuning?")
    then = read_facts(path)
    then["config"] = {k: respelled(k, v) for k, v in then["config"].items()}
    if problems := _resume_problems(run, then):
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
    # Delete excess checkpoints: a kill may have prevented it right after the last save.
    rotate(out, config.save_total_limit, state.best_step)
    now = plain_config(config)
    for name, was in then["config"].items():
        ignored = name in ("resume_from_checkpoint", "overwrite_output_dir")
        if now.get(name, was) != was and not ignored:
            say(f"{flag(name)} is {now[name]!r} now; the checkpoint was made with {was!r}")
    run.evaluated = bool(then.get("evaluated", True))


def _check_best_(run: Run, then: dict[str, Any]) -> None:
    """Raises UserError if the best evaluation used another metric or eval set than later ones will.

    Resets the best evaluation if its checkpoint is missing. then: the checkpoint's settings.
    """
    config, state, now = run.config, run.state, plain_config(run.config)
    if not state.best_step or not config.keeps_best:
        return
    names = ("metric_for_best_model", "greater_is_better", "eval_dataset")
    differ = [n for n in names if n in then and then[n] != now[n]]
    if differ and state.step < run.total_steps:
        found = "; ".join(f"{flag(n)} was {then[n]!r}, now {now[n]!r}" for n in differ)
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


def _resume_problems(run: Run, then: dict[str, Any]) -> list[str]:
    """Differences that make the checkpoint incompatible with this run, one string each."""
    found, now, facts = [], plain_config(run.config), run.facts
    # Old checkpoints lack load_in_4bit, which was not a setting yet: assume False.
    settings = now | {"load_in_4bit": False} | then["config"]
    for name in fixed_on_resume(type(run.config)):
        was = settings[name]
        same = name == "target_modules" and _same_targets(run, was)
        if was != now[name] and not same:
            found.append(f"{flag(name)} was {was!r}, now {now[name]!r}")
    contents = {
        "data_hash": "the training rows differ (their hash has changed)",
        "base_digest": "the base model's config.json differs",
        "weights_digest": "the base model's weights differ",
    }
    # Skip empty hashes: a dry run reads only a sample of the rows, so it has no data_hash.
    return found + [why for k, why in contents.items() if facts[k] and then[k] != facts[k]]


def _same_targets(run: Run, was: Any) -> bool:
    """Returns True if the old target_modules `was` matches the same modules as the current one."""
    lora, base = run.config.lora, run.base
    if base.lora is None or lora is None or not isinstance(was, list):
        return False
    try:
        before = split_targets(dataclasses.replace(lora, target_modules=tuple(was)))
        return adapter_shapes(before, base.cfg) == adapter_shapes(base.lora, base.cfg)
    except UserError:
        return False
