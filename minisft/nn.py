"""Tensors in, tensors out: the operations that a Llama block is made of.

T tokens of a micro-batch (all rows side by side)  D hidden  N query heads  K key/value heads
H head_dim  F ffn  I/O linear in/out  R lora rank

Orders of operations and roundings are those of transformers, so that logits are equal bit for bit.
The only door from minisft into `kernels`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.config import RopeConfig

try:
    from kernels import MINISFT_KERNELS  # noqa: F401
except ImportError:
    raise ImportError(
        "minisft needs its own package `kernels`, but another one is imported under that name "
        "(PyPI's `kernels`?): uninstall that one and install minisft again, or install minisft in "
        "an environment of its own"
    ) from None
from kernels.adamw import adamw_, global_norm
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_grad
from kernels.low_rank import (
    LowRank,
    empty_rows,
    narrow_products,
    outer_sum,
    place_block_diagonal,
    reduce_partials,
    row_stride,
)
from kernels.nf4 import (
    NF4Weight,
    dequantize,
    dequantize_into,
    dequantize_with_A_below,
    dequantize_with_B_beside,
    quantize,
    side_by_side,
)
from kernels.nf4.reference import BLOCK, CODES, NESTED_BLOCK, scales
from kernels.nf4_lora_linear import nf4_lora_linear
from kernels.rms_norm import add_rms_norm, normalise, rms_norm_backward
from kernels.rope import rope_, rope_backward
from kernels.swiglu import swiglu as swiglu_kernel
from kernels.swiglu import swiglu_backward_

__all__ = [
    "BLOCK", "CODES", "NESTED_BLOCK", "Documents", "Linear", "Lora", "LowRank", "NF4Weight",
    "adamw_", "add_rms_norm", "apply_rope", "cos_and_sin", "dequantize", "dequantize_into",
    "dequantize_with_A_below", "dequantize_with_B_beside", "dropout", "empty_rows", "frozen_linear",
    "global_norm", "linear", "linear_cross_entropy", "linear_cross_entropy_grad", "narrow_products",
    "normalise", "outer_sum", "packed_attention", "place_block_diagonal", "quantize",
    "reduce_partials", "rms_norm", "rms_norm_backward", "rope_", "rope_backward",
    "rope_inverse_frequencies", "rope_table", "row_stride", "scales", "side_by_side", "swiglu",
    "swiglu_backward_", "swiglu_kernel",
]  # fmt: skip


class Lora(NamedTuple):
    """A low-rank update of one linear: y += scaling * (x A^T) B^T."""

    A_RI: Tensor
    B_OR: Tensor
    key: int  # names the module in the dropout draw
    magnitude_O: Tensor | None = None  # DoRA's: the length of each output row


class Linear(NamedTuple):
    """One projection: a frozen or trained weight [O, I], and perhaps a bias [O] and an adapter."""

    weight: Tensor | NF4Weight
    bias: Tensor | None
    lora: Lora | None


class Documents(NamedTuple):
    """Where the documents of a micro-batch lie: document i is tokens cu_seqlens[i]:cu_seqlens[i+1].

    lengths and their sum are Python numbers, so that nothing has to be read back from the device.
    """

    cu_seqlens: Tensor  # int32 [documents + 1], on the device
    lengths: tuple[int, ...]


class Adapter(NamedTuple):
    """What all adapted linears share: LoRA scale, dropout rate, and the tokens' dropout keys."""

    scaling: float
    dropout: float
    keys_T: Tensor | None


def linear(x_TI: Tensor, module: Linear, adapter: Adapter) -> Tensor:
    """x W^T + b, plus scaling * (dropout(x) A^T) B^T where the module carries an adapter.

    x_TI: compute dtype; weights and fp32 masters are cast to it. Returns [T, O] in x's dtype.
    """
    if module.lora is None:
        return frozen_linear(x_TI, module.weight, module.bias)
    if module.lora.magnitude_O is not None:
        return dora_linear(x_TI, module, adapter)
    A_RI, B_OR, key, _ = module.lora
    A_RI, B_OR = A_RI.to(x_TI.dtype), B_OR.to(x_TI.dtype)
    if isinstance(module.weight, NF4Weight) and adapter.keys_T is None:
        bias = None if module.bias is None else module.bias.to(x_TI.dtype)
        return nf4_lora_linear(x_TI, module.weight, bias, A_RI, B_OR, adapter.scaling)
    y_TO = frozen_linear(x_TI, module.weight, module.bias)
    x_TI = x_TI if adapter.keys_T is None else dropout(x_TI, adapter.keys_T, key, adapter.dropout)
    return y_TO + F.linear(F.linear(x_TI, A_RI), B_OR) * adapter.scaling


def dora_linear(x_TI: Tensor, module: Linear, adapter: Adapter) -> Tensor:
    """x V^T * m / |V| + b, V = W + scaling * B A with rows of length |V| (arXiv:2402.09353).

    No gradient flows through |V|. With dropout the frozen part sees x as it is and the change of
    it, like the adapter, x with entries dropped: PEFT's rule.
    """
    assert module.lora is not None
    A_RI, B_OR, key, magnitude_O = module.lora
    assert magnitude_O is not None
    weight = module.weight
    with torch.no_grad():
        W_OI = dequantize(weight, x_TI.dtype) if isinstance(weight, NF4Weight) else weight
        length_O = (W_OI.float() + adapter.scaling * (B_OR @ A_RI)).norm(dim=1)
        del W_OI
    ratio_O = (magnitude_O / length_O).to(x_TI.dtype)
    y_TO = frozen_linear(x_TI, weight, None)
    dropped_TI = x_TI
    if adapter.keys_T is not None and adapter.dropout:
        dropped_TI = dropout(x_TI, adapter.keys_T, key, adapter.dropout)
    u_TR = F.linear(dropped_TI, A_RI.to(x_TI.dtype))
    update_TO = F.linear(u_TR, B_OR.to(x_TI.dtype)) * adapter.scaling
    if dropped_TI is x_TI:
        y_TO = (y_TO + update_TO) * ratio_O
    else:
        change_TO = frozen_linear(dropped_TI, weight, None)
        y_TO = y_TO + (ratio_O - 1) * change_TO + ratio_O * update_TO
    return y_TO if module.bias is None else y_TO + module.bias.to(x_TI.dtype)


def frozen_linear(x_TI: Tensor, weight: Tensor | NF4Weight, bias_O: Tensor | None) -> Tensor:
    """x W^T + b in x's dtype. A 4-bit W gets no gradient; it is decoded anew where it is needed."""
    bias_O = None if bias_O is None else bias_O.to(x_TI.dtype)
    if isinstance(weight, NF4Weight):
        return nf4_lora_linear(x_TI, weight, bias_O)
    return F.linear(x_TI, weight.to(x_TI.dtype), bias_O)


def dropout(x_TI: Tensor, keys_T: Tensor, module_key: int, rate: float) -> Tensor:
    """Zero entries with probability `rate`, scale the rest by 1 / (1 - rate).

    Entry (t, i) is decided by a hash of (keys_T[t], module_key, i) alone: recomputation, regrouped
    micro-batches, a resumed run and another device draw the same. keys_T: int64 [T].
    """
    columns_I = torch.arange(x_TI.shape[1], device=x_TI.device)
    bits_TI = mix64((keys_T + module_key).unsqueeze(1) + columns_I * 0x1E3779B97F4A7C15)
    uniform_TI = (bits_TI >> 40) & 0xFFFFFF  # 24 bits
    keep_TI = uniform_TI >= int(rate * 2**24)
    return x_TI * keep_TI * (1.0 / (1.0 - rate))


def mix64(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014) on int64 with wrap-around."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight: statistics in float32, one rounding to x's dtype before the weight."""
    x32_TD = x_TD.float()
    x32_TD = x32_TD * torch.rsqrt(x32_TD.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D.to(x_TD.dtype) * x32_TD.to(x_TD.dtype)


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate_TF) * up_TF


# ------------------------------------------------------------------------------------------- RoPE


def rope_inverse_frequencies(
    rope: RopeConfig, head_dim: int, max_positions: int, length: int = 0
) -> tuple[Tensor, float]:
    """Angular frequencies of rotary embedding (arXiv:2104.09864) and the factor on cos and sin.

    length: tokens of the document; only the `dynamic` type looks at it. Types: default, linear
    (positions divided by factor), dynamic (NTK: theta grows with the length), llama3 (low
    frequencies divided by factor, a linear ramp between), yarn (arXiv:2309.00071).
    Returns (float32 [H/2] on CPU, attention factor).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    theta = rope.rope_theta
    if rope.rope_type == "dynamic":
        # A float32 tensor, as in transformers' forward pass: Python's doubles differ by an ulp.
        longest = torch.tensor(max(length, max_positions))
        stretch = rope.factor * longest / max_positions - (rope.factor - 1)
        theta = theta * stretch ** (head_dim / (head_dim - 2))
    frequencies = 1.0 / (theta**exponents)
    if rope.rope_type == "linear":
        return frequencies / rope.factor, 1.0
    if rope.rope_type == "llama3":
        return _llama3_frequencies(frequencies, rope), 1.0
    if rope.rope_type == "yarn":
        return _yarn_frequencies(exponents, head_dim, rope)
    return frequencies, 1.0


def _llama3_frequencies(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    original = rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    assert original is not None and low is not None and high is not None
    wavelengths = 2 * math.pi / frequencies
    ramp = (original / wavelengths - low) / (high - low)
    blended = (1 - ramp) * frequencies / rope.factor + ramp * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / rope.factor, blended)
    return torch.where(wavelengths < original / high, frequencies, scaled)


def _yarn_frequencies(exponents: Tensor, dim: int, rope: RopeConfig) -> tuple[Tensor, float]:
    original = rope.original_max_position_embeddings
    assert original is not None

    def dimension_of(rotations: float) -> float:
        """The (fractional) dimension whose frequency makes that many turns over the context."""
        return (
            dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))
        )

    def attention_scale(scale: float, mscale: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0

    low, high = dimension_of(rope.beta_fast or 32), dimension_of(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    ramp = ((torch.arange(dim // 2).float() - low) / (high - low)).clamp(0, 1)
    powers = rope.rope_theta**exponents
    kept = 1 - ramp
    frequencies = 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept
    if rope.attention_factor is not None:
        return frequencies, float(rope.attention_factor)
    if rope.mscale and rope.mscale_all_dim:
        ratio = attention_scale(rope.factor, rope.mscale) / attention_scale(
            rope.factor, rope.mscale_all_dim
        )
        return frequencies, float(ratio)
    return frequencies, attention_scale(rope.factor)


def rope_table(
    positions_T: Tensor,
    lengths: tuple[int, ...],
    rope: RopeConfig,
    *,
    head_dim: int,
    max_positions: int,
    dtype: torch.dtype,
    contexts: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's angles, [T, H] in `dtype` (formed in float32, then rounded).

    positions_T: int64 [T], restarting at 0 in every document. lengths: tokens per document.
    contexts: what the `dynamic` type takes for a document's length where some of it is cached.
    """
    if rope.rope_type == "dynamic":
        rows = [
            rope_inverse_frequencies(rope, head_dim, max_positions, context)[0].expand(n, -1)
            for n, context in zip(lengths, contexts or lengths, strict=True)
        ]
        frequencies, factor = torch.cat(rows).to(positions_T.device), 1.0
    else:
        frequencies, factor = rope_inverse_frequencies(rope, head_dim, max_positions)
        frequencies = frequencies.to(positions_T.device).unsqueeze(0)
    return cos_and_sin(positions_T, frequencies, factor, dtype)


def cos_and_sin(
    positions_T: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, [T, H] in dtype. frequencies: float32 [1 or T, H/2]."""
    angles = positions_T.float().unsqueeze(1) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def apply_rope(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotate the two halves of every head (NeoX order) by the token's angles."""
    x1, x2 = x_TNH.chunk(2, dim=-1)
    rotated = torch.cat((-x2, x1), dim=-1)
    return x_TNH * cos_TH.unsqueeze(1) + rotated * sin_TH.unsqueeze(1)


# -------------------------------------------------------------------------------------- attention


def packed_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, documents: Documents) -> Tensor:
    """Causal attention inside each document; nothing crosses a document's border. [T, N, H].

    Documents of one length are a dense batch (SDPA). Others go through PyTorch's variable-length
    flash attention on a GPU in half precision, else through SDPA document by document.
    """
    lengths = documents.lengths
    if len(set(lengths)) == 1:
        shape = (len(lengths), lengths[0])
        q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (q_TNH, k_TKH, v_TKH))
        return _causal_sdpa(q, k, v).transpose(1, 2).flatten(0, 1)
    if q_TNH.is_cuda and q_TNH.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        cu, longest = documents.cu_seqlens, max(lengths)
        return varlen_attn(q_TNH, k_TKH, v_TKH, cu, cu, longest, longest, window_size=(-1, 0))  # pyright: ignore
    splits = (x.split(lengths) for x in (q_TNH, k_TKH, v_TKH))
    out = [
        _causal_sdpa(*(x.transpose(0, 1).unsqueeze(0) for x in qkv)).squeeze(0).transpose(0, 1)
        for qkv in zip(*splits, strict=True)
    ]
    return torch.cat(out)


def _causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
