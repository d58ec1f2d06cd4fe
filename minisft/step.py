"""One optimizer step: gradients through one door, then clip and AdamW on the flat buffers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from minisft.batches import StepBatch
from minisft.config.train import TrainConfig
from minisft.explicit import ExplicitPass, explicit_loss_and_grads
from minisft.kernels.adamw import global_norm
from minisft.llama import Compute, Weights
from minisft.lora import Flat, ParamGroup, viewed
from minisft.loss import loss_sum
from minisft.optim import Moments, update_


@dataclass(frozen=True)
class Plan:
    """How gradients are computed; loss and gradients do not depend on it but for rounding."""

    compute: Compute
    loss_scale: float = 1.0  # the loss is multiplied by it before the backward pass (fp16)
    fast: ExplicitPass | None = (
        None  # the hand-written pass, where it covers the run; else autograd
    )


@dataclass
class State:
    """All that a step changes: the trained tensors (float32), the optimizer's state, counters."""

    trainable: Flat
    moments: Moments
    step: int = 0  # optimizer steps done
    updates: int = 0  # of those, the ones applied (fp16 skips a step whose gradients overflow)
    loss_scale: float = 1.0
    good_steps: int = 0  # since the loss scale last changed
    num_tokens: int = 0  # seen so far
    total_loss: float = 0.0  # sum over steps of the step's mean loss
    best_value: float | None = None  # of --metric-for-best-model, and the step that reached it
    best_step: int = 0
    evaluations_since_best: int = 0  # for --early-stopping-patience
    unlogged: list[Sequence[float]] = field(default_factory=list)  # of steps not yet in the log
    losses: list[float] = field(default_factory=list)  # the last 100, spikes left out
    spikes: int = 0  # in a row


class StepResult(NamedTuple):
    """What a step reports: token-mean loss, norm before clipping, whether it was applied."""

    loss: float
    grad_norm: float
    applied: bool


def loss_and_grads(
    trainable: Flat, frozen: Weights, batch: StepBatch, plan: Plan
) -> tuple[Tensor, Tensor]:
    """The token-mean loss of a step and its gradient: the one door to both.

    Returns (loss [] float32, flat gradient float32 [n] in the order of trainable.buffer). The mean
    is over batch.num_loss_tokens, however the step is cut into micro-batches. By hand where the
    plan has it; else autograd over the reference block, one micro-batch after another.
    """
    if plan.fast is not None:
        return explicit_loss_and_grads(plan.fast, trainable, batch, plan.loss_scale)
    grads = viewed(torch.zeros_like(trainable.buffer), trainable.shapes)
    leaves = {}
    for name, view in trainable.views.items():
        leaves[name] = view.detach().requires_grad_()
        leaves[name].grad = grads.views[name]
    total = torch.zeros((), dtype=torch.float32, device=trainable.buffer.device)
    weight = plan.loss_scale / max(1, batch.num_loss_tokens)
    for micro in batch.micro_batches:
        if micro.targets_M.numel() == 0:
            continue  # contributes exactly nothing
        loss = loss_sum(leaves, frozen, micro, plan.compute)
        (loss * weight).backward()  # accumulates into leaf.grad, the views above
        total += loss.detach()
    if plan.loss_scale != 1:
        grads.buffer.mul_(1 / plan.loss_scale)
    return total / max(1, batch.num_loss_tokens), grads.buffer


# torch.amp.GradScaler's constants
_GROWTH_INTERVAL, _GROWTH, _BACKOFF, INITIAL_LOSS_SCALE = 2000, 2.0, 0.5, 2.0**16


def train_step_(
    state: State,
    frozen: Weights,
    batch: StepBatch,
    plan: Plan,
    groups: list[ParamGroup],
    config: TrainConfig,
    factor: float,
) -> StepResult:
    """One optimizer step on `state`, in place; factor: the schedule's, on every learning rate.

    The update is skipped, and nothing but the loss scale changes, where the loss or the gradient is
    not finite: with a loss scale (fp16) that is an overflow, else the caller's cause to stop.
    """
    scaled = plan.compute.dtype == torch.float16
    plan = dataclasses.replace(plan, loss_scale=state.loss_scale)
    loss, grads = loss_and_grads(state.trainable, frozen, batch, plan)
    norm = global_norm(grads)
    loss_value, norm_value = torch.stack((loss, norm)).tolist()  # the step's one device sync
    applied = _finite(loss_value) and _finite(norm_value)
    if applied:
        state.updates += 1
        update_(
            state.trainable,
            grads,
            state.moments,
            [group.scaled(factor) for group in groups],
            norm=norm,
            step=state.updates,
            config=config,
        )
    if scaled:
        state.good_steps = state.good_steps + 1 if applied else 0
        if not applied:
            state.loss_scale *= _BACKOFF
        elif state.good_steps == _GROWTH_INTERVAL:
            state.loss_scale, state.good_steps = state.loss_scale * _GROWTH, 0
    state.step += 1
    state.num_tokens += batch.num_tokens
    state.total_loss += loss_value
    return StepResult(loss_value, norm_value, applied)


def _finite(x: float) -> bool:
    return x == x and abs(x) != float("inf")
