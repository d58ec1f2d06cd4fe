"""Specification of the 4-bit formats in plain torch, bit-identical to bitsandbytes.

A matrix [O, I] in row-major order is divided into blocks of 64 weights, which may cross rows. A
weight is code[nibble] * scale of its block; double quantisation stores the scales in 8 bits.
The kernel rounds exactly as this reference does, so minisft/nn.py uses this decode too.

n weights  b blocks of 64  s superblocks of 256 blocks
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Quantiles of the normal distribution (arXiv:2305.14314), with the digits of bitsandbytes.
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# FP4 values by code: bit 3 is the sign, bits 2 and 1 the exponent, bit 0 the mantissa.
_FP4_HALF = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
FP4_CODE = (*_FP4_HALF, *(-x for x in _FP4_HALF))
CODES = {"nf4": NF4_CODE, "fp4": FP4_CODE}
BLOCK, NESTED_BLOCK = 64, 256
# Number of weights quantised at a time, which limits temporary memory to about 30 MB.
_PIECE = 2**20


class NF4Weight(NamedTuple):
    """A weight matrix [O, I] quantised to 4 bits.

    packed: uint8 [ceil(n / 2)], even-numbered weights in the high nibbles. absmax: the scale of
    each block, float32 [b], or uint8 [b] with double quantisation: scale = nested_code[absmax] *
    nested_absmax[block // 256] + nested_offset, rounded after each operation.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor  # float32 [16]
    nested_absmax: Tensor | None  # float32 [s]
    nested_code: Tensor | None  # float32 [256]
    nested_offset: Tensor | None  # float32 [], or [s] for joined matrices (`side_by_side`)
    shape: tuple[int, int]
    blocksize: int = BLOCK
    quant_type: str = "nf4"

    def nbytes(self) -> int:
        """Return the device memory of packed, absmax and nested_absmax in bytes."""
        tensors = (self.packed, self.absmax, self.nested_absmax)
        return sum(t.numel() * t.itemsize for t in tensors if t is not None)


def dynamic_map() -> Tensor:
    """Return bitsandbytes' signed 8-bit dynamic map: 256 float32 values in ascending order.

    The values are 0, 1 and, for i = 0..6 and both signs, the midpoints of 2^i equal parts of
    [0.1, 1] times 10^(i-6).
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        means = (edges[:-1] + edges[1:]) / 2.0 * 10.0 ** (i - 6)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def scales(weight: NF4Weight) -> Tensor:
    """Return the scale of every quantisation block, float32 [b]."""
    if weight.nested_absmax is None:
        return weight.absmax
    assert weight.nested_code is not None and weight.nested_offset is not None
    nested = weight.nested_absmax.repeat_interleave(NESTED_BLOCK)[: weight.absmax.numel()]
    product = weight.nested_code[weight.absmax.int()] * nested
    if weight.nested_offset.dim() == 0:
        return product + weight.nested_offset
    return product + weight.nested_offset.repeat_interleave(NESTED_BLOCK)[: product.numel()]


def side_by_side(weights: Sequence[NF4Weight]) -> tuple[NF4Weight, list[NF4Weight]] | None:
    """Concatenate matrices by rows for decoding in one launch; return (joined, views of its parts).

    Returns None if codes, block sizes or column counts differ, or if the number of weights of a
    matrix is not a multiple of 64 * 256 (in Llama models it always is).
    """
    first = weights[0]
    for w in weights:
        same = (
            w[7:] == first[7:] and w.shape[1] == first.shape[1] and torch.equal(w.code, first.code)
        )
        if not same or (w.nested_code is None) != (first.nested_code is None):
            return None
        # a superblock must not contain weights of two matrices
        if (w.shape[0] * w.shape[1]) % (w.blocksize * NESTED_BLOCK):
            return None
        if w.nested_code is not None and not torch.equal(w.nested_code, first.nested_code):  # pyright: ignore
            return None
    shape = (sum(w.shape[0] for w in weights), first.shape[1])
    nested = first.nested_absmax is not None
    joined = first._replace(
        packed=torch.cat([w.packed for w in weights]),
        absmax=torch.cat([w.absmax for w in weights]),
        nested_absmax=torch.cat([w.nested_absmax for w in weights]) if nested else None,  # pyright: ignore
        nested_offset=torch.cat([_offsets(w) for w in weights]) if nested else None,
        shape=shape,
    )
    views, block, start = [], first.blocksize, 0
    for w in weights:
        stop = start + w.shape[0] * w.shape[1]
        superblocks = slice(start // block // NESTED_BLOCK, stop // block // NESTED_BLOCK)
        views.append(
            joined._replace(
                packed=joined.packed[start // 2 : stop // 2],
                absmax=joined.absmax[start // block : stop // block],
                nested_absmax=joined.nested_absmax[superblocks] if nested else None,  # pyright: ignore
                nested_offset=joined.nested_offset[superblocks] if nested else None,  # pyright: ignore
                shape=w.shape,
            )
        )
        start = stop
    return joined, views


def _offsets(weight: NF4Weight) -> Tensor:
    # offsets differ between matrices, so a joined matrix stores one offset per superblock
    assert weight.nested_offset is not None and weight.nested_absmax is not None
    return weight.nested_offset.expand(weight.nested_absmax.shape)


def dequantize_reference(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """Return the decoded matrix [O, I] in `dtype`: code * scale in float32, rounded once."""
    n = weight.shape[0] * weight.shape[1]
    # look up each byte in a table of 256 pairs of float32 (as one int64): four times as fast on a
    # CPU as unpacking nibbles
    high, low = weight.code.repeat_interleave(16), weight.code.repeat(16)
    pairs = torch.stack((high, low), dim=1).view(torch.int64).flatten()  # [256]
    values = pairs.index_select(0, weight.packed.int()).view(torch.float32)[:n]
    scale = scales(weight)
    if n % weight.blocksize == 0:
        values = values.view(-1, weight.blocksize).mul_(scale.unsqueeze(1))
    else:
        values = values * scale.repeat_interleave(weight.blocksize)[:n]
    return values.to(dtype).view(weight.shape)


def quantize(
    weight: Tensor, *, quant_type: str = "nf4", double_quant: bool = True, blocksize: int = BLOCK
) -> NF4Weight:
    """Return a matrix [O, I] of any float dtype quantised to 4 bits, on the matrix's device.

    Each block is divided by its largest magnitude and rounded to the nearest code, ties to the
    lower. double_quant subtracts the mean of the scales and rounds them to 8 bits the same way, in
    blocks of 256. Raises ValueError for an unknown quant_type, a matrix that is not 2-D, or a value
    that is not finite.
    """
    if quant_type not in CODES:
        raise ValueError(f"quant_type is {quant_type!r}; expected one of {', '.join(CODES)}")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected [out, in]")
    code = torch.tensor(CODES[quant_type], dtype=torch.float32, device=weight.device)
    pieces = []
    # pieces end at byte and block boundaries, so their results can be concatenated
    for values in weight.flatten().split(2 * blocksize * max(1, _PIECE // (2 * blocksize))):
        indices, absmax = _quantize_blocks(values.float(), code, blocksize)
        indices = torch.nn.functional.pad(indices, (0, indices.numel() % 2))
        pieces.append((indices[::2] << 4 | indices[1::2], absmax))
    packed, absmax = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    if not absmax.isfinite().all():
        raise ValueError("weight holds a value that is not finite")
    shape = (weight.shape[0], weight.shape[1])
    if not double_quant:
        return NF4Weight(packed, absmax, code, None, None, None, shape, blocksize, quant_type)
    nested_code = dynamic_map().to(weight.device)
    offset = absmax.mean()
    nested, nested_absmax = _quantize_blocks(absmax - offset, nested_code, NESTED_BLOCK)
    return NF4Weight(
        packed, nested, code, nested_absmax, nested_code, offset, shape, blocksize,
        quant_type,
    )  # fmt: skip


def _quantize_blocks(values: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Return (uint8 index of the code nearest to each value / absmax of its block, absmax [b])."""
    n = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -n % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(1)
    # avoid a division by zero in blocks of zeros
    reciprocal = torch.where(absmax > 0, 1 / absmax, 0)
    normed = (blocks * reciprocal.unsqueeze(1)).clamp_(-1, 1).view(-1)[:n]
    # ascending without duplicates: FP4 has two zeros, and argmax below picks the first
    ordered = code.unique()
    nearest = torch.bucketize(normed, (ordered[1:] + ordered[:-1]) / 2, out_int32=True)
    index = (code == ordered.unsqueeze(1)).int().argmax(1).to(torch.uint8)
    return index.index_select(0, nearest), absmax
