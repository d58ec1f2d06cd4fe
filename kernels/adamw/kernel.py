"""Triton kernels: the norm in two launches, in a fixed order; clipping and AdamW in one."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false

import torch
import triton
import triton.language as tl


@triton.jit
def squares_kernel(g_ptr, parts_ptr, n, blocks, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """Write parts[program] = sum of squares of every PROGRAMS-th block of BLOCK entries."""
    # PROGRAMS is fixed, not the number of multiprocessors: every GPU adds in the same order
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.program_id(0).to(tl.int64), blocks, PROGRAMS):
        at = block * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(g_ptr + at, mask=at < n, other=0.0)
        total += g * g
    # float64 from here on: the norm is then correct to the last bits of float32
    tl.store(parts_ptr + tl.program_id(0), tl.sum(total.to(tl.float64)))


@triton.jit
def root_kernel(parts_ptr, norm_ptr, PROGRAMS: tl.constexpr, PADDED: tl.constexpr):
    """Write norm = sqrt(sum of parts), float32; one program."""
    i = tl.arange(0, PADDED)
    parts = tl.load(parts_ptr + i, mask=i < PROGRAMS, other=0.0)
    tl.store(norm_ptr, tl.sqrt(tl.sum(parts)).to(tl.float32))


@triton.jit
def adamw_kernel(
    p_ptr, g_ptr, m_ptr, v_ptr, norm_ptr, n, max_norm, decay, step_size, root_scale, new1, beta2,
    new2, eps, CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update BLOCK entries of p, m and v.

    decay: lr * weight decay; step_size: lr / (1 - beta1^t); root_scale: 1 / sqrt(1 - beta2^t);
    new1, new2: 1 - beta1, 1 - beta2.
    """
    # 64-bit offsets: a flat buffer of full fine-tuning exceeds 2^31 entries
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < n
    g = tl.load(g_ptr + at, mask=ok, other=0.0)
    if CLIP:
        # clipped as it is read: writing the clipped gradient back would cost 8 bytes per parameter
        g *= tl.minimum(max_norm / (tl.load(norm_ptr) + 1e-6), 1.0)
    m = tl.load(m_ptr + at, mask=ok, other=0.0)
    # other=1.0: lanes beyond the end would divide 0 by 0 where eps is 0
    v = tl.load(v_ptr + at, mask=ok, other=1.0)
    p = tl.load(p_ptr + at, mask=ok, other=0.0)
    m += new1 * (g - m)
    v = beta2 * v + new2 * g * g
    # sqrt_rn and div_rn round to nearest as torch does; the default ones are approximations
    root = tl.sqrt_rn(v) * root_scale + eps
    p -= decay * p + step_size * tl.div_rn(m, root)
    tl.store(p_ptr + at, p, mask=ok)
    tl.store(m_ptr + at, m, mask=ok)
    tl.store(v_ptr + at, v, mask=ok)


def launch_global_norm(g):
    """Return the L2 norm [] float32 of g, float32 [n]."""
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
    """Update p, m and v in place; see `op.adamw_`."""
    step, lr, beta1, beta2, eps, weight_decay, max_norm = settings
    n, BLOCK = p.numel(), 1024
    # 1 - beta is formed in float64 here: in float32, 1 - 0.999 would be off by up to 3e-5 of it
    adamw_kernel[(triton.cdiv(n, BLOCK),)](
        p, g, m, v, g if norm is None else norm, n, max_norm, lr * weight_decay,
        lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, 1 - beta1, beta2, 1 - beta2, eps,
        CLIP=norm is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
