"""Triton kernels of RMSNorm: one row per program, or with LoRA 16 rows in two passes over tiles."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOptionalMemberAccess=false

import torch
import triton
import triton.language as tl
from minisft.kernels._triton import padded_rank, stages


@triton.jit
def row_kernel(
    x_ptr, y_ptr, weight_ptr, rstd_ptr, out_ptr, h_ptr,
    x_stride, y_stride, out_stride, h_stride, eps,
    D: tl.constexpr, HAS_Y: tl.constexpr, HAS_RSTD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write h = norm(out) of one row: out is x, or x + y if HAS_Y; rstd is an input if HAS_RSTD."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    ok = cols < D
    x = tl.load(x_ptr + row * x_stride + cols, mask=ok, other=0.0).to(tl.float32)
    if HAS_Y:
        x += tl.load(y_ptr + row * y_stride + cols, mask=ok, other=0.0).to(tl.float32)
        rounded = x.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * out_stride + cols, rounded, mask=ok)
        # compute rstd from the rounded sum, which `normalise` and the backward pass read
        x = rounded.to(tl.float32)
    if HAS_RSTD:
        rstd = tl.load(rstd_ptr + row)
    else:
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / D + eps)
        tl.store(rstd_ptr + row, rstd)
    # round before multiplying by the weight, as transformers does
    normed = (x * rstd).to(h_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=ok, other=0.0).to(tl.float32)
    tl.store(h_ptr + row * h_stride + cols, (normed * weight).to(h_ptr.dtype.element_ty), mask=ok)


@triton.jit
def add_rms_norm_kernel(
    x_ptr, y_ptr, weight_ptr, left_ptr, right_ptr, out_ptr, h_ptr, rstd_ptr,
    num_rows, x_stride, y_stride, left_stride, right_stride_r, right_stride_n, out_stride, h_stride,
    scale, eps,
    D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write out = x + y + scale * left @ right, rstd and h = norm(out) for BLOCK_M rows."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < num_rows
    rows64 = rows.to(tl.int64)[:, None]
    r = tl.arange(0, RP)
    left = tl.load(
        left_ptr + rows64 * left_stride + r[None, :],
        mask=row_ok[:, None] & (r < R)[None, :],
        other=0.0,
    )
    sum_squares = tl.zeros((BLOCK_M,), tl.float32)
    # num_stages makes Triton also pipeline loads that feed no tl.dot: 24 us instead of 29
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK_D)
        col_ok = cols < D
        ok = row_ok[:, None] & col_ok[None, :]
        x = tl.load(x_ptr + rows64 * x_stride + cols[None, :], mask=ok, other=0.0).to(tl.float32)
        x += tl.load(y_ptr + rows64 * y_stride + cols[None, :], mask=ok, other=0.0).to(tl.float32)
        right = tl.load(
            right_ptr + r[:, None] * right_stride_r + cols[None, :] * right_stride_n,
            mask=(r < R)[:, None] & col_ok[None, :],
            other=0.0,
        )
        x += scale * tl.dot(left, right, input_precision="ieee")
        rounded = x.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows64 * out_stride + cols[None, :], rounded, mask=ok)
        x = rounded.to(tl.float32)
        sum_squares += tl.sum(x * x, axis=1)
    rstd = 1.0 / tl.sqrt(sum_squares / D + eps)
    tl.store(rstd_ptr + rows, rstd, mask=row_ok)
    # barrier: the second pass reads sums that other threads of this program stored
    tl.debug_barrier()
    for start in tl.range(0, D, BLOCK_H, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK_H)
        col_ok = cols < D
        ok = row_ok[:, None] & col_ok[None, :]
        x = tl.load(out_ptr + rows64 * out_stride + cols[None, :], mask=ok, other=0.0)
        normed = (x.to(tl.float32) * rstd[:, None]).to(h_ptr.dtype.element_ty)
        weight = tl.load(weight_ptr + cols, mask=col_ok, other=0.0).to(tl.float32)
        h = normed.to(tl.float32) * weight[None, :]
        tl.store(h_ptr + rows64 * h_stride + cols[None, :], h.to(h_ptr.dtype.element_ty), mask=ok)


@triton.jit
def rms_norm_backward_kernel(
    dh_ptr, x_ptr, weight_ptr, rstd_ptr, dresidual_ptr, dx_ptr,
    dh_stride, x_stride, dresidual_stride, dx_stride,
    D: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write dx = (g - n * mean(g * n)) * rstd + dresidual with g = dh * weight, n = x * rstd."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    ok = cols < D
    x = tl.load(x_ptr + row * x_stride + cols, mask=ok, other=0.0).to(tl.float32)
    g = tl.load(dh_ptr + row * dh_stride + cols, mask=ok, other=0.0).to(tl.float32)
    g *= tl.load(weight_ptr + cols, mask=ok, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    n = x * rstd
    dx = (g - n * (tl.sum(g * n, axis=0) / D)) * rstd
    if RESIDUAL:
        dx += tl.load(dresidual_ptr + row * dresidual_stride + cols, mask=ok, other=0.0).to(
            tl.float32
        )
    tl.store(dx_ptr + row * dx_stride + cols, dx.to(dx_ptr.dtype.element_ty), mask=ok)


def _row(D: int) -> tuple[int, int]:
    """Return (block size, number of warps) for a program that holds D values in registers."""
    block = triton.next_power_of_2(D)
    return block, min(16, max(1, block // 512))


def launch_add_rms_norm(x, y, delta, weight, eps, h) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the norm of x + y + delta into h [T, >= D]; return (the sum [T, D], rstd [T])."""
    T, D = x.shape
    rstd = torch.empty(T, dtype=torch.float32, device=x.device)
    out = x if y is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    if delta is None:
        block, warps = _row(D)
        row_kernel[(T,)](
            # x is a placeholder for an absent y, whose pointer the kernel does not read
            x, x if y is None else y, weight, rstd, out, h,
            x.stride(0), 0 if y is None else y.stride(0), out.stride(0), h.stride(0), eps,
            D=D, HAS_Y=y is not None, HAS_RSTD=False, BLOCK_D=block, num_warps=warps,
        )  # fmt: skip
        return out, rstd
    R, whole = delta.left.shape[1], triton.next_power_of_2(D)
    padded = padded_rank(R)
    # three stages of `right` must fit into shared memory: rank 128 x 512 columns takes 279 KB
    block = min(512, whole, 32768 // (padded * x.element_size()))
    # 16 rows are the minimum of tl.dot; tiles of 16 x 512, then 16 x 1024, were fastest
    add_rms_norm_kernel[(triton.cdiv(T, 16),)](
        x, y, weight, delta.left, delta.right, out, h, rstd,
        T, x.stride(0), y.stride(0), delta.left.stride(0), *delta.right.stride(), out.stride(0),
        h.stride(0), delta.scale, eps,
        D=D, R=R, RP=padded, BLOCK_M=16, BLOCK_D=block, BLOCK_H=min(1024, whole),
        STAGES=stages(x.device, padded), num_warps=8,
    )  # fmt: skip
    return out, rstd


def launch_normalise(x, weight, rstd, h) -> None:
    """Write the RMSNorm of x into h [T, >= D], using the given rstd [T]."""
    T, D = x.shape
    block, warps = _row(D)
    row_kernel[(T,)](
        x, x, weight, rstd, x, h, x.stride(0), 0, 0, h.stride(0), 0.0,
        D=D, HAS_Y=False, HAS_RSTD=True, BLOCK_D=block, num_warps=warps,
    )  # fmt: skip


def launch_rms_norm_backward(dh, x, weight, rstd, dresidual, dx) -> None:
    """Write the gradient of x, plus dresidual if given, into dx [T, >= D]."""
    T, D = x.shape
    block, warps = _row(D)
    rms_norm_backward_kernel[(T,)](
        dh, x, weight, rstd, x if dresidual is None else dresidual, dx,
        dh.stride(0), x.stride(0), 0 if dresidual is None else dresidual.stride(0), dx.stride(0),
        D=D, RESIDUAL=dresidual is not None, BLOCK_D=block, num_warps=warps,
    )  # fmt: skip
