"""The training loop: steps, guards, and the numbers of every step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from minisft.batches import Ahead, Batches
from minisft.config.train import TrainConfig
from minisft.explicit import Choice, prepare
from minisft.files.checkpoint import list_checkpoints
from minisft.files.device import peak_memory_gib
from minisft.files.load import Base
from minisft.lora import param_groups
from minisft.schedules import lr_factor
from minisft.session.report import Reporter
from minisft.step import Plan, State, StepResult, train_step_


class TrainingStopped(RuntimeError):
    """A guard ended training (a loss that is not finite, nothing learnt): exit code 3."""


def steps_(
    state: State,
    model: Base,
    batches: Batches,
    config: TrainConfig,
    total_steps: int,
    report: Reporter,
    choice: Choice,
) -> Iterator[StepResult]:
    """Train from state.step to total_steps, yielding after each step; logs every logging_steps."""
    plan = plan_of(choice, state, model)
    slices = param_groups(state.trainable.shapes, config)
    ahead = Ahead(batches, state.step, total_steps)
    while state.step < total_steps:
        started = time.perf_counter()
        batch = ahead.batch(state.step)
        factor = lr_factor(state.step, total_steps, config)
        result = train_step_(state, model.frozen, batch, plan, slices, config, factor)
        stopped = _stopped(result, state, batch.rows, model.compute.dtype)
        stopped = stopped or _spiked(result, state, batch.rows, config, report)
        seconds = time.perf_counter() - started
        state.unlogged.append((result.loss, batch.num_tokens, batch.num_loss_tokens, seconds))
        if due(state.step, config.logging_steps, total_steps) or stopped:
            rate = config.learning_rate * factor
            report.step(_step_metrics(state, result.grad_norm, batch.epoch, rate, model.device))
            state.unlogged = []
        if stopped:
            kept = list_checkpoints(Path(config.output_dir))
            last = f"the newest checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
            raise TrainingStopped(f"{stopped}; {last}")
        yield result


def plan_of(choice: Choice, state: State, model: Base) -> Plan:
    """How gradients are computed, with the buffers of the hand-written pass allocated."""
    if not choice.explicit:
        return Plan(model.compute)
    fast = prepare(
        state.trainable,
        model.frozen,
        model.compute,
        list(choice.policies),
        chunk=choice.chunk,
        max_tokens=choice.tokens,
        mlp_tokens=choice.mlp_tokens,
    )
    return Plan(model.compute, fast=fast)


def due(step: int, every: int, total: int) -> bool:
    """Whether something that happens every N steps, and at the end, happens after `step`."""
    return step % every == 0 or step == total


def _stopped(result: StepResult, state: State, rows: list[int], dtype: torch.dtype) -> str:
    """Why a step that was not applied ends training, or ""."""
    if result.applied:
        return ""
    if dtype == torch.float16 and math.isfinite(result.loss) and state.loss_scale >= 1e-4:
        return ""  # a gradient overflowed: the step was skipped and the loss scale halved
    what = "loss" if not math.isfinite(result.loss) else "gradient norm"
    value = result.loss if what == "loss" else result.grad_norm
    return (
        f"step {state.step}: the {what} is {value}; no weight was changed by it. Rows of the step: "
        f"{_shown(rows)}. Look at them, or lower --learning-rate and resume"
    )


def _spiked(
    result: StepResult, state: State, rows: list[int], config: TrainConfig, report: Reporter
) -> str:
    """Warn where a spike of the loss begins; why a lasting one ends training, or "".

    A spike: more than twice the mean of the last 100 losses that were none, and 1 above it.
    """
    mean = sum(state.losses) / max(1, len(state.losses))
    if len(state.losses) < 10 or not result.loss > max(2 * mean, mean + 1):
        state.spikes = 0
        if math.isfinite(result.loss):
            state.losses = [*state.losses[-99:], result.loss]
        return ""
    state.spikes += 1
    told = (
        f"step {state.step}: the loss is {result.loss:.4g}; the mean of {len(state.losses)} steps "
        f"before is {mean:.4g}. Rows of the step: {_shown(rows)}"
    )
    if state.spikes == 1:
        report.say(f"warning: {told}")
    if state.spikes < 5 or not config.stop_on_loss_spike:
        return ""
    return f"{told}. It is the fifth such step in a row: lower --learning-rate and resume"


def _shown(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:16])) + (", …" if len(rows) > 16 else "")


def trace(state: State) -> tuple[int, int]:
    """(updates made, a number that tells whether any bit of the trained tensors changes)."""
    bits = state.trainable.buffer.view(torch.int32)
    return state.updates, int(bits.sum(dtype=torch.int64))


def check_changed(
    before: tuple[int, int], state: State, first: int, config: TrainConfig, total: int
) -> None:
    """Raises TrainingStopped if steps with a learning rate above 0 left every weight as it was.

    before: `trace` of the state that step `first` started from. Steps that float16 skipped count
    only where no step of the whole run was applied.
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
