"""When a run writes a checkpoint, and what goes into it."""

from __future__ import annotations

from pathlib import Path

from minisft.files.checkpoint import rotate, save_checkpoint
from minisft.files.export import write_trained
from minisft.session.context import Run
from minisft.session.outputs import plain_config


def save(run: Run) -> None:
    """Write one complete checkpoint, then remove those beyond --save-total-limit."""
    # metrics.jsonl must not lack a step that a checkpoint holds.
    run.report.sync()

    def write_model(directory: Path) -> None:
        write_trained(directory, run.state.trainable, run.base, run.config)

    settings = {
        "config": plain_config(run.config),
        "evaluated": run.state.step in run.report.evaluations,
    }
    save_checkpoint(run.out, run.state, write_model, settings | run.facts)
    rotate(run.out, run.config.save_total_limit, run.state.best_step)


def save_due(run: Run, best: bool, end: bool) -> bool:
    """Whether --save-strategy asks for a checkpoint after this step, the best or the last one."""
    config = run.config
    if config.save_strategy == "no":
        return False
    by_epoch = config.save_strategy == "epoch"
    every = run.schedule.steps_per_epoch if by_epoch else config.save_steps
    periodic = config.save_strategy != "best" and run.state.step % every == 0
    return end or periodic or (best and config.keeps_best)


def go_on(step: int) -> str:
    """How to continue from the checkpoint of a step, in words."""
    return f"checkpoint-{step} is complete: continue with --resume-from-checkpoint auto"
