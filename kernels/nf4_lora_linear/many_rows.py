"""Triton kernels for many rows: a matmul with the decoded weight that includes the LoRA update.

Each output tile starts as scaling * left @ right (inner dimension: the rank). The large product is
added in registers, so the LoRA update is never stored. The kernel is persistent and loads tiles by
the tensor memory accelerator (TMA).

Backward takes five launches. Programmatic dependent launch (PDL) lets two of them overlap with
their predecessor: the decode overlaps with from_dy_kernel, with which it shares no memory;
parts_of_dA_kernel overlaps with product_kernel, on multiprocessors that the latter leaves idle.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from minisft.kernels._triton import (
    num_sms,
    padded_rank,
    pdl_option,
    rows_per_split,
    shared_memory,
    wait_at_the_end,
)
from minisft.kernels.low_rank import LowRank
from minisft.kernels.nf4 import dequantize
from minisft.kernels.nf4.kernel import launch_dequantize
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def product_kernel(
    x, w, y, left_ptr, left_stride, right_ptr, right_stride_r, right_stride_n, scaling, M, N, K,
    R: tl.constexpr, W_IS_NK: tl.constexpr, PDL: tl.constexpr, FOLLOWED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write y = scaling * left @ right + x @ w; x, w, y: TMA descriptors; W_IS_NK: w is [N, K]."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    # only after the wait, when t is complete and all earlier kernels have ended (`pdl_option`)
    if FOLLOWED:
        tl.extra.cuda.gdc_launch_dependents()
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0)):
        # visit tiles in groups of GROUP row blocks, so that concurrent programs share data in L2
        group = tile // (GROUP * blocks_n)
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
    x, column, left_ptr, left_stride, first, last, N, parts_ptr,
    R: tl.constexpr, RP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Write parts[n, r] = sum of x[row, n] left[row, r] over rows first to last; BLOCK_N columns n.

    n starts at `column`. x: a TMA descriptor. first, last: multiples of BLOCK_T; last may be M.
    """
    # x is the left operand: the tensor cores then read it from shared memory
    r = tl.arange(0, RP)
    total = tl.zeros((BLOCK_N, RP), tl.float32)
    for start in tl.range(first, last, BLOCK_T, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_T)
        left = tl.load(
            left_ptr + rows.to(tl.int64)[:, None] * left_stride + r[None, :],
            mask=(rows < last)[:, None] & (r < R)[None, :],
            other=0.0,
        )
        total = tl.dot(x.load([start, column]).T, left, total, input_precision="ieee")
    cols = column + tl.arange(0, BLOCK_N)
    at = parts_ptr + cols.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(at, total, mask=(cols < N)[:, None] & (r < R)[None, :])


@triton.jit
def from_dy_kernel(
    dy, B_ptr, t_ptr, u_ptr, u_stride, parts_ptr, M, O, rows_of_split,
    R: tl.constexpr, RP: tl.constexpr, PDL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write t = dy B (BLOCK_T rows per program) or parts[split] [O, R] of dy^T u (BLOCK_N columns).

    The programs of a split run at the same time, so that they share its rows of dy in the cache.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for_t = rows_of_split // BLOCK_T
    each = for_t + tl.cdiv(O, BLOCK_N)
    split, i = tl.program_id(0) // each, tl.program_id(0) % each
    first = split * rows_of_split
    if i < for_t:
        first += i * BLOCK_T
        rows, r = first + tl.arange(0, BLOCK_T), tl.arange(0, RP)
        total = tl.zeros((BLOCK_T, RP), tl.float32)
        for start in tl.range(0, O, BLOCK_N, num_stages=STAGES):
            cols = start + tl.arange(0, BLOCK_N)
            right = tl.load(
                B_ptr + cols.to(tl.int64)[:, None] * R + r[None, :],
                mask=(cols < O)[:, None] & (r < R)[None, :],
                other=0.0,
            )
            total = tl.dot(dy.load([first, start]), right, total, input_precision="ieee")
        at = t_ptr + rows.to(tl.int64)[:, None] * R + r[None, :]
        total = total.to(t_ptr.dtype.element_ty)
        tl.store(at, total, mask=(rows < M)[:, None] & (r < R)[None, :])
    else:
        _store_sum(
            dy, (i - for_t) * BLOCK_N, u_ptr, u_stride, first, tl.minimum(first + rows_of_split, M),
            O, parts_ptr + split.to(tl.int64) * O * R, R, RP, BLOCK_T, BLOCK_N, STAGES,
        )  # fmt: skip


@triton.jit
def parts_of_dA_kernel(
    x, t_ptr, parts_ptr, M, I, large, small,
    R: tl.constexpr, RP: tl.constexpr, PDL: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write parts[split] [I, R] of x^T t; LARGE splits have `large` rows, later splits `small`."""
    # no wait at the start: product_kernel starts this kernel after t is complete, and this kernel
    # does not read what product_kernel writes
    blocks = tl.cdiv(I, BLOCK_N)
    block, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    first = tl.minimum(split, LARGE) * large + tl.maximum(split - LARGE, 0) * small
    last = tl.minimum(first + tl.where(split < LARGE, large, small), M)
    _store_sum(
        x, block * BLOCK_N, t_ptr, R, first, last, I, parts_ptr + split.to(tl.int64) * I * R,
        R, RP, BLOCK_T, BLOCK_N, STAGES,
    )  # fmt: skip
    if PDL:
        wait_at_the_end()


@triton.jit
def _sum_of_parts(
    parts_ptr, N, block, scaling, PARTS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return (scaling * sum over PARTS, row indices n, mask) for BLOCK_N rows of [PARTS, N, R]."""
    n, r = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, RP)
    ok = (n < N)[:, None] & (r < R)[None, :]
    at = parts_ptr + n.to(tl.int64)[:, None] * R + r[None, :]
    total = tl.zeros((BLOCK_N, RP), tl.float32)
    # static_range unrolls the loop, so that all loads are issued before the first one is used
    for part in tl.static_range(PARTS):
        total += tl.load(at + part * N.to(tl.int64) * R, mask=ok, other=0.0)
    return scaling * total, n, ok


@triton.jit
def add_parts_kernel(
    parts_A_ptr, parts_B_ptr, dA_ptr, dB_ptr, I, O, scaling, PARTS_A: tl.constexpr,
    PARTS_B: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write dA [R, I] and dB [O, R], each scaling times the sum of its parts, added in order."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    blocks, r = tl.cdiv(I, BLOCK_N), tl.arange(0, RP)
    if tl.program_id(0) < blocks:
        total, n, ok = _sum_of_parts(
            parts_A_ptr, I, tl.program_id(0), scaling, PARTS_A, R, RP, BLOCK_N
        )
        at = dA_ptr + r.to(tl.int64)[None, :] * I + n[:, None]
        tl.store(at, total.to(dA_ptr.dtype.element_ty), mask=ok)
    else:
        total, n, ok = _sum_of_parts(
            parts_B_ptr, O, tl.program_id(0) - blocks, scaling, PARTS_B, R, RP, BLOCK_N
        )
        at = dB_ptr + n.to(tl.int64)[:, None] * R + r[None, :]
        tl.store(at, total.to(dB_ptr.dtype.element_ty), mask=ok)


# BLOCK_M, BLOCK_N, BLOCK_K of product_kernel. 256 x 128 is within 3 %, 128 x 128 35 % slower.
BLOCKS = (128, 256, 64)
# Rows per loop step of `_store_sum`, and rows of t per program of from_dy_kernel.
BLOCK_T = 64
# Number of large splits of dA, which idle multiprocessors finish while product_kernel runs.
LARGE = 3
# Rows of dA^T or dB per program of add_parts_kernel.
ADDED = 16


def supports(x, weight, rank: int) -> bool:
    """Return True if these kernels apply: at least one row, rank 1 to 256, 16-byte aligned rows.

    A GPU also needs half precision, PDL and an H100's shared memory (capability 9.0 or 10.0).
    """
    whole = _aligned(x) and all(n * x.element_size() % 16 == 0 for n in weight.shape)
    able = pdl_option(x.device) and shared_memory(x.device) >= 227 << 10 and x.element_size() == 2
    return whole and (not x.is_cuda or bool(able)) and 0 < rank <= 256 and x.shape[0] > 0


def _aligned(x) -> bool:
    """Return True if every row of x is 16-byte aligned, which TMA requires."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def is_fastest(x, columns: int, rank: int) -> bool:
    """Return True if product_kernel beats cuBLAS for a result [M, columns] (see README.md)."""
    tiles = triton.cdiv(x.shape[0], BLOCKS[0]) * triton.cdiv(columns, BLOCKS[1])
    sms = num_sms(x.device)
    # tiles must fill 90 % of their waves: otherwise the smaller tiles of cuBLAS are faster
    return rank <= 64 and tiles >= 0.9 * triton.cdiv(tiles, sms) * sms


class Splits(NamedTuple):
    """How sums over rows are split: equally for dB; LARGE large splits, then small, for dA."""

    for_dB: int
    rows: int  # per split of dB
    for_dA: int
    large: int  # rows per large split of dA
    small: int


def splits_of(M: int, blocks: int, padded: int) -> Splits:
    """Return the splits for M rows, a dy with `blocks` blocks of columns, and a padded rank."""
    # every split writes its parts to memory: use fewer splits if there are more columns
    for_dB = max(1, min(max(4, M // 1024), 16, 256 // blocks))
    # only powers of two: the number is a constexpr, so every value compiles another kernel
    for_dB = 1 << (for_dB.bit_length() - 1)
    # small splits divide the last quarter of the rows, so that little work is left when the product
    # ends; equal splits take 2 to 3 us more
    large, small_ones = M // 4 // BLOCK_T * BLOCK_T, max(1, 128 // padded)
    small = rows_per_split(M - LARGE * large, small_ones)
    return Splits(for_dB, rows_per_split(M, for_dB), LARGE + small_ones, large, small)


def forward(x, weight, bias, adapter):
    """Return (y [M, O], u [M, R]); arguments as in `op.forward`."""
    A, B, scaling = adapter
    u, w = x @ A.T, dequantize(weight, x.dtype, pdl=True)
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    _launch_product(x, w, y, LowRank(u, B.T, scaling), w_is_nk=True, followed=False)
    return (y if bias is None else y.add_(bias)), u


def backward(dy, x, u, weight, adapter):
    """Return (dx [M, I], dA [R, I], dB [O, R]); arguments as in `op.backward`."""
    A, B, scaling = adapter
    x, B = x if _aligned(x) else x.clone(memory_format=torch.contiguous_format), B.contiguous()
    (M, O), I, R = dy.shape, x.shape[1], A.shape[0]
    overlap, padded = pdl_option(dy.device), padded_rank(R)
    columns = 128 if padded <= 64 else 64
    splits = splits_of(M, triton.cdiv(O, columns), padded)
    empty = functools.partial(torch.empty, device=dy.device)
    # allocate before the first launch, which waits: in deterministic mode torch launches kernels
    # that fill new memory, and some launches below do not wait for their predecessor
    t, w, dx, dA, dB = (
        empty(shape, dtype=dy.dtype) for shape in ((M, R), (O, I), (M, I), (R, I), (O, R))
    )
    parts_A = empty((splits.for_dA, I, R), dtype=torch.float32)
    parts_B = empty((splits.for_dB, O, R), dtype=torch.float32)

    shared = {"R": R, "RP": padded, "PDL": bool(overlap), "num_warps": 4, **overlap}
    tiles = {"BLOCK_T": BLOCK_T, "BLOCK_N": columns, "STAGES": 4}
    describe = functools.partial(TensorDescriptor.from_tensor, block_shape=[BLOCK_T, columns])
    from_dy_kernel[(splits.for_dB * (splits.rows // BLOCK_T + triton.cdiv(O, columns)),)](
        describe(dy), B, t, u, u.stride(0), parts_B, M, O, splits.rows, **tiles, **shared
    )
    launch_dequantize(weight, w, pdl=True, wait_last=True)
    _launch_product(dy, w, dx, LowRank(t, A, scaling), w_is_nk=False, followed=True)
    parts_of_dA_kernel[(splits.for_dA * triton.cdiv(I, columns),)](
        describe(x), t, parts_A, M, I, splits.large, splits.small, LARGE=LARGE, **tiles, **shared
    )
    add_parts_kernel[(triton.cdiv(I, ADDED) + triton.cdiv(O, ADDED),)](
        parts_A, parts_B, dA, dB, I, O, scaling, PARTS_A=splits.for_dA, PARTS_B=splits.for_dB,
        BLOCK_N=ADDED, **shared,
    )  # fmt: skip
    return dx, dA, dB


def _launch_product(x, w, y, update: LowRank, *, w_is_nk: bool, followed: bool) -> None:
    """Write y = update + x [M, K] @ w; w is [K, N] or, if w_is_nk, [N, K].

    x and w: contiguous, 16-byte aligned rows. followed: the next kernel may start before this one
    ends, once all kernels before this one have ended (programmatic dependent launch).
    """
    left, right, scaling = update
    (M, K), N, R = x.shape, right.shape[1], left.shape[1]
    block_m, block_n, block_k = BLOCKS
    tiles = triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
    # the fewest programs that need no more waves: the other multiprocessors are free for dA
    programs = triton.cdiv(tiles, triton.cdiv(tiles, num_sms(x.device)))
    overlap = pdl_option(x.device)
    product_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [block_m, block_k]),
        TensorDescriptor.from_tensor(w, [block_n, block_k] if w_is_nk else [block_k, block_n]),
        TensorDescriptor.from_tensor(y, [block_m, block_n]),
        left, left.stride(0), right, *right.stride(), scaling, M, N, K,
        R=R, W_IS_NK=w_is_nk, PDL=bool(overlap), FOLLOWED=followed and bool(overlap),
        GROUP=8, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=8, num_stages=3,
        **overlap,
    )  # fmt: skip
