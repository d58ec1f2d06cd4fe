"""The definition in plain torch: decode, then three matrix products.

M rows  I inputs  O outputs  R rank
"""

from __future__ import annotations

import torch.nn.functional as F
from minisft.kernels.nf4 import NF4Weight
from minisft.kernels.nf4.reference import dequantize_reference
from torch import Tensor


def forward_reference(
    x_MI: Tensor,
    weight: NF4Weight,
    bias_O: Tensor | None,
    A_RI: Tensor | None,
    B_OR: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor | None]:
    """(y [M, O], u = x A^T [M, R] or None), rounded as PEFT rounds them."""
    y_MO = F.linear(x_MI, dequantize_reference(weight, x_MI.dtype), bias_O)
    if A_RI is None or B_OR is None:
        return y_MO, None
    u_MR = F.linear(x_MI, A_RI)
    return y_MO + F.linear(u_MR, B_OR) * scaling, u_MR


def backward_reference(
    dy_MO: Tensor,
    x_MI: Tensor,
    u_MR: Tensor | None,
    weight: NF4Weight,
    A_RI: Tensor | None,
    B_OR: Tensor | None,
    scaling: float,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB): with t = s dy B, dx = dy W + t A, dA = t^T x, dB = s dy^T u. No dW."""
    t_MR = None if B_OR is None else (dy_MO @ B_OR) * scaling
    dx_MI = None
    if need_dx:
        dx_MI = dy_MO @ dequantize_reference(weight, dy_MO.dtype)
        dx_MI = dx_MI if t_MR is None or A_RI is None else dx_MI + t_MR @ A_RI
    if t_MR is None or u_MR is None:
        return dx_MI, None, None
    return dx_MI, t_MR.T @ x_MI, (dy_MO.T @ u_MR) * scaling
