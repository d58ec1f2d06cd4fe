"""One optimizer step: compute loss and gradients, clip, and update the flat buffer."""

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
    """The way loss and gradients are computed; different plans give equal results up to rounding.

    ExecutionPlan(compute), all else left out, runs autograd over `llama.block` per micro-batch.
    """

    compute: Compute
    choice: Choice | None = None  # which pass, memory policies, micro-batch size; None: autograd
    explicit: ExplicitPass | None = None  # buffers of the hand-written pass, once `prepared`
    loss_scale: float = 1.0  # multiplies the loss before the backward pass (fp16)

    def prepared(self, trainable: Flat, frozen: dict[str, Tensor | NF4Weight]) -> ExecutionPlan:
        """Return the plan with the buffers of the hand-written pass allocated, if it was chosen.

        Modifies `frozen`: the weights of linears with the same input become views of one tensor.
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
    """All that a training step changes: trained tensors (float32), optimizer state, counters."""

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
    """Mean loss per target, gradient norm before clipping, and whether weights were updated."""

    loss: float
    grad_norm: float
    applied: bool


def loss_and_grads(
    trainable: Flat, frozen: Weights, batch: StepBatch, plan: ExecutionPlan
) -> tuple[Tensor, Tensor]:
    """Return a step's mean loss per target and its gradient, by the pass that the plan has chosen.

    Returns (loss [] float32, flat gradient float32 [n] in the order of trainable.buffer). The mean
    is over batch.num_loss_tokens, so it does not depend on the split into micro-batches.
    """
    if plan.explicit is not None:
        return explicit_loss_and_grads(plan.explicit, trainable, batch, plan.loss_scale)
    grads = viewed(torch.zeros_like(trainable.buffer), trainable.shapes)
    leaves = {}
    for name, view in trainable.views.items():
        leaves[name] = view.detach().requires_grad_()
        # backward() adds to an existing .grad in place, so the gradients of all tensors accumulate
        # in one flat buffer without a copy.
        leaves[name].grad = grads.views[name]
    total = torch.zeros((), dtype=torch.float32, device=trainable.buffer.device)
    weight = plan.loss_scale / max(1, batch.num_loss_tokens)
    for micro in batch.micro_batches:
        # A micro-batch without targets has the constant loss 0, which has no backward pass.
        if micro.targets_M.numel() == 0:
            continue
        loss = loss_sum(leaves, frozen, micro, plan.compute)
        # Divide by the targets of the step, not of the micro-batch: a mean of micro-batch means
        # would give more weight to the tokens of small micro-batches.
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
    """Perform one optimizer step on `state`, in place.

    factor: the schedule's factor on every learning rate. If the loss or the gradient is not finite,
    the weights stay unchanged and StepResult.applied is False. In fp16 the scaled gradient has
    overflowed, and the loss scale is halved; in other dtypes the caller has to stop.
    """
    scaled = plan.compute.dtype == torch.float16
    plan = dataclasses.replace(plan, loss_scale=state.loss_scale)
    loss, grads = loss_and_grads(state.trainable, frozen, batch, plan)
    norm = global_norm(grads)
    # Read loss and norm together, so that the step waits for the device only once.
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
    # As in torch.amp.GradScaler: halve after an overflow, double after 2,000 steps without any.
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
