"""Checks before a run writes anything, and guards that stop training when it goes wrong."""

import math
import shutil

import torch

from minisft.config.errors import UserError
from minisft.files.checkpoint import list_checkpoints
from minisft.files.disk import existing
from minisft.schedules import lr_factor
from minisft.session.context import Run
from minisft.session.evaluate import eval_prompts, read_before
from minisft.session.report import say
from minisft.step import State, StepResult
from minisft.variants.pissa import is_pair


class TrainingStopped(RuntimeError):
    """A guard stopped training: non-finite loss, loss spike, or no weight changed. Exit code 3."""


def check_run(run: Run) -> None:
    """Raises UserError if evaluation would fail or the disk is too full for the results."""
    if run.data.eval is not None:
        eval_prompts(run.data.eval, run.config.eval_generate)
        read_before(run)
    trained, lora = run.state.trainable, run.base.lora
    # A checkpoint holds the tensors and two moments, the result the tensors again: 4 x float32.
    need = 4 * 4 * trained.buffer.numel()
    # With PiSSA and OLoRA, checkpoint and result also store the initial A and B.
    if lora and lora.splits_weights:
        need += 4 * 2 * sum(math.prod(s) for n, s in trained.shapes.items() if is_pair(n))
    free = shutil.disk_usage(existing(run.out)).free
    if free < need:
        raise UserError(
            f"--output-dir {run.out} has {free / 2**30:.2f} GiB free; one checkpoint and the "
            f"result need {need / 2**30:.2f} GiB: free some space or choose another directory"
        )


def reason_to_stop(run: Run, result: StepResult, rows: list[int]) -> str:
    """Returns why training must stop after this step, or "". rows: row numbers of the step."""
    shown = ", ".join(map(str, rows[:16])) + (", …" if len(rows) > 16 else "")
    reason = _not_applied(run, result, shown) or _spike_(run, result, shown)
    if not reason:
        return ""
    found = list_checkpoints(run.out)
    last = f"the newest checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
    return f"{reason}; {last}"


def _not_applied(run: Run, result: StepResult, rows: str) -> str:
    if result.applied:
        return ""
    dtype, state, finite = run.base.compute.dtype, run.state, math.isfinite(result.loss)
    # In float16, gradients may overflow: the step is skipped and the loss scale halved. If that
    # happens with a scale below 1e-4, the scale is not the cause, so training stops.
    if finite and dtype == torch.float16 and state.loss_scale >= 1e-4:
        return ""
    what = f"gradient norm is {result.grad_norm}" if finite else f"loss is {result.loss}"
    return (
        f"step {state.step}: the {what}; the step changed no weight. Rows of the step: {rows}. "
        "Inspect them, or lower --learning-rate and resume"
    )


def _spike_(run: Run, result: StepResult, rows: str) -> str:
    """Record a step's loss and warn of a spike; returns why spikes must stop training, or "".

    A spike is a loss above twice the mean of the last 100 losses (spikes excluded) and more than 1
    above that mean. With --stop-on-loss-spike, five spikes in a row stop training.
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
        f"step {state.step}: the loss is {result.loss:.4g}; the mean of the previous "
        f"{len(state.losses)} steps is {mean:.4g}. Rows of the step: {rows}"
    )
    if state.spikes == 1:
        say(f"warning: {spike}")
    if state.spikes < 5 or not run.config.stop_on_loss_spike:
        return ""
    return f"{spike}. This is the fifth such step in a row: lower --learning-rate and resume"


def trace(state: State) -> tuple[int, int]:
    """Returns (updates applied, checksum of the trained tensors' bits), for `check_changed`."""
    # Sum the bits: detects changes without storing a second copy of the tensors.
    bits = state.trainable.buffer.view(torch.int32)
    return state.updates, int(bits.sum(dtype=torch.int64))


def check_changed(run: Run, first: int, before: tuple[int, int]) -> None:
    """Raises TrainingStopped if no trained weight changed despite a learning rate above 0.

    before: the result of `trace` before step `first`, the first step of this process.
    """
    state, config, total = run.state, run.config, run.state.step
    if not any(config.learning_rate * lr_factor(i, total, config) for i in range(first, total)):
        return
    # float16 may have skipped every step of this process. That is an error only if the processes
    # before it applied no step either.
    skipped = 0 < state.updates == before[0]
    if not skipped and trace(state)[1] == before[1]:
        raise TrainingStopped(
            f"{total - first} steps changed no trained weight ({state.updates} updates in all): "
            "the gradients are zero, or every step overflowed. Inspect the rows, and grad_norm in "
            "metrics.jsonl; with --dtype float16 try bfloat16, or more steps"
        )
