"""Guards that end a training run: non-finite numbers, a lasting loss spike, weights that stay."""

from __future__ import annotations

import math

import torch

from minisft.config.train import TrainConfig
from minisft.files.checkpoint import list_checkpoints
from minisft.schedules import lr_factor
from minisft.session.context import Run
from minisft.step import State, StepResult


class TrainingStopped(RuntimeError):
    """A guard stopped training: a non-finite loss, a spike, or no weight changed. Exit code 3."""


def reason_to_stop(run: Run, result: StepResult, rows: list[int]) -> str:
    """Why this step ends training, or "". Warns where a spike of the loss begins."""
    return _not_applied(run, result, rows) or _spike_(run, result, rows)


def training_stopped(run: Run, reason: str) -> TrainingStopped:
    """The exception to raise, with the newest checkpoint in its message."""
    found = list_checkpoints(run.out)
    last = f"the newest checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
    return TrainingStopped(f"{reason}; {last}")


def _not_applied(run: Run, result: StepResult, rows: list[int]) -> str:
    if result.applied:
        return ""
    dtype, state = run.base.compute.dtype, run.state
    # With float16 a gradient that overflows is expected: the step was skipped and the loss scale
    # halved. Below 1e-4 the scale is not the cause.
    if dtype == torch.float16 and math.isfinite(result.loss) and state.loss_scale >= 1e-4:
        return ""
    what = "loss" if not math.isfinite(result.loss) else "gradient norm"
    value = result.loss if what == "loss" else result.grad_norm
    return (
        f"step {state.step}: the {what} is {value}; no weight was changed by it. Rows of the step: "
        f"{_shown(rows)}. Look at them, or lower --learning-rate and resume"
    )


def _spike_(run: Run, result: StepResult, rows: list[int]) -> str:
    """Note the loss for spike detection; why a lasting spike ends training, or "".

    A spike is a loss of more than twice the mean of the last 100 losses without spikes, and more
    than 1 above it.
    """
    state = run.state
    mean = sum(state.losses) / max(1, len(state.losses))
    if len(state.losses) < 10 or not result.loss > max(2 * mean, mean + 1):
        state.spikes = 0
        if math.isfinite(result.loss):
            state.losses = [*state.losses[-99:], result.loss]
        return ""
    state.spikes += 1
    spike = (
        f"step {state.step}: the loss is {result.loss:.4g}; the mean of {len(state.losses)} steps "
        f"before is {mean:.4g}. Rows of the step: {_shown(rows)}"
    )
    if state.spikes == 1:
        run.report.say(f"warning: {spike}")
    if state.spikes < 5 or not run.config.stop_on_loss_spike:
        return ""
    return f"{spike}. It is the fifth such step in a row: lower --learning-rate and resume"


def _shown(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:16])) + (", …" if len(rows) > 16 else "")


def trace(state: State) -> tuple[int, int]:
    """(updates applied, checksum of the trained tensors' bits), to compare before and after."""
    bits = state.trainable.buffer.view(torch.int32)
    return state.updates, int(bits.sum(dtype=torch.int64))


def check_changed(
    before: tuple[int, int], state: State, first: int, config: TrainConfig, total: int
) -> None:
    """Raises TrainingStopped if steps with a learning rate above 0 changed no trained weight.

    before: `trace` of the state that step `first` started from. Steps that float16 skipped count
    only if no step of the whole run was applied.
    """
    if config.learning_rate == 0 or not any(
        lr_factor(i, total, config) for i in range(first, total)
    ):
        return
    skipped = 0 < state.updates == before[0]
    if not skipped and trace(state)[1] == before[1]:
        raise TrainingStopped(
            f"{total - first} steps changed no trained weight ({state.updates} updates in all): "
            "the gradients are zero, or every step overflowed. Look at the rows, and at grad_norm "
            "in metrics.jsonl; with --dtype float16 try bfloat16, or more steps"
        )
