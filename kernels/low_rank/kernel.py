"""Triton kernels: products with narrow matrices, and sums over tokens in a fixed order."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

import triton
import triton.language as tl
from minisft.kernels._triton import padded_rank, pdl_option, rows_per_split, stages


@triton.jit
def narrow_products_kernel(
    x_ptr, x_stride, right_ptr, out_ptr, out_stride, num_rows,
    first_end, second_end, third_end, R: tl.constexpr, RP: tl.constexpr,
    PDL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_T rows of the R columns of out that hold x_j M_j, for matrix j = program_id(1).

    x_0, x_1 and x_2 are the columns of x up to first_end, second_end and third_end.
    """
    if PDL:
        # let a decode kernel launched next start early: it calls gdc_wait before it stores
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    matrix = tl.program_id(1)
    first = tl.where(matrix == 0, 0, tl.where(matrix == 1, first_end, second_end))
    last = tl.where(matrix == 0, first_end, tl.where(matrix == 1, second_end, third_end))
    row_ok = rows < num_rows
    # row * stride can exceed 2^31 in long micro-batches
    rows64 = rows.to(tl.int64)
    r = tl.arange(0, RP)
    total = tl.zeros((BLOCK_T, RP), tl.float32)
    for start in range(first, last, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        ok = cols < last
        x = tl.load(
            x_ptr + rows64[:, None] * x_stride + cols[None, :],
            mask=row_ok[:, None] & ok[None, :],
            other=0.0,
        )
        right = tl.load(
            right_ptr + cols[:, None] * R + r[None, :],
            mask=ok[:, None] & (r < R)[None, :],
            other=0.0,
        )
        # ieee: float32 inputs must not be rounded to TF32
        total = tl.dot(x, right, total, input_precision="ieee")
    at = out_ptr + rows64[:, None] * out_stride + matrix * R + r[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & (r < R)[None, :])


@triton.jit
def outer_sum_kernel(
    left_ptr, x_ptr, row_scale_ptr, column_scale_ptr, out_ptr,
    num_rows, rows_per_split, N,
    left_stride, x_stride, out_stride_s, out_stride_r, out_stride_n,
    R: tl.constexpr, RP: tl.constexpr, ROW_SCALE: tl.constexpr, COLUMN_SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the sum of outer products left[t] x[t]^T over one split, for BLOCK_N columns of x."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    col_ok = cols < N
    r = tl.arange(0, RP)
    # [BLOCK_N, RP], not [RP, BLOCK_N]: the tensor cores then read the wide operand x from shared
    # memory instead of registers (7.5 us instead of 9.2 at N = 4096)
    total = tl.zeros((BLOCK_N, RP), tl.float32)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, num_rows)
    for start in tl.range(first, last, BLOCK_T, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_T)
        ok = rows < last
        rows64 = rows.to(tl.int64)
        left = tl.load(
            left_ptr + rows64[:, None] * left_stride + r[None, :],
            mask=ok[:, None] & (r < R)[None, :],
            other=0.0,
        )
        if ROW_SCALE:
            # scale `left` instead of x: it has R columns instead of N
            scale = tl.load(row_scale_ptr + rows, mask=ok, other=0.0)
            left = (left.to(tl.float32) * scale[:, None]).to(left_ptr.dtype.element_ty)
        x = tl.load(
            x_ptr + rows64[:, None] * x_stride + cols[None, :],
            mask=ok[:, None] & col_ok[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(x), left, total, input_precision="ieee")
    if COLUMN_SCALE:
        # column scales are the same for all tokens, so apply them once, after the sum
        column = tl.load(column_scale_ptr + cols, mask=col_ok, other=0.0).to(tl.float32)
        total *= column[:, None]
    at = split * out_stride_s + r[None, :] * out_stride_r + cols[:, None] * out_stride_n
    tl.store(out_ptr + at, total, mask=(r < R)[None, :] & col_ok[:, None])


@triton.jit
def reduce_partials_kernel(
    partials_ptr, grads_ptr, n, stride, scale, S: tl.constexpr, BLOCK: tl.constexpr
):
    """Add scale * (sum of partials[s] over s) to BLOCK entries of grads."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = at < n
    total = tl.zeros((BLOCK,), tl.float32)
    # add in the order of s, without float atomics, so that two runs agree bit for bit
    for s in range(S):
        total += tl.load(partials_ptr + s * stride + at, mask=ok, other=0.0)
    grad = tl.load(grads_ptr + at, mask=ok, other=0.0)
    tl.store(grads_ptr + at, grad + scale * total, mask=ok)


def launch_narrow_products(x, right, sizes, out) -> None:
    """Write out = [x_1 M_1, ...]; right: M_j stacked by rows, [sum of sizes, R], contiguous."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))] + [0, 0]
    # tile, warps and stages below were the fastest of eight combinations (README.md)
    R, block_t = right.shape[1], 64
    narrow_products_kernel[(triton.cdiv(x.shape[0], block_t), len(sizes))](
        x, x.stride(0), right, out, out.stride(0), x.shape[0], *ends[:3],
        R=R, RP=padded_rank(R), PDL=bool(pdl_option(x.device)), BLOCK_T=block_t, BLOCK_N=128,
        num_warps=8, num_stages=4 if x.element_size() == 2 else 2,
    )  # fmt: skip


def launch_outer_sum(left, x, row_scale, column_scale, partials) -> None:
    """Write partials [S, R, N], any strides: the sum of outer products left[t] x[t]^T per split."""
    splits, R, N = partials.shape
    num_rows, padded = left.shape[0], padded_rank(R)
    # the accumulator [block_n, padded] has to fit into the registers of four warps
    block_n = 128 if padded <= 64 else 64
    outer_sum_kernel[(triton.cdiv(N, block_n), splits)](
        # `left` is a placeholder for an absent scale, whose pointer the kernel does not read
        left, x, left if row_scale is None else row_scale,
        left if column_scale is None else column_scale, partials,
        num_rows, rows_per_split(num_rows, splits), N,
        left.stride(0), x.stride(0), *partials.stride(),
        R=R, RP=padded, ROW_SCALE=row_scale is not None, COLUMN_SCALE=column_scale is not None,
        BLOCK_T=64 if padded <= 64 else 32, BLOCK_N=block_n, STAGES=stages(x.device, padded),
        num_warps=4,
    )  # fmt: skip


def launch_reduce_partials(partials, grads, scale) -> None:
    """Add scale * (sum of partials [S, n] over S) to grads [n], in float32."""
    n = grads.numel()
    reduce_partials_kernel[(triton.cdiv(n, 1024),)](
        partials, grads, n, partials.stride(0), scale, S=partials.shape[0], BLOCK=1024, num_warps=4
    )
