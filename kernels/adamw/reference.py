"""Specification in plain torch: the norm of a flat gradient, and AdamW with clipping.

The kernel computes the same formulas; last bits can differ. On a CPU, minisft/optim.py calls
torch's fused AdamW instead of `adamw_`.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class AdamWStep(NamedTuple):
    """The step number and hyperparameters of one AdamW step."""

    step: int  # counts from 1
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    max_norm: float = 0.0  # read only if a norm to clip by is given


def global_norm_reference(grads_n: Tensor) -> Tensor:
    """Return the L2 norm of grads (float32 []), correct to the last bits."""
    # start with norms of 4096 entries: one float32 sum of 10^8 squares is off by 1 % on a CPU
    whole = grads_n.numel() - grads_n.numel() % 4096
    rows = torch.linalg.vector_norm(grads_n[:whole].view(-1, 4096), dim=1)
    parts = torch.cat((rows, grads_n[whole:])).double()
    return torch.linalg.vector_norm(parts).float()


def adamw_reference_(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, settings: AdamWStep, norm: Tensor | None
) -> None:
    """Apply one AdamW step (arXiv:1711.05101) in place; clip g to max_norm if `norm` is given."""
    step, learning_rate, beta1, beta2, eps, weight_decay, max_norm = settings
    if norm is not None:
        # torch.nn.utils.clip_grad_norm_ adds the same 1e-6
        g = g * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    change = p * (learning_rate * weight_decay)
    p.sub_(change.addcdiv_(m, root, value=learning_rate / (1 - beta1**step)))
