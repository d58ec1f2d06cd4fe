"""Triton kernel: compute losses from rows of logits and overwrite the logits with gradients."""

# pyright: reportCallIssue=false, reportArgumentType=false

import triton
import triton.language as tl
from minisft.kernels._triton import num_sms

# exp(x) = exp2(x log2 e): exp2 is one instruction, and the factor goes into a fused multiply-add.
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _accumulate(highest, total, z):
    """Update each lane's running maximum and sum of exp(z - maximum) with WIDTH more logits."""
    # sharing a maximum among WIDTH logits saves one of two exponentials per logit
    higher = tl.maximum(highest, tl.max(z, axis=1))
    # a lane that has seen only -inf would compute -inf - -inf = NaN
    shift = tl.where(higher == float("-inf"), 0.0, higher) * LOG2_E
    total = total * tl.exp2(highest * LOG2_E - shift)
    return higher, total + tl.sum(tl.exp2(z * LOG2_E - shift[:, None]), axis=1)


@triton.jit
def cross_entropy_kernel(
    logits_ptr, stride, targets_ptr, losses_ptr, weight_ptr, M, V,
    LANES: tl.constexpr, WIDTH: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Write losses[row] and logits[row] = (softmax(logits[row]) - onehot(target)) * weight.

    Rows with a negative target get zero loss and gradient. Persistent kernel: each program handles
    every num_programs-th row in two passes, the first for maximum and sum, then the gradient.
    """
    BLOCK: tl.constexpr = LANES * WIDTH
    block = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    # process full blocks without a mask: only the end of a row needs one
    whole = V // BLOCK * BLOCK
    ok = whole + block < V
    dtype = logits_ptr.dtype.element_ty
    for row in range(tl.program_id(0), M, tl.num_programs(0)):
        target = tl.load(targets_ptr + row)
        # row * stride fits 32 bits: `op.linear_cross_entropy_grad` rejects larger chunks
        row_ptr = logits_ptr + row * stride
        at = tl.where(target < 0, 0, target)
        # load before the sums: their barriers order this load before stores to the same address
        z_target = tl.load(row_ptr + at).to(tl.float32)
        highest = tl.full((LANES,), float("-inf"), tl.float32)
        total = tl.zeros((LANES,), tl.float32)
        for start in range(0, whole, BLOCK):
            # evict_last: the second pass reads the row again from the L2 cache
            z = tl.load(row_ptr + start + block, eviction_policy="evict_last").to(tl.float32)
            highest, total = _accumulate(highest, total, z)
        if whole < V:
            z = tl.load(row_ptr + whole + block, mask=ok, other=float("-inf")).to(tl.float32)
            highest, total = _accumulate(highest, total, z)
        top = tl.max(highest, axis=0)
        lse = top + tl.log(tl.sum(total * tl.exp2((highest - top) * LOG2_E), axis=0))
        tl.store(losses_ptr + row, tl.where(target < 0, 0.0, lse - z_target))
        if GRADIENT:
            weight = tl.where(target < 0, 0.0, tl.load(weight_ptr))
            shift = lse * LOG2_E
            for start in range(0, whole, BLOCK):
                z = tl.load(row_ptr + start + block, eviction_policy="evict_first")
                d = tl.exp2(z.to(tl.float32) * LOG2_E - shift) * weight
                tl.store(row_ptr + start + block, d.to(dtype), eviction_policy="evict_first")
            if whole < V:
                z = tl.load(row_ptr + whole + block, mask=ok, other=float("-inf")).to(tl.float32)
                d = tl.exp2(z * LOG2_E - shift) * weight
                tl.store(row_ptr + whole + block, d.to(dtype), mask=ok)
            # barrier: the target's gradient overwrites a value that another thread stored above;
            # comparing with the target in the loop would cost an instruction per logit
            tl.debug_barrier()
            d = (tl.exp2(z_target * LOG2_E - shift) - 1.0) * weight
            tl.store(row_ptr + at, d.to(dtype), mask=target >= 0)


def launch_cross_entropy_(logits, targets, losses, weight, gradient: bool) -> None:
    """Write losses [M] float32 and, if `gradient`, overwrite logits [M, V]; weight: float32 [1]."""
    M, V = logits.shape
    block = min(16384, max(128, triton.next_power_of_2(V)))
    # one program per multiprocessor: the L2 cache then holds all active rows (132 x 256 KB)
    cross_entropy_kernel[(min(M, num_sms(logits.device)),)](
        logits, logits.stride(0), targets, losses, weight, M, V,
        LANES=block // 8, WIDTH=8, GRADIENT=gradient, num_warps=min(32, max(4, block // 512)),
    )  # fmt: skip
