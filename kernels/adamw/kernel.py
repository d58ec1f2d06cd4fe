"""Triton kernels: gradient norm in two launches (fixed summation order), clipped AdamW in one."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false

import torch
import triton
import triton.language as tl


@triton.jit
def squares_kernel(g_ptr, parts_ptr, n, blocks, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """Write parts[i], the sum of squares of blocks i, i + PROGRAMS, ... of BLOCK entries each."""
    # PROGRAMS is independent of the number of multiprocessors: all GPUs add in the same order
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.program_id(0).to(tl.int64), blocks, PROGRAMS):
        at = block * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(g_ptr + at, mask=at < n, other=0.0)
        total += g * g
    # add in float64 from here on, which makes the norm correct to the last bits of float32
    tl.store(parts_ptr + tl.program_id(0), tl.sum(total.to(tl.float64)))


@triton.jit
def root_kernel(parts_ptr, norm_ptr, PROGRAMS: tl.constexpr, PADDED: tl.constexpr):
    """Write norm = sqrt(sum of parts) in float32; the grid is one program."""
    i = tl.arange(0, PADDED)
    parts = tl.load(parts_ptr + i, mask=i < PROGRAMS, other=0.0)
    tl.store(norm_ptr, tl.sqrt(tl.sum(parts)).to(tl.float32))


@triton.jit
def adamw_kernel(
    p_ptr, g_ptr, m_ptr, v_ptr, norm_ptr, n, max_norm, decay, step_size, root_scale, new1, beta2,
    new2, eps, CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Apply one AdamW step to BLOCK entries of parameters p and moments m and v.

    decay: lr * weight decay; step_size: lr / (1 - beta1^t); root_scale: 1 / sqrt(1 - beta2^t);
    new1, new2: 1 - beta1, 1 - beta2.
    """
    # 64-bit offsets: a flat buffer of full fine-tuning exceeds 2^31 entries
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < n
    g = tl.load(g_ptr + at, mask=ok, other=0.0)
    if CLIP:
        # clip in registers: storing and reloading the clipped gradient costs 8 bytes per parameter
        g *= tl.minimum(max_norm / (tl.load(norm_ptr) + 1e-6), 1.0)
    m = tl.load(m_ptr + at, mask=ok, other=0.0)
    # other=1.0: with eps = 0, lanes beyond the end would otherwise divide 0 by 0
    v = tl.load(v_ptr + at, mask=ok, other=1.0)
    p = tl.load(p_ptr + at, mask=ok, other=0.0)
    m += new1 * (g - m)
    v = beta2 * v + new2 * g * g
    # sqrt_rn and div_rn round to nearest as torch does; tl.sqrt and `/` are approximations
    root = tl.sqrt_rn(v) * root_scale + eps
    p -= decay * p + step_size * tl.div_rn(m, root)
    tl.store(p_ptr + at, p, mask=ok)
    tl.store(m_ptr + at, m, mask=ok)
    tl.store(v_ptr + at, v, mask=ok)


def launch_global_norm(g):
    """Return the L2 norm (float32 []) of g (float32 [n])."""
    PROGRAMS, BLOCK = 1024, 1024
    parts = torch.empty(PROGRAMS, dtype=torch.float64, device=g.device)
    norm = torch.empty((), dtype=torch.float32, device=g.device)
    n = g.numel()
    squares_kernel[(PROGRAMS,)](
        g, parts, n, triton.cdiv(n, BLOCK), PROGRAMS=PROGRAMS, BLOCK=BLOCK, num_warps=4
    )
    root_kernel[(1,)](parts, norm, PROGRAMS=PROGRAMS, PADDED=PROGRAMS, num_warps=4)
    return norm


def launch_adamw_(p, g, m, v, settings, norm) -> None:
    """Apply one AdamW step to p, m and v in place; arguments as in `op.adamw_`."""
    step, lr, beta1, beta2, eps, weight_decay, max_norm = settings
    n, BLOCK = p.numel(), 1024
    # compute 1 - beta in float64 here: in float32, 1 - 0.999 has a relative error up to 3e-5
    adamw_kernel[(triton.cdiv(n, BLOCK),)](
        p, g, m, v, g if norm is None else norm, n, max_norm, lr * weight_decay,
        lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, 1 - beta1, beta2, 1 - beta2, eps,
        CLIP=norm is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
