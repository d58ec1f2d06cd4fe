"""The public functions: Triton on a GPU, the reference elsewhere, or as `impl` says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from minisft.kernels.low_rank.reference import (
    LowRank,
    narrow_products_reference,
    outer_sum_reference,
    reduce_partials_reference,
)
from torch import Tensor

__all__ = [
    "LowRank",
    "as_one_stack",
    "empty_rows",
    "narrow_products",
    "outer_sum",
    "place_block_diagonal",
    "reduce_partials",
    "row_stride",
    "use_triton",
]  # fmt: skip


MANY_ROWS = 8192  # blocks of 64 of them keep every processor busy


def use_triton(x: Tensor, impl: str) -> bool:
    """Whether `impl` ("auto", "triton" or "reference") means Triton for this tensor."""
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl is {impl!r}; expected auto, triton or reference")
    return x.is_cuda if impl == "auto" else impl == "triton"


def row_stride(width: int) -> int:
    """Numbers from one row of `empty_rows` to the next."""
    return -(-width // 8) * 8


def empty_rows(rows: int, width: int, like: Tensor) -> Tensor:
    """[rows, width] in the dtype and on the device of `like`, not filled; rows begin on 16 bytes.

    Attention asks for that (flash attention reads elsewhere without a word), and products are
    slower without: a rank beside a matrix need not be a multiple of eight.
    """
    out = torch.empty((rows, row_stride(width)), dtype=like.dtype, device=like.device)
    return out[:, :width]


def as_one_stack(Bs: Sequence[Tensor | None]) -> Tensor | None:
    """At most three matrices [O_j, R] that follow each other in one storage, as one; else None."""
    there = [B for B in Bs if B is not None]
    if not there or len(there) != len(Bs) or len(there) > 3:
        return None
    first, R, at = there[0], there[0].shape[1], there[0].storage_offset()
    for B in there:
        same = B.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or B.storage_offset() != at or B.shape[1] != R or not B.is_contiguous():
            return None
        at += B.numel()
    return first.as_strided((sum(B.shape[0] for B in there), R), (R, 1))


def narrow_products(
    x_TN: Tensor,
    rights: Sequence[Tensor | None],
    sizes: Sequence[int],
    out_TR: Tensor,
    *,
    impl: str = "auto",
) -> None:
    """out = [x_1 M_1, x_2 M_2, ...]: t = dy B of linears side by side.

    x [T, N]: cut into columns of `sizes`, the further ones are not read. rights: M_j [size_j, R_j]
    with any strides, or None, which has no columns in out. out [T, sum of R_j]: overwritten;
    columns contiguous, as x's. One launch for two or three as_one_stack of one storage and one rank
    up to 64, and for one alone from MANY_ROWS on; else a product each, by cuBLAS, which is as fast.
    impl: "triton" also for one alone of few rows, "reference" (a product each), or "auto".
    ValueError if shapes do not fit.
    """
    columns = sum(right.shape[1] for right in rights if right is not None)
    pairs = zip(sizes, rights, strict=True)
    rows = [size if right is None else right.shape[0] for size, right in pairs]
    if rows != list(sizes) or sum(sizes) > x_TN.shape[1] or out_TR.shape[1] != columns:
        raise ValueError(
            f"narrow_products: x {tuple(x_TN.shape)}, matrices of {rows} rows and {columns} "
            f"columns, sizes {tuple(sizes)} and out {tuple(out_TR.shape)} do not fit"
        )
    matrix = as_one_stack(rights)
    alone = len(rights) == 1 and impl == "auto" and x_TN.shape[0] < MANY_ROWS
    if alone or matrix is None or matrix.shape[1] > 64 or not use_triton(x_TN, impl):
        narrow_products_reference(x_TN, rights, sizes, out_TR)
        return
    from minisft.kernels.low_rank.kernel import launch_narrow_products

    launch_narrow_products(x_TN, matrix, sizes, out_TR)


def outer_sum(
    left_TR: Tensor,
    x_TN: Tensor,
    partials_SRN: Tensor,
    *,
    row_scale_T: Tensor | None = None,
    column_scale_N: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Sums over tokens of left[t] (x) x[t], one per split of the tokens: dA and dB of a LoRA.

    left [T, R] and x [T, N]: one dtype, columns contiguous. row_scale: float32 [T]; column_scale:
    [N]. partials: float32 [S, R, N], any strides (a transposed view gives [N, R]); overwritten. The
    order of summation is fixed by S: results are the same in every run.
    """
    R, N = partials_SRN.shape[1:]
    if left_TR.shape[1] != R or x_TN.shape != (left_TR.shape[0], N):
        raise ValueError(
            f"outer_sum: left {tuple(left_TR.shape)}, x {tuple(x_TN.shape)} and partials "
            f"{tuple(partials_SRN.shape)} do not fit as [T, R], [T, N], [S, R, N]"
        )
    if not use_triton(x_TN, impl):
        outer_sum_reference(left_TR, x_TN, row_scale_T, column_scale_N, partials_SRN)
        return
    from minisft.kernels.low_rank.kernel import launch_outer_sum

    launch_outer_sum(left_TR, x_TN, row_scale_T, column_scale_N, partials_SRN)


def place_block_diagonal(
    Bs: Sequence[Tensor | None], sizes: Sequence[int], scale: float, out: Tensor
) -> None:
    """out = scale * diag(B, ...), [O, R], of linears with `sizes` rows each; None: no columns."""
    out.zero_()
    row = column = 0
    for size, B in zip(sizes, Bs, strict=True):
        if B is not None:
            torch.mul(B, scale, out=out[row : row + size, column : column + B.shape[1]])
            column += B.shape[1]
        row += size


def reduce_partials(
    partials_Sn: Tensor, grads_n: Tensor, scale: float, *, impl: str = "auto"
) -> None:
    """grads += scale * sum over the splits; float32 [S, n] (rows contiguous) and float32 [n]."""
    if not use_triton(grads_n, impl):
        reduce_partials_reference(partials_Sn, grads_n, scale)
        return
    from minisft.kernels.low_rank.kernel import launch_reduce_partials

    launch_reduce_partials(partials_Sn, grads_n, scale)
