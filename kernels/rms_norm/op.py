"""Public functions: residual sum with RMSNorm, recomputation of the norm, and the gradient."""

from minisft.kernels._impl import use_triton
from minisft.kernels.low_rank import LowRank, empty_rows
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
    """Return (x + y + delta [T, D], RMSNorm * weight [T, D + rank_columns], 1 / rms float32 [T]).

    y None: normalise x alone and return x itself as the sum. Rows may be strided; columns are
    contiguous. The norm has 16-byte aligned rows; the caller fills its last `rank_columns` columns
    (LoRA's u), which are uninitialised. Statistics are float32 (arXiv:1910.07467).
    """
    T, D = x_TD.shape
    h = empty_rows(T, D + rank_columns, x_TD)
    if not use_triton(x_TD, impl):
        out, h[:, :D], rstd = add_rms_norm_reference(x_TD, y_TD, delta, weight_D, eps)
        return out, h, rstd
    from minisft.kernels.rms_norm.kernel import launch_add_rms_norm

    out, rstd = launch_add_rms_norm(x_TD, y_TD, delta, weight_D, eps, h)
    return out, h, rstd


def normalise(
    x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, *, rank_columns: int = 0, impl: str = "auto"
) -> Tensor:
    """Recompute add_rms_norm's norm [T, D + rank_columns] bit for bit from its sum x and rstd."""
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
    """Return the gradient of the norm's input, plus dresidual if given, [T, D + rank_columns].

    The last `rank_columns` columns are uninitialised; the caller fills them (LoRA's t).
    """
    T, D = x_TD.shape
    dx = empty_rows(T, D + rank_columns, x_TD)
    if not use_triton(x_TD, impl):
        dx[:, :D] = rms_norm_backward_reference(dh_TD, x_TD, weight_D, rstd_T, dresidual_TD)
        return dx
    from minisft.kernels.rms_norm.kernel import launch_rms_norm_backward

    launch_rms_norm_backward(dh_TD, x_TD, weight_D, rstd_T, dresidual_TD, dx)
    return dx
