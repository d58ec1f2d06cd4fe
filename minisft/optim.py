"""AdamW, clipping and learning-rate schedules over flat buffers, written out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minisft.config import TrainConfig
from minisft.lora import Group


def grad_norm(grads: Tensor) -> Tensor:
    """Global L2 norm of the flat gradient, [] float32."""
    return torch.linalg.vector_norm(grads)


def clip_(grads: Tensor, norm: Tensor, max_norm: float) -> None:
    """Scale the gradient so that its norm is at most max_norm; max_norm 0 leaves it as it is.

    The factor is max_norm / (norm + 1e-6), at most 1, as torch.nn.utils.clip_grad_norm_ has it.
    """
    if max_norm > 0:
        grads.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))


def adamw_(
    params: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    groups: list[Group],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step in place (arXiv:1711.05101), torch.optim.AdamW's arithmetic.

    All four buffers: float32 [n]. step counts from 1. Decay is decoupled and scaled by lr; groups
    say which slices are decayed.
    """
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    if weight_decay:
        for group in groups:
            if group.decayed:
                params[group.start : group.stop].mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grads, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grads, grads, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(correction2)).add_(eps)
    params.addcdiv_(exp_avg, denominator, value=-lr / correction1)


def warmup_steps(config: TrainConfig, total: int) -> int:
    """--warmup-steps as a number of steps: below 1 it is a share of the total, rounded up."""
    asked = config.warmup_steps
    return math.ceil(asked * total) if asked < 1 else int(asked)


def lr_at(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate that step (from 0) uses: transformers' schedules, warm-up from 0.

    linear: down to 0 at `total`; cosine: half a period down to 0; constant: flat after warm-up.
    """
    warmup = warmup_steps(config, total)
    kind, peak = config.lr_scheduler_type, config.learning_rate
    if step < warmup:
        return peak * (step / max(1, warmup)) if kind != "constant" else peak
    if kind in ("constant", "constant_with_warmup"):
        return peak
    if kind == "linear":
        return peak * max(0.0, (total - step) / max(1, total - warmup))
    progress = (step - warmup) / max(1, total - warmup)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress)))
