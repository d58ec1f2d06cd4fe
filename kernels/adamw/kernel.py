"""Triton: the norm in two launches, summed in a fixed order; clipping and AdamW in one."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false

import torch
import triton
import triton.language as tl


@triton.jit
def squares_kernel(g_ptr, parts_ptr, n, blocks, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """parts[program]: the sum of the squares of every PROGRAMS-th block."""
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.program_id(0).to(tl.int64), blocks, PROGRAMS):
        at = block * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(g_ptr + at, mask=at < n, other=0.0)
        total += g * g
    tl.store(parts_ptr + tl.program_id(0), tl.sum(total.to(tl.float64)))


@triton.jit
def root_kernel(parts_ptr, norm_ptr, PROGRAMS: tl.constexpr, PADDED: tl.constexpr):
    i = tl.arange(0, PADDED)
    parts = tl.load(parts_ptr + i, mask=i < PROGRAMS, other=0.0)  # float64
    tl.store(norm_ptr, tl.sqrt(tl.sum(parts)).to(tl.float32))


@triton.jit
def adamw_kernel(
    p_ptr, g_ptr, m_ptr, v_ptr, norm_ptr, n, max_norm, decay, step_size, root_scale, new1, beta2,
    new2, eps, CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """decay: with lr in it; step_size: lr / (1 - beta1^t); root_scale: 1 / sqrt(1 - beta2^t).

    new1, new2: 1 - beta, as a float32 of its own.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < n
    g = tl.load(g_ptr + at, mask=ok, other=0.0)
    if CLIP:
        g *= tl.minimum(max_norm / (tl.load(norm_ptr) + 1e-6), 1.0)
    m = tl.load(m_ptr + at, mask=ok, other=0.0)
    v = tl.load(v_ptr + at, mask=ok, other=1.0)  # no division by nothing
    p = tl.load(p_ptr + at, mask=ok, other=0.0)
    m += new1 * (g - m)
    v = beta2 * v + new2 * g * g
    root = tl.sqrt_rn(v) * root_scale + eps
    p -= decay * p + step_size * tl.div_rn(m, root)
    tl.store(p_ptr + at, p, mask=ok)
    tl.store(m_ptr + at, m, mask=ok)
    tl.store(v_ptr + at, v, mask=ok)


def launch_global_norm(g):
    PROGRAMS, BLOCK = 1024, 1024
    parts = torch.empty(PROGRAMS, dtype=torch.float64, device=g.device)
    norm = torch.empty((), dtype=torch.float32, device=g.device)
    n = g.numel()
    squares_kernel[(PROGRAMS,)](
        g, parts, n, triton.cdiv(n, BLOCK), PROGRAMS=PROGRAMS, BLOCK=BLOCK, num_warps=4
    )
    root_kernel[(1,)](parts, norm, PROGRAMS=PROGRAMS, PADDED=PROGRAMS, num_warps=4)
    return norm


def launch_adamw_(p, g, m, v, step, lr, beta1, beta2, eps, weight_decay, norm, max_norm) -> None:
    n, BLOCK = p.numel(), 1024
    adamw_kernel[(triton.cdiv(n, BLOCK),)](
        p, g, m, v, g if norm is None else norm, n, max_norm, lr * weight_decay,
        lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, 1 - beta1, beta2, 1 - beta2, eps,
        CLIP=norm is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
