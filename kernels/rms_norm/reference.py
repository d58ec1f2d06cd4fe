"""Specification of the kernels in plain torch.

nn.rms_norm in minisft is the definition of the model: it normalises a sum that was rounded before
the call. Here x, y and the LoRA update are added in float32 and rounded once, as the kernel does.

T tokens  D hidden  R rank
"""

from __future__ import annotations

import torch
from minisft.kernels.low_rank.reference import LowRank, add_reference
from torch import Tensor


def add_rms_norm_reference(
    x_TD: Tensor, y_TD: Tensor | None, delta: LowRank | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x + y + delta, its RMSNorm, 1 / rms); the sum is rounded once."""
    if y_TD is not None:
        x_TD = (x_TD.float() + add_reference(y_TD, delta)).to(x_TD.dtype)
    x32 = x_TD.float()
    rstd = torch.rsqrt(x32.pow(2).mean(-1) + eps)
    return x_TD, normalise_reference(x_TD, weight_D, rstd), rstd


def normalise_reference(x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor) -> Tensor:
    """Return x * rstd, rounded to x's dtype, times weight: the roundings of transformers."""
    return weight_D.to(x_TD.dtype) * (x_TD.float() * rstd_T.unsqueeze(1)).to(x_TD.dtype)


def rms_norm_backward_reference(
    dh_TD: Tensor,
    x_TD: Tensor,
    weight_D: Tensor,
    rstd_T: Tensor,
    dresidual_TD: Tensor | None,
) -> Tensor:
    """Return dx = (g - n * mean(g * n)) / rms(x) + dresidual, g = dh * weight, n = x / rms(x)."""
    rstd = rstd_T.unsqueeze(1)
    g = dh_TD.float() * weight_D.float()
    n = x_TD.float() * rstd
    dx = (g - n * (g * n).mean(-1, keepdim=True)) * rstd
    if dresidual_TD is not None:
        dx = dx + dresidual_TD.float()
    return dx.to(x_TD.dtype)
