"""Triton kernels of RoPE; the backward kernel also sums LoRA's dB of its head in registers."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from minisft.kernels._triton import materialized_once, padded_rank, rows_per_split, stages


@triton.jit
def rope_kernel(
    x_ptr, x_stride, cos_ptr, sin_ptr, angle_stride, num_rows,
    HALF: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Rotate the pairs (i, i + HALF) of one head of BLOCK_T rows in place."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    ok = (rows < num_rows)[:, None]
    half = tl.arange(0, HALF)
    rows64 = rows.to(tl.int64)[:, None]
    at = x_ptr + rows64 * x_stride + tl.program_id(1) * 2 * HALF + half[None, :]
    angle = rows64 * angle_stride + half[None, :]
    cos = tl.load(cos_ptr + angle, mask=ok, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=ok, other=0.0).to(tl.float32)
    # load both halves before storing either: the rotation is in place
    x1 = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    x2 = tl.load(at + HALF, mask=ok, other=0.0).to(tl.float32)
    tl.store(at, (x1 * cos - x2 * sin).to(x_ptr.dtype.element_ty), mask=ok)
    tl.store(at + HALF, (x2 * cos + x1 * sin).to(x_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _head_backward(
    d_ptr, d_stride, u_ptr, u_stride, cos_ptr, sin_ptr, angle_stride,
    out_ptr, out_stride, out_first, partial_ptr, head_first, first_row, last_row,
    HALF: tl.constexpr, ROTATE: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    BLOCK_T: tl.constexpr, STAGES: tl.constexpr, PIN: tl.constexpr,
):  # fmt: skip
    """Write a head's gradient, rotated back if ROTATE, and its partial sum of dB [2 HALF, R]."""
    half = tl.arange(0, HALF)
    r = tl.arange(0, RP)
    total1 = tl.zeros((HALF, RP), tl.float32)
    total2 = tl.zeros((HALF, RP), tl.float32)
    for start in tl.range(first_row, last_row, BLOCK_T, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_T)
        ok = rows < last_row
        rows64 = rows.to(tl.int64)[:, None]
        at = d_ptr + rows64 * d_stride + half[None, :]
        d1 = tl.load(at, mask=ok[:, None], other=0.0).to(tl.float32)
        d2 = tl.load(at + HALF, mask=ok[:, None], other=0.0).to(tl.float32)
        if ROTATE:
            angle = rows64 * angle_stride + half[None, :]
            cos = tl.load(cos_ptr + angle, mask=ok[:, None], other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + angle, mask=ok[:, None], other=0.0).to(tl.float32)
            e1 = d1 * cos + d2 * sin
            e2 = d2 * cos - d1 * sin
            d1 = e1
            d2 = e2
        # the store and tl.dot need different layouts: pinning takes 31 us instead of 47
        d1 = materialized_once(d1.to(out_ptr.dtype.element_ty), PIN)
        d2 = materialized_once(d2.to(out_ptr.dtype.element_ty), PIN)
        to = out_ptr + rows64 * out_stride + out_first + half[None, :]
        tl.store(to, d1, mask=ok[:, None])
        tl.store(to + HALF, d2, mask=ok[:, None])
        if R > 0:
            u = tl.load(
                u_ptr + rows64 * u_stride + r[None, :],
                mask=ok[:, None] & (r < R)[None, :],
                other=0.0,
            )
            total1 = tl.dot(tl.trans(d1), u, total1, input_precision="ieee")
            total2 = tl.dot(tl.trans(d2), u, total2, input_precision="ieee")
    if R > 0:
        at = partial_ptr + (head_first + half)[:, None] * R + r[None, :]
        mask = ((half >= 0)[:, None]) & (r < R)[None, :]
        tl.store(at, total1, mask=mask)
        tl.store(at + HALF * R, total2, mask=mask)


@triton.jit
def rope_backward_kernel(
    dq_ptr, dq_stride, dq_head, dk_ptr, dk_stride, dk_head, dv_ptr, dv_stride, dv_head,
    cos_ptr, sin_ptr, angle_stride, out_ptr, out_stride, num_rows, rows_per_split,
    q_u, q_u_stride, q_partial, q_split, k_u, k_u_stride, k_partial, k_split,
    v_u, v_u_stride, v_partial, v_split,
    N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
    RQ: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr,
    PQ: tl.constexpr, PK: tl.constexpr, PV: tl.constexpr,
    BLOCK_T: tl.constexpr, STAGES: tl.constexpr, PIN: tl.constexpr,
):  # fmt: skip
    """Write the gradient and partial dB of one head of q, k or v for one split of the tokens."""
    head = tl.program_id(0)
    split = tl.program_id(1)
    first_row = split * rows_per_split
    last_row = tl.minimum(first_row + rows_per_split, num_rows)
    first = head * 2 * HALF
    if head < N:
        _head_backward(
            dq_ptr + head * dq_head, dq_stride, q_u, q_u_stride, cos_ptr, sin_ptr, angle_stride,
            out_ptr, out_stride, first, q_partial + split * q_split, first, first_row, last_row,
            HALF, True, RQ, PQ, BLOCK_T, STAGES, PIN,
        )  # fmt: skip
    elif head < N + K:
        _head_backward(
            dk_ptr + (head - N) * dk_head, dk_stride, k_u, k_u_stride,
            cos_ptr, sin_ptr, angle_stride, out_ptr, out_stride, first,
            k_partial + split * k_split, (head - N) * 2 * HALF, first_row, last_row,
            HALF, True, RK, PK, BLOCK_T, STAGES, PIN,
        )  # fmt: skip
    else:
        _head_backward(
            dv_ptr + (head - N - K) * dv_head, dv_stride, v_u, v_u_stride,
            cos_ptr, sin_ptr, angle_stride, out_ptr, out_stride, first,
            v_partial + split * v_split, (head - N - K) * 2 * HALF, first_row, last_row,
            HALF, False, RV, PV, BLOCK_T, STAGES, PIN,
        )  # fmt: skip


def launch_rope(qk, cos, sin, heads) -> None:
    """Rotate the first `heads` heads of every row of qk in place."""
    T, H = cos.shape
    rope_kernel[(triton.cdiv(T, 32), heads)](
        qk, qk.stride(0), cos, sin, cos.stride(0), T, HALF=H // 2, BLOCK_T=32,
        num_warps=4,
    )  # fmt: skip


def launch_rope_backward(grads, us, cos, sin, out, partials) -> None:
    """Write the q, k and v gradients to out and dB to partials; see `op.rope_backward`."""
    T, H = cos.shape
    N, K = grads[0].shape[1], grads[1].shape[1]
    d_args, u_args, ranks = [], [], []
    splits = next((p.shape[0] for p in partials if p is not None), 8)
    for grad, u, partial in zip(grads, us, partials, strict=True):
        d_args += [grad, grad.stride(0), grad.stride(1)]
        if u is None:
            u_args += [out, 0, out, 0]
            ranks.append(0)
        else:
            u_args += [u, u.stride(0), partial, partial.stride(0)]
            ranks.append(u.shape[1])
    padded = [padded_rank(R) for R in ranks]
    rope_backward_kernel[(N + 2 * K, splits)](
        *d_args, cos, sin, cos.stride(0), out, out.stride(0), T, rows_per_split(T, splits), *u_args,
        N=N, K=K, HALF=H // 2, RQ=ranks[0], RK=ranks[1], RV=ranks[2],
        PQ=padded[0], PK=padded[1], PV=padded[2],
        # tiles of about 4096 entries; tl.dot requires at least 16 tokens
        BLOCK_T=min(64, max(16, 4096 // H)), STAGES=stages(out.device, max(padded)),
        # Triton's interpreter does not support inline assembly
        PIN=out.is_cuda,
        num_warps=4 if max(padded) <= 32 else 8,
    )  # fmt: skip
