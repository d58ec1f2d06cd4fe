"""Specification of the RMSNorm kernels in plain torch.

minisft's model is defined by nn.rms_norm, which receives a sum that is already rounded. These
functions add x, y and the LoRA update in float32 and round once, as the kernels do.

T tokens  D hidden  R rank
"""

import torch
from minisft.kernels.low_rank.reference import LowRank, add_reference
from torch import Tensor


def add_rms_norm_reference(
    x_TD: Tensor, y_TD: Tensor | None, delta: LowRank | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x + y + delta rounded once, RMSNorm of this sum, 1 / rms of this sum)."""
    if y_TD is not None:
        x_TD = (x_TD.float() + add_reference(y_TD, delta)).to(x_TD.dtype)
    x32 = x_TD.float()
    rstd = torch.rsqrt(x32.pow(2).mean(-1) + eps)
    return x_TD, normalise_reference(x_TD, weight_D, rstd), rstd


def normalise_reference(x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor) -> Tensor:
    """Return weight * (x * rstd rounded to x's dtype), which rounds where transformers does."""
    return weight_D.to(x_TD.dtype) * (x_TD.float() * rstd_T.unsqueeze(1)).to(x_TD.dtype)


def rms_norm_backward_reference(
    dh_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, dresidual_TD: Tensor | None
) -> Tensor:
    """Return dx = (g - n * mean(g * n)) * rstd + dresidual with g = dh * weight, n = x * rstd."""
    rstd = rstd_T.unsqueeze(1)
    g = dh_TD.float() * weight_D.float()
    n = x_TD.float() * rstd
    dx = (g - n * (g * n).mean(-1, keepdim=True)) * rstd
    if dresidual_TD is not None:
        dx = dx + dresidual_TD.float()
    return dx.to(x_TD.dtype)
