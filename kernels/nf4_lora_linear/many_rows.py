"""Triton: for many rows, the product with a decoded weight that begins with LoRA's update.

A tile of the result starts as scaling * left @ right, one product of the rank, and the large
product is added to it in registers: the update is neither written nor read. Tiles come through
the tensor memory accelerator, and each program walks over several of them.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.low_rank.kernel import (
    overlapping,
    padded_rank,
    processors,
    rows_per_split,
    shared_memory,
    sum_over_rows,
)


@triton.jit
def product_kernel(
    x, w, y, left_ptr, left_stride, right_ptr, right_stride_r, right_stride_n, scaling, M, N, K,
    R: tl.constexpr, W_IS_NK: tl.constexpr, EARLY: tl.constexpr,
    PROGRAMS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = scaling * left @ right + x @ w; x, w, y are descriptors. W_IS_NK: w holds w^T."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), blocks_m * blocks_n, PROGRAMS):
        group = tile // (GROUP * blocks_n)  # neighbours in time share rows and columns in the cache
        size = tl.minimum(blocks_m - group * GROUP, GROUP)
        m = (group * GROUP + tile % (GROUP * blocks_n) % size) * BLOCK_M
        n = tile % (GROUP * blocks_n) // size * BLOCK_N
        rows, cols = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in tl.range(0, R, 16, num_stages=1):
            r = start + tl.arange(0, 16)
            left = tl.load(
                left_ptr + rows.to(tl.int64)[:, None] * left_stride + r[None, :],
                mask=(rows < M)[:, None] & (r < R)[None, :],
                other=0.0,
            )
            right = tl.load(
                right_ptr + r[:, None] * right_stride_r + cols[None, :] * right_stride_n,
                mask=(r < R)[:, None] & (cols < N)[None, :],
                other=0.0,
            )
            total = tl.dot(left, right, total, input_precision="ieee")
        total *= scaling
        for k in range(0, K, BLOCK_K):
            x_tile = x.load([m, k])
            if W_IS_NK:
                total = tl.dot(x_tile, w.load([n, k]).T, total, input_precision="ieee")
            else:
                total = tl.dot(x_tile, w.load([k, n]), total, input_precision="ieee")
        y.store([m, n], total.to(y.dtype))


@triton.jit
def _store_sum(
    left_ptr, left_stride, x_ptr, x_stride, N, column, first, last, parts_ptr,
    R: tl.constexpr, RP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """parts[n, r] = sum over rows first to last of x[row, n] left[row, r], from `column` on."""
    cols, r = column + tl.arange(0, BLOCK_N), tl.arange(0, RP)
    total = sum_over_rows(
        left_ptr, left_stride, x_ptr, x_stride, left_ptr, cols, cols < N, first, last,
        R, RP, False, BLOCK_T, BLOCK_N, STAGES,
    )  # fmt: skip
    at = parts_ptr + cols.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(at, total, mask=(cols < N)[:, None] & (r < R)[None, :])


@triton.jit
def sums_kernel(
    t_ptr, t_stride, x_ptr, x_stride, u_ptr, u_stride, dy_ptr, dy_stride, parts_ptr, M, I, O,
    rows_per_split, R: tl.constexpr, RP: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """parts[split] [I + O, R]: x^T t, and below it dy^T u, over the split's rows."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    blocks = tl.cdiv(I, BLOCK_N)
    first = tl.program_id(1) * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    parts_ptr += tl.program_id(1).to(tl.int64) * (I + O) * R
    if tl.program_id(0) < blocks:
        _store_sum(
            t_ptr, t_stride, x_ptr, x_stride, I, tl.program_id(0) * BLOCK_N, first, last,
            parts_ptr, R, RP, BLOCK_T, BLOCK_N, STAGES,
        )  # fmt: skip
    else:
        _store_sum(
            u_ptr, u_stride, dy_ptr, dy_stride, O, (tl.program_id(0) - blocks) * BLOCK_N, first,
            last, parts_ptr + I * R, R, RP, BLOCK_T, BLOCK_N, STAGES,
        )  # fmt: skip


@triton.jit
def add_parts_kernel(
    parts_ptr, dA_ptr, dB_ptr, I, O, scaling, SPLITS: tl.constexpr, R: tl.constexpr,
    RP: tl.constexpr, EARLY: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dA [R, I] and dB [O, R]: scaling times the parts, added in order."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    n, r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, RP)
    ok = (n < I + O)[:, None] & (r < R)[None, :]
    total = tl.zeros((BLOCK_N, RP), tl.float32)
    for split in range(SPLITS):
        at = (split * (I + O) + n).to(tl.int64)[:, None] * R + r[None, :]
        total += tl.load(parts_ptr + at, mask=ok, other=0.0)
    total = (scaling * total).to(dA_ptr.dtype.element_ty)
    tl.store(dA_ptr + r[None, :] * I + n[:, None], total, mask=ok & (n < I)[:, None])
    tl.store(dB_ptr + (n - I)[:, None] * R + r[None, :], total, mask=ok & (n >= I)[:, None])


BLOCKS = (128, 256, 64)  # rows, columns and inputs of a tile


def takes(x, weight, rank: int) -> bool:
    """Whether `product` takes them: some rows, ranks up to 256, rows of whole 16 bytes; on a GPU
    also half precision and the shared memory of an H100 (compute capability 9.0 and 10.0).
    """
    sizes = (*weight.shape, x.stride(0))
    aligned = x.data_ptr() % 16 == 0 and all(n * x.element_size() % 16 == 0 for n in sizes)
    able = overlapping(x.device) and shared_memory(x.device) >= 227 << 10 and x.element_size() == 2
    return aligned and (not x.is_cuda or bool(able)) and 0 < rank <= 256 and x.shape[0] > 0


def suits(x, columns: int) -> bool:
    """Whether `product` is the fastest way to a result of that many columns (measured: README.md).

    It is where its tiles come out as whole rounds of all processors, or nearly so.
    """
    tiles = triton.cdiv(x.shape[0], BLOCKS[0]) * triton.cdiv(columns, BLOCKS[1])
    side_by_side = processors(x.device)
    return tiles >= 0.9 * triton.cdiv(tiles, side_by_side) * side_by_side


def product(x, w, left, right, scaling, *, w_is_nk: bool):
    """scaling * left [M, R] @ right [R, N] + x [M, K] @ w, where w is [K, N] or, w_is_nk, [N, K].

    x and w: contiguous, rows of a multiple of 16 bytes.
    """
    (M, K), N, R = x.shape, right.shape[1], left.shape[1]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    block_m, block_n, block_k = BLOCKS
    tiles = triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
    programs = min(tiles, processors(x.device))
    overlap = overlapping(x.device)
    product_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [block_m, block_k]),
        TensorDescriptor.from_tensor(w, [block_n, block_k] if w_is_nk else [block_k, block_n]),
        TensorDescriptor.from_tensor(y, [block_m, block_n]),
        left, left.stride(0), right, *right.stride(), scaling, M, N, K,
        R=R, W_IS_NK=w_is_nk, EARLY=bool(overlap), PROGRAMS=programs, GROUP=8,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=8, num_stages=3,
        **overlap,
    )  # fmt: skip
    return y


def sums(t, x, u, dy, scaling):
    """(dA = scaling * t^T x [R, I], dB = scaling * dy^T u [O, R]), in the order of the splits."""
    (M, I), O, R = x.shape, dy.shape[1], t.shape[1]
    dA = torch.empty((R, I), dtype=x.dtype, device=x.device)
    dB = torch.empty((O, R), dtype=x.dtype, device=x.device)
    padded = padded_rank(R)
    block_n = 128 if padded <= 64 else 64
    blocks = triton.cdiv(I, block_n) + triton.cdiv(O, block_n)
    splits = max(1, min(8, 320 // blocks, M // 256))
    parts = torch.empty((splits, I + O, R), dtype=torch.float32, device=x.device)
    overlap = overlapping(x.device)
    sums_kernel[(blocks, splits)](
        t, t.stride(0), x, x.stride(0), u, u.stride(0), dy, dy.stride(0), parts, M, I, O,
        rows_per_split(M, splits), R=R, RP=padded, EARLY=bool(overlap), BLOCK_T=32,
        BLOCK_N=block_n, STAGES=4, num_warps=4, **overlap,
    )  # fmt: skip
    add_parts_kernel[(triton.cdiv(I + O, 64),)](
        parts, dA, dB, I, O, scaling, SPLITS=splits, R=R, RP=padded, EARLY=bool(overlap),
        BLOCK_N=64, num_warps=4, **overlap,
    )  # fmt: skip
    return dA, dB
