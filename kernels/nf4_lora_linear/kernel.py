"""Triton kernels for few rows: matrix products that decode the 4-bit weight in registers.

Each pass takes two launches. The first splits the sum and the outputs, so that small matrices
occupy the GPU; some of its programs multiply by A (forward: u = x A^T) or B (backward: t = dy B).
The second adds the partial sums in order, then LoRA and bias; in backward also dA and dB.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from minisft.kernels._triton import padded_rank, pdl_option
from minisft.kernels.nf4.kernel import block_scale, quantised_arguments


@triton.jit
def code_of_lane(code_ptr, LANES: tl.constexpr):
    """Return code[lane % 16] of each thread's lane if LANES, otherwise an unused 0.0."""
    # with the codebook in the registers of sixteen lanes, decoding a weight takes 3.5 instructions
    if LANES:
        return tl.inline_asm_elementwise(
            "{ .reg .u32 l; .reg .u64 a; mov.u32 l, %laneid; and.b32 l, l, 15; "
            "mad.wide.u32 a, l, 4, $1; ld.global.nc.f32 $0, [a]; }",
            "=f,l", [code_ptr.to(tl.uint64)], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return 0.0


@triton.jit
def look_up(code_ptr, of_lane, nibble, LANES: tl.constexpr):
    """Return code[nibble & 15] of every element; of_lane is the result of `code_of_lane`."""
    if LANES:
        # a shuffle saves the two instructions that compute the address of a load. Bit 4 of `nibble`
        # may be set: lanes 16 to 31 hold the same codes as lanes 0 to 15
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=f,f,r", [of_lane, nibble],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return tl.load(code_ptr + (nibble & 15))


@triton.jit
def forward_parts_kernel(
    x_ptr, packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr,
    nested_offset_ptr, a_ptr, parts_ptr, M, O, x_stride, k_per_split,
    I: tl.constexpr, R: tl.constexpr, NESTED: tl.constexpr, OFFSETS: tl.constexpr,
    LANES: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write parts[split, n, m] = sum of [W; A][n, k] x[m, k] over the k of the split."""
    # a tile row is one quantisation block, so it has one scale
    BLOCK_K: tl.constexpr = 64
    # let finish_kernel start early; it calls gdc_wait before it reads the parts
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    blocks = tl.cdiv(O, BLOCK_N)
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    first = split * k_per_split
    last = tl.minimum(first + k_per_split, I)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    dtype = x_ptr.dtype.element_ty
    k = tl.arange(0, BLOCK_K)
    if tl.program_id(0) < blocks:
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        ok = n < O
        half = tl.arange(0, BLOCK_K // 2)
        row = n.to(tl.int64) * I
        of_lane = code_of_lane(code_ptr, LANES)
        for start in range(first, last, BLOCK_K):
            at = packed_ptr + (row[:, None] + start) // 2 + half[None, :]
            byte = tl.load(at, mask=ok[:, None], other=0).to(tl.int32)  # [BLOCK_N, BLOCK_K / 2]
            scale = block_scale(
                absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr,
                (row + start) // BLOCK_K, ok, NESTED, OFFSETS,
            )  # fmt: skip
            even_w = look_up(code_ptr, of_lane, byte >> 4, LANES) * scale[:, None]
            odd_w = look_up(code_ptr, of_lane, byte, LANES) * scale[:, None]
            x = tl.load(
                x_ptr + m[:, None] * x_stride + start + k[None, :], mask=(m < M)[:, None], other=0.0
            )
            # multiply high nibbles by the even columns of x and low nibbles by the odd columns:
            # interleaving the decoded weights took sixteen barriers per tile
            even_x, odd_x = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_K // 2, 2)))
            total = tl.dot(even_w.to(dtype), tl.trans(even_x), total, input_precision="ieee")
            total = tl.dot(odd_w.to(dtype), tl.trans(odd_x), total, input_precision="ieee")
        rows = n
        keep = ok
    else:
        r = tl.arange(0, BLOCK_N) + (tl.program_id(0) - blocks) * BLOCK_N
        for start in range(first, last, BLOCK_K):
            a = tl.load(
                a_ptr + r[:, None] * I + start + k[None, :], mask=(r < R)[:, None], other=0.0
            )
            x = tl.load(
                x_ptr + m[:, None] * x_stride + start + k[None, :], mask=(m < M)[:, None], other=0.0
            )
            total = tl.dot(a, tl.trans(x), total, input_precision="ieee")
        rows = O + r
        keep = r < R
    at = (split * (O + R) + rows)[:, None].to(tl.int64) * M + m[None, :]
    tl.store(parts_ptr + at, total, mask=keep[:, None] & (m < M)[None, :])


@triton.jit
def backward_parts_kernel(
    dy_ptr, packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr,
    nested_offset_ptr, b_ptr, parts_ptr, M, O, dy_stride, o_per_split,
    I: tl.constexpr, R: tl.constexpr, NESTED: tl.constexpr, OFFSETS: tl.constexpr,
    LANES: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Write parts[split, i, m]: sum of concat(W, B, dim=1)[o, i] * dy[m, o] over the split's o."""
    BLOCK_I: tl.constexpr = 64
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    blocks: tl.constexpr = I // BLOCK_I
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    first = split * o_per_split
    last = tl.minimum(first + o_per_split, O)
    dtype = dy_ptr.dtype.element_ty
    if tl.program_id(0) < blocks:
        column = tl.program_id(0) * BLOCK_I
        half = tl.arange(0, BLOCK_I // 2)
        of_lane = code_of_lane(code_ptr, LANES)
        even = tl.zeros((BLOCK_M, BLOCK_I // 2), tl.float32)
        odd = tl.zeros((BLOCK_M, BLOCK_I // 2), tl.float32)
        for start in range(first, last, BLOCK_O):
            o = start + tl.arange(0, BLOCK_O)
            ok = o < last
            row = o.to(tl.int64) * I + column
            byte = tl.load(
                packed_ptr + row[:, None] // 2 + half[None, :], mask=ok[:, None], other=0
            ).to(tl.int32)  # [BLOCK_O, BLOCK_I / 2]
            scale = block_scale(
                absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr,
                row // BLOCK_I, ok, NESTED, OFFSETS,
            )  # fmt: skip
            even_w = look_up(code_ptr, of_lane, byte >> 4, LANES) * scale[:, None]
            odd_w = look_up(code_ptr, of_lane, byte, LANES) * scale[:, None]
            dy = tl.load(
                dy_ptr + m[:, None] * dy_stride + o[None, :],
                mask=(m < M)[:, None] & ok[None, :],
                other=0.0,
            )
            even = tl.dot(dy, even_w.to(dtype), even, input_precision="ieee")
            odd = tl.dot(dy, odd_w.to(dtype), odd, input_precision="ieee")
        # [BLOCK_M, BLOCK_I]: interleave the sums once instead of the weights in every tile
        total = tl.interleave(even, odd)
        rows = column + tl.arange(0, BLOCK_I)
        keep = rows < I
    else:
        r = tl.arange(0, BLOCK_I) + (tl.program_id(0) - blocks) * BLOCK_I
        total = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
        for start in range(first, last, BLOCK_O):
            o = start + tl.arange(0, BLOCK_O)
            ok = o < last
            b = tl.load(
                b_ptr + o[:, None] * R + r[None, :], mask=ok[:, None] & (r < R)[None, :], other=0.0
            )
            dy = tl.load(
                dy_ptr + m[:, None] * dy_stride + o[None, :],
                mask=(m < M)[:, None] & ok[None, :],
                other=0.0,
            )
            total = tl.dot(dy, b, total, input_precision="ieee")
        rows = I + r
        keep = r < R
    at = (split * (I + R) + rows)[None, :].to(tl.int64) * M + m[:, None]
    tl.store(parts_ptr + at, total, mask=keep[None, :] & (m < M)[:, None])


@triton.jit
def finish_kernel(
    parts_ptr, lora_ptr, lora_stride_n, lora_stride_r, bias_ptr, out_ptr, low_ptr, M, N, scaling,
    x_ptr, x_stride, dy_ptr, dy_stride, u_ptr, u_stride, da_ptr, db_ptr, O,
    SPLITS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BIAS: tl.constexpr,
    GRADS: tl.constexpr, PDL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write out[m, n] = sum of parts + scaling * low @ lora^T + bias, where low is u or t [M, R].

    Forward: also writes low. Backward (GRADS): also writes dA = scaling * t^T x and, in additional
    programs, dB = scaling * dy^T u.
    """
    m = tl.arange(0, BLOCK_M)
    r = tl.arange(0, RP)
    m_ok = m < M
    r_ok = r < R
    dtype = out_ptr.dtype.element_ty
    blocks = tl.cdiv(N, BLOCK_N)
    if tl.program_id(0) < blocks:
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        n_ok = n < N
        ok = n_ok[:, None] & m_ok[None, :]
        if R > 0:
            lora = tl.load(
                lora_ptr + n[:, None] * lora_stride_n + r[None, :] * lora_stride_r,
                mask=n_ok[:, None] & r_ok[None, :],
                other=0.0,
            )
            if GRADS:
                x = tl.load(
                    x_ptr + m[:, None] * x_stride + n[None, :],
                    mask=m_ok[:, None] & n_ok[None, :],
                    other=0.0,
                )
        # lora and x may be loaded before this wait: the first launch does not write them
        if PDL:
            tl.extra.cuda.gdc_wait()
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for split in tl.static_range(SPLITS):
            at = (split * (N + R) + n)[:, None].to(tl.int64) * M + m[None, :]
            total += tl.load(parts_ptr + at, mask=ok, other=0.0)
        if R > 0:
            # every program adds up u or t itself, which saves a third launch
            low_ok = r_ok[:, None] & m_ok[None, :]
            low = tl.zeros((RP, BLOCK_M), tl.float32)
            for split in tl.static_range(SPLITS):
                at = (split * (N + R) + N + r)[:, None].to(tl.int64) * M + m[None, :]
                low += tl.load(parts_ptr + at, mask=low_ok, other=0.0)
            low = low.to(dtype)
            total += scaling * tl.dot(lora, low, input_precision="ieee")
            if GRADS:
                da = scaling * tl.dot(low, x, input_precision="ieee")
                tl.store(
                    da_ptr + r[:, None] * N + n[None, :],
                    da.to(dtype),
                    mask=r_ok[:, None] & n_ok[None, :],
                )
            elif tl.program_id(0) == 0:
                tl.store(low_ptr + m[None, :] * R + r[:, None], low, mask=low_ok)
        if BIAS:
            total += tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + m[None, :] * N + n[:, None], total.to(dtype), mask=ok)
    elif GRADS:
        o = (tl.program_id(0) - blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        dy = tl.load(
            dy_ptr + m[None, :] * dy_stride + o[:, None],
            mask=(o < O)[:, None] & m_ok[None, :],
            other=0.0,
        )
        u = tl.load(
            u_ptr + m[:, None] * u_stride + r[None, :],
            mask=m_ok[:, None] & r_ok[None, :],
            other=0.0,
        )
        db = scaling * tl.dot(dy, u, input_precision="ieee")
        # an earlier kernel may still use the memory that db was allocated in
        if PDL:
            tl.extra.cuda.gdc_wait()
        tl.store(
            db_ptr + o[:, None] * R + r[None, :],
            db.to(dtype),
            mask=(o < O)[:, None] & r_ok[None, :],
        )


# Columns per program of finish_kernel in backward: the fastest of a sweep.
FINISH_BACKWARD = 32


def _finish_forward(x, R: int) -> int:
    """Return the columns per program of finish_kernel in forward, limited by shared memory."""
    return 64 if padded_rank(R) * x.element_size() < 1024 else 32


def _by_lanes(x) -> bool:
    # the shuffle is inline PTX, which only NVIDIA GPUs execute
    return x.is_cuda and not torch.version.hip


def _splits(tiles: int, length: int, programs: int, most: int) -> tuple[int, int]:
    """Return (number of splits of a sum of `length` terms, terms per split: a multiple of 64).

    tiles * splits is about `programs`; a split has at least four blocks of 64 terms if possible.
    """
    blocks = triton.cdiv(length, 64)
    per_split = triton.cdiv(blocks, max(1, min(most, programs // tiles, blocks // 4))) * 64
    return triton.cdiv(length, per_split), per_split


def fused_forward(x, weight, bias, adapter):
    """Return (y [M, O], u [M, R] or None) for at most 64 rows; arguments as in `op.forward`."""
    M, (O, I), (A, B, scaling) = x.shape[0], weight.shape, adapter or (None, None, 1.0)
    R = 0 if A is None else A.shape[0]
    block_m, block_n = max(16, triton.next_power_of_2(M)), 64
    tiles = triton.cdiv(O, block_n)
    splits, per_split = _splits(tiles, I, 1056 if M <= 16 else 528, most=8)
    parts = torch.empty((splits, O + R, M), dtype=torch.float32, device=x.device)
    pointers, flags = quantised_arguments(weight)
    overlap = pdl_option(x.device)
    forward_parts_kernel[(tiles + triton.cdiv(R, block_n), splits)](
        x, weight.packed, *pointers, x if A is None else A, parts, M, O, x.stride(0), per_split,
        I=I, R=R, **flags, LANES=_by_lanes(x), PDL=bool(overlap), BLOCK_M=block_m,
        BLOCK_N=block_n, num_warps=4, num_stages=1,
    )  # fmt: skip
    y = torch.empty((M, O), dtype=x.dtype, device=x.device)
    u = None if A is None else torch.empty((M, R), dtype=x.dtype, device=x.device)
    lora, strides = (y, (1, 1)) if B is None else (B, B.stride())
    columns = _finish_forward(x, R)
    finish_kernel[(triton.cdiv(O, columns),)](
        parts, lora, *strides, y if bias is None else bias, y, y if u is None else u, M, O, scaling,
        y, 1, y, 1, y, 1, y, y, 1,
        SPLITS=splits, R=R, RP=padded_rank(R), BIAS=bias is not None, GRADS=False,
        PDL=bool(overlap), BLOCK_M=block_m, BLOCK_N=columns, num_warps=4, **overlap,
    )  # fmt: skip
    return y, u


def fused_backward(dy, x, u, weight, adapter):
    """Return (dx, dA or None, dB or None) for at most 64 rows; arguments as in `op.backward`."""
    M, (O, I), (A, B, scaling) = dy.shape[0], weight.shape, adapter or (None, None, 1.0)
    R = 0 if B is None else B.shape[1]
    block_m, block_o = max(16, triton.next_power_of_2(M)), 64
    tiles = I // 64
    splits, per_split = _splits(tiles, O, 528, most=12)
    parts = torch.empty((splits, I + R, M), dtype=torch.float32, device=dy.device)
    pointers, flags = quantised_arguments(weight)
    overlap = pdl_option(dy.device)
    backward_parts_kernel[(tiles + triton.cdiv(R, 64), splits)](
        dy, weight.packed, *pointers, dy if B is None else B, parts, M, O, dy.stride(0), per_split,
        I=I, R=R, **flags, LANES=_by_lanes(dy), PDL=bool(overlap), BLOCK_M=block_m,
        BLOCK_O=block_o, num_warps=4, num_stages=1,
    )  # fmt: skip
    dx = torch.empty((M, I), dtype=dy.dtype, device=dy.device)
    dA, dB = (None, None) if A is None else (torch.empty_like(A), torch.empty_like(B))
    lora, strides = (dx, (1, 1)) if A is None else (A, (A.stride(1), A.stride(0)))
    grads = (dx, 1, dx, dx) if A is None else (u, u.stride(0), dA, dB)
    for_dB = 0 if A is None else triton.cdiv(O, FINISH_BACKWARD)
    finish_kernel[(triton.cdiv(I, FINISH_BACKWARD) + for_dB,)](
        parts, lora, *strides, dx, dx, dx, M, I, scaling,
        x, x.stride(0), dy, dy.stride(0), *grads, O,
        SPLITS=splits, R=R, RP=padded_rank(R), BIAS=False, GRADS=A is not None,
        PDL=bool(overlap), BLOCK_M=block_m, BLOCK_N=FINISH_BACKWARD, num_warps=4, **overlap,
    )  # fmt: skip
    return dx, dA, dB
