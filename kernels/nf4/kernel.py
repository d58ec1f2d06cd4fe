"""Triton: decode a 4-bit matrix in one launch, nested scales and codebook included.

PDL: on GPUs that can, the launch starts while the kernel before it still runs, reads and decodes
the weight, and waits for that kernel only before it writes (PDL_WAIT_LAST: at its end); so may the
kernel after it. A decode is short, and what it waits for at its start is a tenth of it.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from minisft.kernels._triton import pdl_option, wait_at_the_end


@triton.jit
def block_scale(
    absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, block, ok,
    NESTED: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """The scales of those blocks, float32; OFFSETS: an offset for every 256 blocks, not one."""
    absmax = tl.load(absmax_ptr + block, mask=ok, other=0)
    if NESTED:
        nested = tl.load(nested_absmax_ptr + block // 256, mask=ok, other=0.0)
        product = tl.load(nested_code_ptr + absmax.to(tl.int32)) * nested
        at = block // 256 if OFFSETS else block * 0
        scale = product + tl.load(nested_offset_ptr + at, mask=ok, other=0.0)
    else:
        scale = absmax
    return scale


@triton.jit
def dequantize_kernel(
    packed_ptr,  # int32: eight weights each
    absmax_ptr,  # uint8 or float32, one per block
    code_ptr,  # float32 [16]
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    out_ptr,
    num_words,
    in_features: tl.constexpr,
    out_stride: tl.constexpr,
    WORDS_PER_BLOCK: tl.constexpr,  # 8: a block of 64 weights
    NESTED: tl.constexpr,
    OFFSETS: tl.constexpr,  # an offset for every 256 blocks instead of one
    PDL: tl.constexpr,
    PDL_WAIT_LAST: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """in_features is a multiple of 8, so that a word's weights share a row of `out`."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    word = tl.program_id(0).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)  # [BLOCK_W]
    inside = word < num_words
    packed = tl.load(packed_ptr + word, mask=inside, other=0)
    scale = block_scale(
        absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr,
        word // WORDS_PER_BLOCK, inside, NESTED, OFFSETS,
    )  # fmt: skip
    # Bytes are little-endian in a word, and a byte's high nibble comes first.
    lane = tl.arange(0, 8)
    shift = (lane // 2) * 8 + (1 - lane % 2) * 4
    nibble = (packed[:, None] >> shift[None, :]) & 15  # [BLOCK_W, 8]
    value = tl.load(code_ptr + nibble) * scale[:, None]
    first = word * 8
    if out_stride != in_features:
        row = first // in_features
        first = row * out_stride + (first - row * in_features)
    at = first[:, None] + lane[None, :]
    if PDL and not PDL_WAIT_LAST:
        tl.extra.cuda.gdc_wait()
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside[:, None])
    if PDL_WAIT_LAST:
        wait_at_the_end()


@triton.jit
def dequantize_with_lora_kernel(
    packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr,
    out_ptr, num_words, lora_ptr, lora_scale, first_end, second_end, num_rows, decoders,
    in_features: tl.constexpr, out_stride: tl.constexpr, WORDS_PER_BLOCK: tl.constexpr,
    NESTED: tl.constexpr, OFFSETS: tl.constexpr, PDL: tl.constexpr, BELOW: tl.constexpr,
    R: tl.constexpr, LINEARS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The first `decoders` programs decode; the rest write A below or B beside the matrix."""
    if tl.program_id(0) < decoders:
        dequantize_kernel(
            packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr,
            nested_offset_ptr, out_ptr, num_words, in_features, out_stride, WORDS_PER_BLOCK,
            NESTED, OFFSETS, PDL, False, BLOCK_W,
        )  # fmt: skip
    else:
        if PDL:  # the kernel before may have written A or B
            tl.extra.cuda.gdc_wait()
        e = (tl.program_id(0) - decoders) * (BLOCK_W * 8) + tl.arange(0, BLOCK_W * 8)
        dtype = out_ptr.dtype.element_ty
        if BELOW:  # [LINEARS * R, in_features], as contiguous as the rows above it
            ok = e < LINEARS * R * in_features
            value = tl.load(lora_ptr + e, mask=ok, other=0.0).to(tl.float32) * lora_scale
            at = num_rows.to(tl.int64) * in_features + e
            tl.store(out_ptr + at, value.to(dtype), mask=ok)
        else:  # block diagonal: [num_rows, LINEARS * R]
            row = e // (LINEARS * R)
            column = e - row * (LINEARS * R)
            ok = row < num_rows
            linear = (row >= first_end).to(tl.int32) + (row >= second_end).to(tl.int32)
            mine = column - linear * R
            inside = ok & (mine >= 0) & (mine < R)
            value = tl.load(lora_ptr + row * R + mine, mask=inside, other=0.0)
            value = value.to(tl.float32) * lora_scale
            at = row.to(tl.int64) * out_stride + in_features + column
            tl.store(out_ptr + at, value.to(dtype), mask=ok)


@triton.jit
def dequantize_any_kernel(
    packed_ptr,  # uint8
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    out_ptr,
    num_weights,
    in_features,
    out_stride,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    OFFSETS: tl.constexpr,  # an offset for every 256 blocks instead of one
    BLOCK: tl.constexpr,
):
    """One weight per lane: any in_features, any block size."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < num_weights
    byte = tl.load(packed_ptr + e // 2, mask=inside, other=0).to(tl.int32)
    nibble = tl.where(e % 2 == 0, byte >> 4, byte & 15)
    scale = block_scale(
        absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr,
        e // BLOCKSIZE, inside, NESTED, OFFSETS,
    )  # fmt: skip
    value = tl.load(code_ptr + nibble) * scale
    row = e // in_features
    at = row * out_stride + (e - row * in_features)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)


def quantised_arguments(weight) -> tuple[tuple, dict[str, bool]]:
    """(scale and code pointers in the kernels' order, flags); a stand-in where there is none."""
    nested, dummy = weight.nested_absmax is not None, weight.code
    pointers = (
        weight.absmax, weight.code,
        weight.nested_absmax if nested else dummy, weight.nested_code if nested else dummy,
        weight.nested_offset if nested else dummy,
    )  # fmt: skip
    return pointers, {"NESTED": nested, "OFFSETS": nested and weight.nested_offset.dim() == 1}


BLOCK_WORDS = 512  # of eight weights, to a program


def launch_dequantize(weight, out, pdl: bool, wait_last: bool = False) -> None:
    """Decode `weight` into `out` [O, >= I columns], whose rows may be strided.

    wait_last, with pdl: `out` is written early too. The launch before has nothing to do with it, and
    let this one start only after all before it had ended.

    Floating-point contraction is off: code * absmax + offset rounds twice, as bitsandbytes does.
    """
    overlap = pdl_option(out.device) if pdl else {}
    O, I = weight.shape
    pointers, flags = quantised_arguments(weight)
    if is_wide(weight):
        num_words = O * I // 8
        dequantize_kernel[(triton.cdiv(num_words, BLOCK_WORDS),)](
            weight.packed.view(torch.int32), *pointers, out, num_words, I, out.stride(0),
            WORDS_PER_BLOCK=weight.blocksize // 8, **flags, PDL=bool(overlap),
            PDL_WAIT_LAST=wait_last and bool(overlap), BLOCK_W=BLOCK_WORDS, num_warps=4,
            enable_fp_fusion=False, **overlap,
        )  # fmt: skip
        return
    dequantize_any_kernel[(triton.cdiv(O * I, 1024),)](
        weight.packed, *pointers, out, O * I, I, out.stride(0),
        BLOCKSIZE=weight.blocksize, **flags, BLOCK=1024,
        enable_fp_fusion=False,
    )  # fmt: skip


def launch_dequantize_with_lora(weight, out, lora, scale, below, sizes, rank, pdl: bool) -> None:
    """out: [O + LINEARS * R, I] with A below, or [O, I + LINEARS * R] with B beside."""
    overlap = pdl_option(out.device) if pdl else {}
    O, I = weight.shape
    linears, num_words = len(sizes), O * I // 8
    pointers, flags = quantised_arguments(weight)
    decoders = triton.cdiv(num_words, BLOCK_WORDS)
    further = linears * rank * (I if below else O)
    ends = [sum(sizes[: i + 1]) for i in range(linears)] + [O, O]
    dequantize_with_lora_kernel[(decoders + triton.cdiv(further, BLOCK_WORDS * 8),)](
        weight.packed.view(torch.int32), *pointers, out, num_words, lora, scale, ends[0], ends[1],
        O, decoders, in_features=I, out_stride=out.stride(0),
        WORDS_PER_BLOCK=weight.blocksize // 8, **flags, PDL=bool(overlap), BELOW=below, R=rank,
        LINEARS=linears, BLOCK_W=BLOCK_WORDS, num_warps=4, enable_fp_fusion=False,
        **overlap,
    )  # fmt: skip


def is_wide(weight) -> bool:
    """Whether words of eight weights share a row and a block: what the fast kernels ask for."""
    aligned = weight.packed.data_ptr() % 4 == 0
    return weight.shape[1] % 8 == 0 and weight.blocksize % 8 == 0 and aligned
