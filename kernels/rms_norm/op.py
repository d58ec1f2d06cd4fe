"""The public functions: Triton on a GPU, the reference elsewhere, or as `impl` says."""

from __future__ import annotations

import torch
from minisft.kernels.low_rank.op import LowRank, empty_rows, use_triton
from minisft.kernels.rms_norm.reference import (
    add_rms_norm_reference,
    normalise_reference,
    rms_norm_backward_reference,
)
from torch import Tensor


def add_rms_norm(
    x_TD: Tensor,
    y_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    *,
    delta: LowRank | None = None,
    rank_columns: int = 0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """x + y + delta [T, D], its RMSNorm times weight [T, D + rank_columns], 1 / rms float32 [T].

    y None: the norm of x alone, and x itself is returned. Rows may be strided, columns contiguous.
    The last `rank_columns` columns of the norm are reserved for the caller and not written; its
    rows start on 16 bytes. Statistics are float32. Source of the norm: arXiv:1910.07467.
    """
    T, D = x_TD.shape
    h = empty_rows(T, D + rank_columns, x_TD)
    if not use_triton(x_TD, impl):
        out, h[:, :D], rstd = add_rms_norm_reference(x_TD, y_TD, delta, weight_D, eps)
        return out, h, rstd
    from minisft.kernels.rms_norm.kernel import launch_add_rms_norm

    rstd = torch.empty(T, dtype=torch.float32, device=x_TD.device)
    out = x_TD if y_TD is None else torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    launch_add_rms_norm(x_TD, y_TD, delta, weight_D, eps, out, h, rstd)
    return out, h, rstd


def normalise(
    x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, *, rank_columns: int = 0, impl: str = "auto"
) -> Tensor:
    """The norm again from what add_rms_norm returned, bit for bit: [T, D + rank_columns]."""
    T, D = x_TD.shape
    h = empty_rows(T, D + rank_columns, x_TD)
    if not use_triton(x_TD, impl):
        h[:, :D] = normalise_reference(x_TD, weight_D, rstd_T)
        return h
    from minisft.kernels.rms_norm.kernel import launch_normalise

    launch_normalise(x_TD, weight_D, rstd_T, h)
    return h


def rms_norm_backward(
    dh_TD: Tensor,
    x_TD: Tensor,
    weight_D: Tensor,
    rstd_T: Tensor,
    *,
    dresidual_TD: Tensor | None = None,
    rank_columns: int = 0,
    impl: str = "auto",
) -> Tensor:
    """Gradient of the norm's input plus dresidual (what comes along the residual stream).

    [T, D + rank_columns]: the last columns are reserved for the caller and not written.
    """
    T, D = x_TD.shape
    dx = empty_rows(T, D + rank_columns, x_TD)
    if not use_triton(x_TD, impl):
        dx[:, :D] = rms_norm_backward_reference(dh_TD, x_TD, weight_D, rstd_T, dresidual_TD)
        return dx
    from minisft.kernels.rms_norm.kernel import launch_rms_norm_backward

    launch_rms_norm_backward(dh_TD, x_TD, weight_D, rstd_T, dresidual_TD, dx)
    return dx
