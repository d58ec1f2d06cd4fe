"""Triton: narrow products, ordered sums over tokens, and what other kernels share."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def materialized_once(x, PIN: tl.constexpr):
    """x. PIN: the compiler cannot make it again; for a store and for a product it would make all of
    it twice, each in its own layout, where moving it from one to the other is cheaper.
    """
    if PIN:
        PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=PACK
        )
    return x


@triton.jit
def wait_at_the_end():
    """For a kernel that need not wait for the one before: one program does, as its last act, so
    that the launch has not ended before the other has. The grid has one dimension.
    """
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.extra.cuda.gdc_wait()


@triton.jit
def narrow_products_kernel(
    x_ptr, x_stride, right_ptr, out_ptr, out_stride, num_rows,
    first_end, second_end, third_end, R: tl.constexpr, RP: tl.constexpr,
    PDL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a matrix's R columns of BLOCK_T rows of out."""
    if PDL:  # a decode that follows may run beside it
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    matrix = tl.program_id(1)
    first = tl.where(matrix == 0, 0, tl.where(matrix == 1, first_end, second_end))
    last = tl.where(matrix == 0, first_end, tl.where(matrix == 1, second_end, third_end))
    row_ok = rows < num_rows
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
    """One program: BLOCK_N columns of one split's sum.

    It is kept as [BLOCK_N, RP]: x is the left operand, which the tensor cores read from where it
    was copied to.
    """
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    col_ok = cols < N
    r = tl.arange(0, RP)
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
            scale = tl.load(row_scale_ptr + rows, mask=ok, other=0.0)
            left = (left.to(tl.float32) * scale[:, None]).to(left_ptr.dtype.element_ty)
        x = tl.load(
            x_ptr + rows64[:, None] * x_stride + cols[None, :],
            mask=ok[:, None] & col_ok[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(x), left, total, input_precision="ieee")
    if COLUMN_SCALE:
        column = tl.load(column_scale_ptr + cols, mask=col_ok, other=0.0).to(tl.float32)
        total *= column[:, None]
    at = split * out_stride_s + r[None, :] * out_stride_r + cols[:, None] * out_stride_n
    tl.store(out_ptr + at, total, mask=(r < R)[None, :] & col_ok[:, None])


@triton.jit
def reduce_partials_kernel(
    partials_ptr, grads_ptr, n, stride, scale, S: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = at < n
    total = tl.zeros((BLOCK,), tl.float32)
    for s in range(S):
        total += tl.load(partials_ptr + s * stride + at, mask=ok, other=0.0)
    grad = tl.load(grads_ptr + at, mask=ok, other=0.0)
    tl.store(grads_ptr + at, grad + scale * total, mask=ok)


@functools.cache
def pdl_option(device: torch.device) -> dict[str, bool]:
    """The launch option by which a kernel starts before the one before has ended, if there is one.

    Its first wait (gdc_wait) must come before it reads what that kernel writes, or writes at all.
    But where that kernel waited itself before it let this one start, it is the only one under way:
    then what it neither writes nor reads may be read and written at once (`wait_at_the_end`).
    """
    if device.type != "cuda" or torch.version.hip:
        return {}
    return {"launch_pdl": True} if torch.cuda.get_device_capability(device) >= (9, 0) else {}


@functools.cache
def num_sms(device: torch.device) -> int:
    """How many programs run side by side, one on each; where there is no GPU, two in turn."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of it that a program may have; where there is no GPU, as many as an H100 gives."""
    if device.type != "cuda":
        return 232448
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 64 << 10)  # AMD's has no such name


def stages(device: torch.device, rank: int) -> int:
    """Tiles under way at once: fewer at high ranks where there is little shared memory.

    99 KiB on the GPUs of a desktop (compute capability 8.6, 8.9, 12.0), 163 on an A100.
    """
    if shared_memory(device) >= 160 << 10:
        return 3
    return 2 if rank <= 64 and shared_memory(device) >= 99 << 10 else 1


def padded_rank(rank: int) -> int:
    """The width of a tensor-core product that holds the rank: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(max(1, rank)))


def rows_per_split(num_rows: int, splits: int) -> int:
    """Whole blocks of 64 rows, so that `splits` of them hold all."""
    return triton.cdiv(triton.cdiv(num_rows, splits), 64) * 64


def launch_narrow_products(x, right, sizes, out) -> None:
    """right: the matrices one below the other, [sum of sizes, R], contiguous."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))] + [0, 0]
    R, block_t = right.shape[1], 64
    narrow_products_kernel[(triton.cdiv(x.shape[0], block_t), len(sizes))](
        x, x.stride(0), right, out, out.stride(0), x.shape[0], *ends[:3],
        R=R, RP=padded_rank(R), PDL=bool(pdl_option(x.device)), BLOCK_T=block_t, BLOCK_N=128,
        num_warps=8, num_stages=4 if x.element_size() == 2 else 2,
    )  # fmt: skip


def launch_outer_sum(left, x, row_scale, column_scale, partials) -> None:
    """partials: a view [S, R, N] with any strides."""
    splits, R, N = partials.shape
    num_rows, padded = left.shape[0], padded_rank(R)
    block_n = 128 if padded <= 64 else 64
    outer_sum_kernel[(triton.cdiv(N, block_n), splits)](
        left, x, left if row_scale is None else row_scale,
        left if column_scale is None else column_scale, partials,
        num_rows, rows_per_split(num_rows, splits), N,
        left.stride(0), x.stride(0), *partials.stride(),
        R=R, RP=padded, ROW_SCALE=row_scale is not None, COLUMN_SCALE=column_scale is not None,
        BLOCK_T=64 if padded <= 64 else 32, BLOCK_N=block_n, STAGES=stages(x.device, padded),
        num_warps=4,
    )  # fmt: skip


def launch_reduce_partials(partials, grads, scale) -> None:
    n = grads.numel()
    reduce_partials_kernel[(triton.cdiv(n, 1024),)](
        partials, grads, n, partials.stride(0), scale, S=partials.shape[0], BLOCK=1024, num_warps=4
    )
