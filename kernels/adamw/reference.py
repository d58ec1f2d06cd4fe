"""The definition, in plain torch: the norm of a flat gradient, and clipping with AdamW."""

from __future__ import annotations

import torch
from torch import Tensor


def global_norm_reference(grads_n: Tensor) -> Tensor:
    """L2 norm, [] float32, to its last bits.

    By rows first: a sum of 10^8 squares in float32 would be off by a hundredth on a CPU.
    """
    whole = grads_n.numel() - grads_n.numel() % 4096
    rows = torch.linalg.vector_norm(grads_n[:whole].view(-1, 4096), dim=1)
    parts = torch.cat((rows, grads_n[whole:])).double()
    return torch.linalg.vector_norm(parts).float()


def adamw_reference_(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, learning_rate: float, beta1: float,
    beta2: float, eps: float, weight_decay: float, norm: Tensor | None, max_norm: float,
) -> None:  # fmt: skip
    """AdamW (arXiv:1711.05101) on the gradient scaled to a norm of at most max_norm."""
    if norm is not None:
        g = g * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    change = p * (learning_rate * weight_decay)
    p.sub_(change.addcdiv_(m, root, value=learning_rate / (1 - beta1**step)))
