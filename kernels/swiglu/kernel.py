"""Triton kernels of SwiGLU; the backward kernel also sums LoRA's dB and dA in registers."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from minisft.kernels._triton import materialized_once, padded_rank, rows_per_split, stages


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x)), computed as the square of rsqrt(1 + 2^(-x log2 e))."""
    # tl.sigmoid takes 15 instructions instead of 5, because its exponential and its division also
    # handle denormals
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def swiglu_kernel(
    x_ptr, x_stride, out_ptr, out_stride, F: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    """Write silu(gate) * up for BLOCK_F columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    ok = cols < F
    at = x_ptr + row * x_stride + cols
    g = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    u = tl.load(at + F, mask=ok, other=0.0).to(tl.float32)
    a = g * sigmoid(g) * u
    tl.store(out_ptr + row * out_stride + cols, a.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _add_outer(total, left_ptr, left_stride, rows64, row_ok, x, R: tl.constexpr, RP: tl.constexpr):
    """Return total + x^T @ left[rows], [BLOCK_F, RP]."""
    # x is the left operand of tl.dot, so that the tensor cores read it from shared memory
    r = tl.arange(0, RP)
    mask = row_ok[:, None] & (r < R)[None, :]
    left = tl.load(left_ptr + rows64 * left_stride + r[None, :], mask=mask, other=0.0)
    return tl.dot(tl.trans(x), left, total, input_precision="ieee")


@triton.jit
def swiglu_backward_kernel(
    x_ptr, x_stride, da_ptr, da_stride, num_rows, rows_per_split,
    g_left, g_left_stride, u_left, u_left_stride, d_left, d_left_stride,
    g_partial, g_split, u_partial, u_split, d_partial, d_split,
    F: tl.constexpr, RG: tl.constexpr, RU: tl.constexpr, RD: tl.constexpr,
    PG: tl.constexpr, PU: tl.constexpr, PD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, STAGES: tl.constexpr, PIN: tl.constexpr,
):  # fmt: skip
    """Overwrite gate and up with their gradients; sum dB of gate, dB of up and dA of down.

    Each program handles BLOCK_F columns over one split of the tokens. Rank 0 skips that sum.
    """
    cols = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    split = tl.program_id(1)
    col_ok = cols < F
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, num_rows)
    dtype = x_ptr.dtype.element_ty
    total_g = tl.zeros((BLOCK_F, PG), tl.float32)
    total_u = tl.zeros((BLOCK_F, PU), tl.float32)
    total_d = tl.zeros((BLOCK_F, PD), tl.float32)
    for start in tl.range(first, last, BLOCK_T, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_T)
        row_ok = rows < last
        ok = row_ok[:, None] & col_ok[None, :]
        rows64 = rows.to(tl.int64)[:, None]
        at = x_ptr + rows64 * x_stride + cols[None, :]
        g = tl.load(at, mask=ok, other=0.0).to(tl.float32)
        u = tl.load(at + F, mask=ok, other=0.0).to(tl.float32)
        da = tl.load(da_ptr + rows64 * da_stride + cols[None, :], mask=ok, other=0.0)
        da = da.to(tl.float32)
        s = sigmoid(g)
        silu = g * s
        # the store and tl.dot need different layouts: pinning takes 186 us instead of 251
        du = materialized_once((da * silu).to(dtype), PIN)
        dg = materialized_once((da * u * (s + silu - silu * s)).to(dtype), PIN)
        tl.store(at, dg, mask=ok)
        tl.store(at + F, du, mask=ok)
        if RG > 0:
            total_g = _add_outer(total_g, g_left, g_left_stride, rows64, row_ok, dg, RG, PG)
        if RU > 0:
            total_u = _add_outer(total_u, u_left, u_left_stride, rows64, row_ok, du, RU, PU)
        if RD > 0:
            a = materialized_once((silu * u).to(dtype), PIN)
            total_d = _add_outer(total_d, d_left, d_left_stride, rows64, row_ok, a, RD, PD)
    if RG > 0:
        r = tl.arange(0, PG)
        at = g_partial + split * g_split + cols[:, None] * RG + r[None, :]
        tl.store(at, total_g, mask=col_ok[:, None] & (r < RG)[None, :])
    if RU > 0:
        r = tl.arange(0, PU)
        at = u_partial + split * u_split + cols[:, None] * RU + r[None, :]
        tl.store(at, total_u, mask=col_ok[:, None] & (r < RU)[None, :])
    if RD > 0:
        r = tl.arange(0, PD)
        at = d_partial + split * d_split + r[None, :] * F + cols[:, None]
        tl.store(at, total_d, mask=col_ok[:, None] & (r < RD)[None, :])


def launch_swiglu(x, F, out) -> None:
    """Write silu(gate) * up into the first F columns of out; x: [T, >= 2F]."""
    T = out.shape[0]
    block = min(2048, triton.next_power_of_2(F))
    swiglu_kernel[(T, triton.cdiv(F, block))](
        x, x.stride(0), out, out.stride(0), F=F, BLOCK_F=block,
        num_warps=max(1, block // 512),
    )  # fmt: skip


def launch_swiglu_backward(x, da, lefts, partials) -> None:
    """Overwrite gate and up in x with their gradients; write partials. See op.swiglu_backward_."""
    T, F = da.shape
    left_args, partial_args, ranks = [], [], []
    for left, partial in zip(lefts, partials, strict=True):
        left_args += [x, 0] if left is None else [left, left.stride(0)]
        partial_args += [x, 0] if partial is None else [partial, partial.stride(0)]
        ranks.append(0 if left is None else left.shape[1])
    padded = [padded_rank(R) for R in ranks]
    widest = max(padded)
    # use fewer columns at high ranks, so that the sums [block_f, rank] stay in registers
    block_f = min(128, max(32, 4096 // widest))
    splits = next((p.shape[0] for p in partials if p is not None), 8)
    swiglu_backward_kernel[(triton.cdiv(F, block_f), splits)](
        x, x.stride(0), da, da.stride(0), T, rows_per_split(T, splits), *left_args, *partial_args,
        F=F, RG=ranks[0], RU=ranks[1], RD=ranks[2], PG=padded[0], PU=padded[1], PD=padded[2],
        # 32 x 128, 4 warps and 3 stages were the fastest of 37 configurations at rank 16
        BLOCK_T=32, BLOCK_F=block_f, STAGES=stages(x.device, widest), PIN=x.is_cuda,
        num_warps=4 if widest == 16 else 8,
    )  # fmt: skip
