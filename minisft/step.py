"""One optimizer step: loss and gradients, then clipping and the update of the flat buffer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from minisft.batches import StepBatch
from minisft.config.train import TrainConfig
from minisft.explicit import Choice, ExplicitPass, explicit_loss_and_grads, prepare
from minisft.kernels.adamw import global_norm
from minisft.kernels.nf4 import NF4Weight
from minisft.llama import Compute, Weights
from minisft.lora import Flat, ParamGroup, viewed
from minisft.loss import loss_sum
from minisft.optim import Moments, update_


@dataclass(frozen=True)
class ExecutionPlan:
    """How gradients are computed. Loss and gradients do not depend on it, except for rounding.

    ExecutionPlan(compute) is autograd over the reference block, one micro-batch after another.
    """

    compute: Compute
    choice: Choice | None = None  # which pass, memory policies, micro-batch size; None: autograd
    explicit: ExplicitPass | None = None  # buffers of the hand-written pass, once `prepared`
    loss_scale: float = 1.0  # multiplies the loss before the backward pass (fp16)

    def prepared(self, trainable: Flat, frozen: dict[str, Tensor | NF4Weight]) -> ExecutionPlan:
        """The plan with the buffers of the hand-written pass allocated, where it was chosen.

        Rewrites `frozen`: linears that read one input become views of one tensor.
        """
        if self.choice is None or not self.choice.explicit:
            return self
        explicit = prepare(
            trainable,
            frozen,
            self.compute,
            list(self.choice.policies),
            chunk=self.choice.chunk,
            max_tokens=self.choice.tokens,
            mlp_tokens=self.choice.mlp_tokens,
        )
        return dataclasses.replace(self, explicit=explicit)


@dataclass
class State:
    """Everything that a step changes: trained tensors (float32), optimizer state, counters."""

    trainable: Flat
    moments: Moments
    step: int = 0  # optimizer steps done
    updates: int = 0  # of those, the ones applied (fp16 skips a step whose gradients overflow)
    loss_scale: float = 1.0
    good_steps: int = 0  # since the loss scale last changed
    num_tokens: int = 0  # processed so far
    total_loss: float = 0.0  # sum over steps of the step's mean loss
    best_value: float | None = None  # of --metric-for-best-model, and the step that reached it
    best_step: int = 0
    evaluations_since_best: int = 0  # for --early-stopping-patience
    unlogged: list[Sequence[float]] = field(default_factory=list)  # of steps not yet in the log
    losses: list[float] = field(default_factory=list)  # the last 100, spikes left out
    spikes: int = 0  # in a row


class StepResult(NamedTuple):
    """Token-mean loss, gradient norm before clipping, and whether the update was applied."""

    loss: float
    grad_norm: float
    applied: bool


def loss_and_grads(
    trainable: Flat, frozen: Weights, batch: StepBatch, plan: ExecutionPlan
) -> tuple[Tensor, Tensor]:
    """The token-mean loss of a step and its gradient; every pass is called from here.

    Returns (loss [] float32, flat gradient float32 [n] in the order of trainable.buffer). The mean
    is over batch.num_loss_tokens, however the step is cut into micro-batches.
    """
    if plan.explicit is not None:
        return explicit_loss_and_grads(plan.explicit, trainable, batch, plan.loss_scale)
    grads = viewed(torch.zeros_like(trainable.buffer), trainable.shapes)
    leaves = {}
    for name, view in trainable.views.items():
        leaves[name] = view.detach().requires_grad_()
        # backward() adds to an existing .grad in place: the gradients of all tensors land in one
        # flat buffer, and micro-batches accumulate without a copy.
        leaves[name].grad = grads.views[name]
    total = torch.zeros((), dtype=torch.float32, device=trainable.buffer.device)
    weight = plan.loss_scale / max(1, batch.num_loss_tokens)
    for micro in batch.micro_batches:
        # Without a target the loss is a constant 0, which has no backward pass.
        if micro.targets_M.numel() == 0:
            continue
        loss = loss_sum(leaves, frozen, micro, plan.compute)
        # Divided by the targets of the whole step, not of the micro-batch: a mean of micro-batch
        # means would weigh tokens of short micro-batches more.
        (loss * weight).backward()
        total += loss.detach()
    if plan.loss_scale != 1:
        grads.buffer.mul_(1 / plan.loss_scale)
    return total / max(1, batch.num_loss_tokens), grads.buffer


_GROWTH_INTERVAL, _GROWTH, _BACKOFF, INITIAL_LOSS_SCALE = 2000, 2.0, 0.5, 2.0**16


def train_step_(
    state: State,
    frozen: Weights,
    batch: StepBatch,
    plan: ExecutionPlan,
    groups: list[ParamGroup],
    config: TrainConfig,
    factor: float,
) -> StepResult:
    """Make one optimizer step on `state`, in place.

    factor: the schedule's factor on every learning rate. The update is skipped, and only the loss
    scale changes, if the loss or the gradient is not finite: with fp16 that is an overflow of the
    scaled gradient; otherwise the caller has to stop (StepResult.applied is False).
    """
    scaled = plan.compute.dtype == torch.float16
    plan = dataclasses.replace(plan, loss_scale=state.loss_scale)
    loss, grads = loss_and_grads(state.trainable, frozen, batch, plan)
    norm = global_norm(grads)
    # The step's only synchronisation with the device: two reads would wait twice.
    loss_value, norm_value = torch.stack((loss, norm)).tolist()
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
    # torch.amp.GradScaler's rule: halve after an overflow, double after 2,000 steps without one.
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
