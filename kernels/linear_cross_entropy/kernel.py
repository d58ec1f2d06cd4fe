"""Triton: a row of logits becomes its loss and, in place, its gradient."""

# pyright: reportCallIssue=false, reportArgumentType=false

import triton
import triton.language as tl


@triton.jit
def cross_entropy_kernel(
    logits_ptr, stride, targets_ptr, losses_ptr, weight_ptr, V,
    BLOCK_V: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """logits[row] = (softmax(logits[row]) - onehot(target)) * weight; a negative target: zeros."""
    row = tl.program_id(0)
    target = tl.load(targets_ptr + row)
    row_ptr = logits_ptr + row.to(tl.int64) * stride
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
    total = tl.sum(total * tl.exp(highest - top), axis=0)
    lse = top + tl.log(total)
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
    block = min(8192, max(128, triton.next_power_of_2(V)))
    cross_entropy_kernel[(M,)](
        logits, logits.stride(0), targets, losses, weight, V,
        BLOCK_V=block, GRADIENT=gradient, num_warps=min(16, max(4, block // 512)),
    )  # fmt: skip
