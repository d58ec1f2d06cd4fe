"""Adafactor (arXiv:1804.04235): second moments of a matrix as means over its rows and columns.

No first moment, and the run's own learning rate instead of the paper's relative step: what Hugging
Face Trainer makes of --optim adafactor (scale_parameter and relative_step off).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from minisft.kernels.adamw import global_norm


def moment_shapes(shape: torch.Size) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the float32 moments of a tensor of that shape."""
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
    """One step in place on p and its moments (names and shapes as in `moment_shapes`).

    p, g: float32, one tensor in its own shape. step counts from 1. Weight decay is decoupled.
    """
    beta2 = 1.0 - step**-0.8
    square = g.square().add_(1e-30)
    if p.dim() == 2:
        row, col = moments["exp_avg_sq_row"], moments["exp_avg_sq_col"]
        row.lerp_(square.mean(1), 1 - beta2)
        col.lerp_(square.mean(0), 1 - beta2)
        # 1 / sqrt(row col / mean(row)), the rank-1 estimate of the second moment, as two factors.
        update = g * (row / row.mean()).rsqrt().unsqueeze(1) * col.rsqrt()
    else:
        update = g * moments["exp_avg_sq"].lerp_(square, 1 - beta2).rsqrt()
    # There is no first moment to average out a large gradient, so the update itself is clipped.
    rms = global_norm(update.flatten()) / math.sqrt(p.numel())
    update.div_(rms.clamp(min=1.0))
    p.mul_(1 - learning_rate * weight_decay).sub_(update, alpha=learning_rate)
