"""Public functions: narrow matmuls, sums over tokens, and the memory layout of LoRA's columns."""

from collections.abc import Sequence

import torch
from minisft.kernels._impl import use_triton
from minisft.kernels.low_rank.reference import (
    narrow_products_reference,
    outer_sum_reference,
    reduce_partials_reference,
)
from torch import Tensor

# With at least this many rows, blocks of 64 rows occupy every multiprocessor.
MANY_ROWS = 8192


def row_stride(width: int) -> int:
    """Return the row stride of `empty_rows` in elements: width rounded up to a multiple of 8."""
    # 8 elements of half precision are 16 bytes
    return -(-width // 8) * 8


def empty_rows(rows: int, width: int, like: Tensor) -> Tensor:
    """Return an uninitialised tensor [rows, width] whose rows are 16-byte aligned.

    dtype and device are those of `like`. Contiguous rows would be misaligned if `width` includes
    an adapter rank that is not a multiple of 8.
    """
    # flash attention reads q, k and v in 16-byte words without checking (`misaligned address`), and
    # matrix products are slower on unaligned rows
    out = torch.empty((rows, row_stride(width)), dtype=like.dtype, device=like.device)
    return out[:, :width]


def as_one_stack(Bs: Sequence[Tensor | None]) -> Tensor | None:
    """Return matrices [O_j, R] that are adjacent in one storage as a single [sum O_j, R] view.

    Returns None if there are none or more than three, one is None, or they are not adjacent.
    """
    there = [B for B in Bs if B is not None]
    if not there or len(there) != len(Bs) or len(there) > 3:
        return None
    first, R, at = there[0], there[0].shape[1], there[0].storage_offset()
    for B in there:
        # adjacent addresses are not sufficient: a view must stay within one storage
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
    """Write out = [x_1 M_1, x_2 M_2, ...], LoRA's t = dy B for linears with concatenated outputs.

    x [T, N]: x_j is its next sizes[j] columns; others are not read. rights: M_j [sizes[j], R_j]
    with any strides; a None contributes no columns to out. out [T, sum of R_j]: overwritten. x and
    out have contiguous columns. impl: "triton", "reference" (cuBLAS, one product each) or "auto",
    which takes Triton where it is faster. One launch needs one to three matrices of one rank up to
    64 that are adjacent in memory. Raises ValueError if shapes do not match.
    """
    columns = sum(right.shape[1] for right in rights if right is not None)
    pairs = zip(sizes, rights, strict=True)
    rows = [size if right is None else right.shape[0] for size, right in pairs]
    if rows != list(sizes) or sum(sizes) > x_TN.shape[1] or out_TR.shape[1] != columns:
        raise ValueError(
            f"narrow_products: x {tuple(x_TN.shape)}, matrices of {rows} rows and {columns} "
            f"columns, sizes {tuple(sizes)} and out {tuple(out_TR.shape)} do not match"
        )
    matrix = as_one_stack(rights)
    # measured (README.md): below MANY_ROWS cuBLAS is as fast for one matrix
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
    """Write partials[s] = sum of outer products left[t] x[t]^T over split s (LoRA's dA or dB).

    left [T, R], x [T, N]: one dtype, contiguous columns. row_scale (float32) and column_scale scale
    the rows and columns of x. partials: float32 [S, R, N], any strides, overwritten. The order of
    summation is fixed: same bits in every run. Raises ValueError on mismatched shapes.
    """
    R, N = partials_SRN.shape[1:]
    if left_TR.shape[1] != R or x_TN.shape != (left_TR.shape[0], N):
        raise ValueError(
            f"outer_sum: left {tuple(left_TR.shape)}, x {tuple(x_TN.shape)} and partials "
            f"{tuple(partials_SRN.shape)} do not match [T, R], [T, N], [S, R, N]"
        )
    if not use_triton(x_TN, impl):
        outer_sum_reference(left_TR, x_TN, row_scale_T, column_scale_N, partials_SRN)
        return
    from minisft.kernels.low_rank.kernel import launch_outer_sum

    launch_outer_sum(left_TR, x_TN, row_scale_T, column_scale_N, partials_SRN)


def place_block_diagonal(
    Bs: Sequence[Tensor | None], sizes: Sequence[int], scale: float, out: Tensor
) -> None:
    """Write out [O, R] = scale * block_diag(B_1, ...); B_j: [sizes[j], R_j] or None (R_j = 0)."""
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
    """Add scale * (sum of partials over S) to grads; float32 [S, n] (rows contiguous) and [n]."""
    if not use_triton(grads_n, impl):
        reduce_partials_reference(partials_Sn, grads_n, scale)
        return
    from minisft.kernels.low_rank.kernel import launch_reduce_partials

    launch_reduce_partials(partials_Sn, grads_n, scale)
