"""Triton: a row of logits becomes its loss and, in place, its gradient."""

# pyright: reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x log2 e), and exp2 is one instruction


@triton.jit
def _summed(highest, total, z):
    """The running maximum of each lane and its sum of exp(z - maximum), with WIDTH more logits."""
    higher = tl.maximum(highest, tl.max(z, axis=1))
    shift = tl.where(higher == float("-inf"), 0.0, higher) * LOG2_E
    total = total * tl.exp2(highest * LOG2_E - shift)
    return higher, total + tl.sum(tl.exp2(z * LOG2_E - shift[:, None]), axis=1)


@triton.jit
def cross_entropy_kernel(
    logits_ptr, stride, targets_ptr, losses_ptr, weight_ptr, M, V,
    LANES: tl.constexpr, WIDTH: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """logits[row] = (softmax(logits[row]) - onehot(target)) * weight; a negative target: zeros.

    A program takes every so-manieth row. There are as many as the chip has processors: then the
    rows at work fit into the L2 cache, which the first walk is told to keep for the second. What
    is left of a row after whole blocks is walked apart, so that they need no mask.
    """
    BLOCK: tl.constexpr = LANES * WIDTH
    block = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    whole = V // BLOCK * BLOCK
    ok = whole + block < V
    dtype = logits_ptr.dtype.element_ty
    for row in range(tl.program_id(0), M, tl.num_programs(0)):
        target = tl.load(targets_ptr + row)
        row_ptr = logits_ptr + row * stride  # below 2^31, says the caller
        at = tl.where(target < 0, 0, target)
        z_target = tl.load(row_ptr + at).to(tl.float32)  # before the sums, whose barriers part it
        highest = tl.full((LANES,), float("-inf"), tl.float32)
        total = tl.zeros((LANES,), tl.float32)
        for start in range(0, whole, BLOCK):
            z = tl.load(row_ptr + start + block, eviction_policy="evict_last").to(tl.float32)
            highest, total = _summed(highest, total, z)
        if whole < V:
            z = tl.load(row_ptr + whole + block, mask=ok, other=float("-inf")).to(tl.float32)
            highest, total = _summed(highest, total, z)
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
            tl.debug_barrier()  # the target's own gradient comes after what was just written there
            d = (tl.exp2(z_target * LOG2_E - shift) - 1.0) * weight
            tl.store(row_ptr + at, d.to(dtype), mask=target >= 0)


def launch_cross_entropy_(logits, targets, losses, weight, gradient: bool) -> None:
    """logits [M, V] becomes the gradient (if asked), losses [M] float32; weight: float32 [1]."""
    M, V = logits.shape
    block = min(16384, max(128, triton.next_power_of_2(V)))
    programs = M
    if logits.is_cuda:
        processors = torch.cuda.get_device_properties(logits.device).multi_processor_count
        programs = min(M, processors)
    cross_entropy_kernel[(programs,)](
        logits, logits.stride(0), targets, losses, weight, M, V,
        LANES=block // 8, WIDTH=8, GRADIENT=gradient, num_warps=min(32, max(4, block // 512)),
    )  # fmt: skip
