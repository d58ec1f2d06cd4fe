"""Adafactor (arXiv:1804.04235): second moments of a matrix as means over its rows and columns.

As in Hugging Face Trainer (scale_parameter and relative_step off), there is no first moment, and
the learning rate is that of the run instead of the paper's relative step.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from minisft.kernels.adamw import global_norm


def moment_shapes(shape: torch.Size) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the float32 moments of a tensor with the given shape."""
    if len(shape) == 2:
        return {"exp_avg_sq_row": (shape[0],), "exp_avg_sq_col": (shape[1],)}
    return {"exp_avg_sq": tuple(shape)}


def adafactor_(
    p: Tensor,
    g: Tensor,
    moments: Mapping[str, Tensor],
    step: int,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """Update p and its moments in place by one step (moments named as in `moment_shapes`).

    p, g: float32, one tensor and its gradient. step counts from 1. Weight decay is decoupled.
    """
    beta2 = 1.0 - step**-0.8
    square = g.square().add_(1e-30)
    if p.dim() == 2:
        row, col = moments["exp_avg_sq_row"], moments["exp_avg_sq_col"]
        row.lerp_(square.mean(1), 1 - beta2)
        col.lerp_(square.mean(0), 1 - beta2)
        # Multiply g by 1 / sqrt(row col / mean(row)), the inverse root of a rank-1 second moment.
        update = g * (row / row.mean()).rsqrt().unsqueeze(1) * col.rsqrt()
    else:
        update = g * moments["exp_avg_sq"].lerp_(square, 1 - beta2).rsqrt()
    # Without a first moment, nothing averages out a large gradient, so the update is clipped.
    rms = global_norm(update.flatten()) / math.sqrt(p.numel())
    update.div_(rms.clamp(min=1.0))
    p.mul_(1 - learning_rate * weight_decay).sub_(update, alpha=learning_rate)
