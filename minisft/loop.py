"""The training loop: steps, guards, signals, and the numbers of every step."""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from minisft.batches import Batches
from minisft.config import TrainConfig
from minisft.lora import groups
from minisft.model import Model
from minisft.report import Reporter
from minisft.schedules import factor_at
from minisft.step import Plan, State, StepResult, train_step_


class TrainingStopped(RuntimeError):
    """A guard ended training (a loss that is not finite): exit code 3."""


class Preempted(RuntimeError):
    """A signal ended training after a complete checkpoint was written: exit code 75."""


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """SIGTERM and SIGINT ask to stop after the current step: their names appear in the list.

    A second signal acts at once. Outside the main thread nothing is installed.
    """
    asked: list[str] = []
    previous = {}

    def handler(number, frame):
        asked.append(signal.Signals(number).name)
        for n in previous:
            signal.signal(n, signal.SIG_DFL)
        # Not print: the signal may have come inside one, and a stream does not take two at once.
        with suppress(OSError):
            os.write(2, f"{asked[0]}: stopping after this step (again: at once)\n".encode())

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread
        previous = {}
    try:
        yield asked
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def steps_(
    state: State,
    model: Model,
    batches: Batches,
    config: TrainConfig,
    total_steps: int,
    report: Reporter,
) -> Iterator[StepResult]:
    """Train from state.step to total_steps, yielding after each step; logs every logging_steps."""
    plan = Plan(model.compute)
    slices = groups({n: tuple(v.shape) for n, v in state.trainable.views.items()}, config)
    while state.step < total_steps:
        started = time.perf_counter()
        batch = batches.batch(state.step)
        factor = factor_at(state.step, total_steps, config)
        result = train_step_(state, model.frozen, batch, plan, slices, config, factor)
        _guard(result, state, batch.rows, model.compute.dtype)
        seconds = time.perf_counter() - started
        state.unlogged.append((result.loss, batch.num_tokens, batch.num_loss_tokens, seconds))
        if due(state.step, config.logging_steps, total_steps):
            rate = config.learning_rate * factor
            report.step(_step_metrics(state, result.grad_norm, batch.epoch, rate, model.device))
            state.unlogged = []
        yield result


def due(step: int, every: int, total: int) -> bool:
    """Whether something that happens every N steps, and at the end, happens after `step`."""
    return step % every == 0 or step == total


def _guard(result: StepResult, state: State, rows: list[int], dtype: torch.dtype) -> None:
    if result.applied:
        return
    if dtype == torch.float16 and math.isfinite(result.loss) and state.loss_scale >= 1e-4:
        return  # a gradient overflowed: the step was skipped and the loss scale halved
    what = "loss" if not math.isfinite(result.loss) else "gradient norm"
    value = result.loss if what == "loss" else result.grad_norm
    shown = ", ".join(map(str, rows[:16])) + (", …" if len(rows) > 16 else "")
    raise TrainingStopped(
        f"step {state.step}: the {what} is {value}; no weight was changed by it. Rows of the step: "
        f"{shown}. Look at them, lower --learning-rate, or resume from the last checkpoint"
    )


def _step_metrics(
    state: State, grad_norm: float, epoch: float, lr: float, device: torch.device
) -> dict[str, Any]:
    losses, tokens, targets, seconds = zip(*state.unlogged, strict=True)
    return {
        "step": state.step,
        "epoch": epoch,
        "loss": sum(losses) / len(losses),
        "grad_norm": grad_norm,
        "learning_rate": lr,
        "num_tokens": state.num_tokens,
        "num_loss_tokens": sum(targets),
        "tokens_per_second": sum(tokens) / sum(seconds),
        "step_time_s": sum(seconds) / len(seconds),
        "peak_memory_gib": peak_memory_gib(device),
    }


def peak_memory_gib(device: torch.device) -> float:
    """Most memory so far: allocated on the GPU, or resident of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
