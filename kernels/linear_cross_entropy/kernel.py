"""Triton: a row of logits becomes its loss and, in place, its gradient."""

# pyright: reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl


@triton.jit
def cross_entropy_kernel(
    logits_ptr, stride, targets_ptr, losses_ptr, weight_ptr, M, V,
    BLOCK_V: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """logits[row] = (softmax(logits[row]) - onehot(target)) * weight; a negative target: zeros.

    A program takes every so-manieth row. There are as many as the chip has processors: then the
    rows at work fit into the L2 cache, and the second walk over a row does not go to memory.
    """
    for row in range(tl.program_id(0), M, tl.num_programs(0)):
        target = tl.load(targets_ptr + row)
        row_ptr = logits_ptr + row * stride  # below 2^31, says the caller
        highest = tl.full((BLOCK_V,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_V,), tl.float32)
        for start in range(0, V, BLOCK_V):  # one running maximum and sum per lane
            cols = start + tl.arange(0, BLOCK_V)
            z = tl.load(row_ptr + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(highest, z)
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(highest - safe) + tl.exp(z - safe)
            highest = higher
        top = tl.max(highest, axis=0)
        total_all = tl.sum(total * tl.exp(highest - top), axis=0)
        lse = top + tl.log(total_all)
        at = tl.where(target < 0, 0, target)
        z_target = tl.load(row_ptr + at).to(tl.float32)
        tl.store(losses_ptr + row, tl.where(target < 0, 0.0, lse - z_target))
        if GRADIENT:
            weight = tl.where(target < 0, 0.0, tl.load(weight_ptr))
            for start in range(0, V, BLOCK_V):
                cols = start + tl.arange(0, BLOCK_V)
                ok = cols < V
                z = tl.load(row_ptr + cols, mask=ok, other=float("-inf")).to(tl.float32)
                p = tl.exp(z - lse)
                d = (p - tl.where(cols == target, 1.0, 0.0)) * weight
                tl.store(row_ptr + cols, d.to(logits_ptr.dtype.element_ty), mask=ok)


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
        BLOCK_V=block, GRADIENT=gradient, num_warps=min(32, max(4, block // 512)),
    )  # fmt: skip
