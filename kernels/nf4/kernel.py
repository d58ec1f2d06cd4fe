"""Triton kernels: decode a 4-bit matrix, including double-quantised scales, in one launch.

With PDL, programmatic dependent launch (compute capability 9.0 and later), a kernel starts while
its predecessor runs, decodes the weight, and calls gdc_wait only before its first store
(PDL_WAIT_LAST: at its end). This hides the launch latency, about a tenth of the decoding time.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from minisft.kernels._triton import pdl_option, wait_at_the_end


@triton.jit
def block_scale(
    absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, block, ok,
    NESTED: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """Return the float32 scales of the quantisation blocks whose indices are `block`.

    NESTED: scales are stored in 8 bits. OFFSETS: nested_offset has one value per 256 blocks.
    """
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
    packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr,
    out_ptr, num_words, in_features: tl.constexpr, out_stride: tl.constexpr,
    WORDS_PER_BLOCK: tl.constexpr, NESTED: tl.constexpr, OFFSETS: tl.constexpr,
    PDL: tl.constexpr, PDL_WAIT_LAST: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Decode BLOCK_W int32 words of eight weights each; in_features must be a multiple of 8.

    absmax: uint8 or float32, one per block of WORDS_PER_BLOCK words. code: float32 [16].
    """
    if PDL:
        # before the loads, this call saves 1.2 us; after the loads it saved 0.3 (4096 x 4096)
        tl.extra.cuda.gdc_launch_dependents()
    word = tl.program_id(0).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)  # [BLOCK_W]
    inside = word < num_words
    packed = tl.load(packed_ptr + word, mask=inside, other=0)
    scale = block_scale(
        absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr,
        word // WORDS_PER_BLOCK, inside, NESTED, OFFSETS,
    )  # fmt: skip
    # a word stores its bytes in little-endian order; in a byte, the high nibble comes first
    lane = tl.arange(0, 8)
    shift = (lane // 2) * 8 + (1 - lane % 2) * 4
    nibble = (packed[:, None] >> shift[None, :]) & 15  # [BLOCK_W, 8]
    # the codebook is 64 bytes: one cache line, so the look-ups of a warp do not conflict
    value = tl.load(code_ptr + nibble) * scale[:, None]
    first = word * 8
    # compile-time test: a contiguous `out` needs no division by in_features
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
    NESTED: tl.constexpr, OFFSETS: tl.constexpr, PDL: tl.constexpr, CONCAT_ROWS: tl.constexpr,
    R: tl.constexpr, LINEARS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Decode W in the first `decoders` programs; the others append the scaled LoRA factor to W.

    CONCAT_ROWS: append A as rows. Otherwise append the block-diagonal B as columns.
    """
    if tl.program_id(0) < decoders:
        dequantize_kernel(
            packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr,
            nested_offset_ptr, out_ptr, num_words, in_features, out_stride, WORDS_PER_BLOCK,
            NESTED, OFFSETS, PDL, False, BLOCK_W,
        )  # fmt: skip
    else:
        # wait before loading: the preceding kernel may write A or B, though never the weight
        if PDL:
            tl.extra.cuda.gdc_wait()
        e = (tl.program_id(0) - decoders) * (BLOCK_W * 8) + tl.arange(0, BLOCK_W * 8)
        dtype = out_ptr.dtype.element_ty
        if CONCAT_ROWS:
            # A's rows [LINEARS * R, in_features] follow the rows of W in contiguous memory
            ok = e < LINEARS * R * in_features
            value = tl.load(lora_ptr + e, mask=ok, other=0.0).to(tl.float32) * lora_scale
            at = num_rows.to(tl.int64) * in_features + e
            tl.store(out_ptr + at, value.to(dtype), mask=ok)
        else:
            # B's columns [num_rows, LINEARS * R]; also store the zeros outside the diagonal blocks
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
    packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr,
    out_ptr, num_weights, in_features, out_stride, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    OFFSETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decode BLOCK weights with one byte load each, for any in_features and block size."""
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
    """Return (the weight's scale and code tensors as kernel arguments, its constexpr flags)."""
    # `code` is a placeholder for absent tensors, whose pointers the kernels do not read
    nested, dummy = weight.nested_absmax is not None, weight.code
    pointers = (
        weight.absmax, weight.code,
        weight.nested_absmax if nested else dummy, weight.nested_code if nested else dummy,
        weight.nested_offset if nested else dummy,
    )  # fmt: skip
    return pointers, {"NESTED": nested, "OFFSETS": nested and weight.nested_offset.dim() == 1}


# Words (eight weights each) that one program decodes; the fastest of 256 to 2048.
BLOCK_WORDS = 512


def launch_dequantize(weight, out, pdl: bool, wait_last: bool = False) -> None:
    """Decode `weight` into `out` [O, >= I columns], whose rows may be strided.

    wait_last (requires pdl): store before the preceding kernel has ended. The preceding kernel must
    not use `out`, and must call gdc_wait before gdc_launch_dependents.
    """
    overlap = pdl_option(out.device) if pdl else {}
    O, I = weight.shape
    pointers, flags = quantised_arguments(weight)
    if reads_words(weight):
        num_words = O * I // 8
        dequantize_kernel[(triton.cdiv(num_words, BLOCK_WORDS),)](
            weight.packed.view(torch.int32), *pointers, out, num_words, I, out.stride(0),
            WORDS_PER_BLOCK=weight.blocksize // 8, **flags, PDL=bool(overlap),
            PDL_WAIT_LAST=wait_last and bool(overlap), BLOCK_W=BLOCK_WORDS, num_warps=4,
            # fused multiply-adds would change the last bit of about 4 % of the scales
            enable_fp_fusion=False, **overlap,
        )  # fmt: skip
        return
    dequantize_any_kernel[(triton.cdiv(O * I, 1024),)](
        weight.packed, *pointers, out, O * I, I, out.stride(0),
        BLOCKSIZE=weight.blocksize, **flags, BLOCK=1024,
        enable_fp_fusion=False,
    )  # fmt: skip


def launch_dequantize_concat(
    weight, out, lora, scale, sizes: Sequence[int], *, rows: bool, pdl: bool
) -> None:
    """Write out = [W; scale * A] if `rows`, otherwise [W, scale * block_diag(B of each linear)].

    lora: A [R, I], or the B matrices of linears with `sizes` rows each, stacked to [O, R].
    """
    overlap = pdl_option(out.device) if pdl else {}
    O, I = weight.shape
    rank, linears, num_words = lora.shape[0 if rows else 1], len(sizes), O * I // 8
    pointers, flags = quantised_arguments(weight)
    decoders = triton.cdiv(num_words, BLOCK_WORDS)
    further = linears * rank * (I if rows else O)
    ends = [sum(sizes[: i + 1]) for i in range(linears)] + [O, O]
    dequantize_with_lora_kernel[(decoders + triton.cdiv(further, BLOCK_WORDS * 8),)](
        weight.packed.view(torch.int32), *pointers, out, num_words, lora, scale, ends[0], ends[1],
        O, decoders, in_features=I, out_stride=out.stride(0),
        WORDS_PER_BLOCK=weight.blocksize // 8, **flags, PDL=bool(overlap), CONCAT_ROWS=rows, R=rank,
        LINEARS=linears, BLOCK_W=BLOCK_WORDS, num_warps=4, enable_fp_fusion=False,
        **overlap,
    )  # fmt: skip


def reads_words(weight) -> bool:
    """Return True if no aligned word of 8 weights crosses a row or block (for the fast kernels)."""
    aligned = weight.packed.data_ptr() % 4 == 0
    return weight.shape[1] % 8 == 0 and weight.blocksize % 8 == 0 and aligned
