"""Specification in plain torch: decode the weight W, then multiply by W, A and B.

Like PEFT (and minisft/nn.py with a 16-bit weight), it rounds the products, the scaled update and
the sum to the input dtype. The kernels add the update in float32 and round once.

M rows  I inputs  O outputs  R rank
"""

from typing import NamedTuple

import torch.nn.functional as F
from minisft.kernels.nf4 import NF4Weight
from minisft.kernels.nf4.reference import dequantize_reference
from torch import Tensor


class Adapter(NamedTuple):
    """A LoRA update scaling * (x A^T) B^T; A and B contiguous, in the dtype of x."""

    A_RI: Tensor
    B_OR: Tensor
    scaling: float


def forward_reference(
    x_MI: Tensor, weight: NF4Weight, bias_O: Tensor | None, adapter: Adapter | None
) -> tuple[Tensor, Tensor | None]:
    """Return (y = x W^T + bias + scaling * u B^T [M, O], u = x A^T [M, R] or None)."""
    y_MO = F.linear(x_MI, dequantize_reference(weight, x_MI.dtype), bias_O)
    if adapter is None:
        return y_MO, None
    u_MR = F.linear(x_MI, adapter.A_RI)
    return y_MO + F.linear(u_MR, adapter.B_OR) * adapter.scaling, u_MR


def backward_reference(
    dy_MO: Tensor,
    x_MI: Tensor,
    u_MR: Tensor | None,
    weight: NF4Weight,
    adapter: Adapter | None,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dx = dy W + t A, dA = t^T x, dB = s dy^T u), where t = s dy B and s = scaling."""
    dx_MI = dy_MO @ dequantize_reference(weight, dy_MO.dtype) if need_dx else None
    if adapter is None:
        return dx_MI, None, None
    assert u_MR is not None
    t_MR = (dy_MO @ adapter.B_OR) * adapter.scaling
    dx_MI = None if dx_MI is None else dx_MI + t_MR @ adapter.A_RI
    return dx_MI, t_MR.T @ x_MI, (dy_MO.T @ u_MR) * adapter.scaling
