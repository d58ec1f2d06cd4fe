"""Tensors in, tensors out: the operations that a Llama block is made of.

T tokens of a micro-batch (all rows side by side)  D hidden  N query heads  K key/value heads
H head_dim  F ffn  I/O linear in/out  R lora rank

Orders of operations and roundings are those of transformers, so that logits are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.kernels.nf4 import (
    NF4Weight,
    dequantize,
)
from minisft.kernels.nf4_lora_linear import nf4_lora_linear


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
    """How the documents of a micro-batch lie: document i is tokens cu_seqlens[i]:cu_seqlens[i+1].

    All but cu_seqlens are Python numbers, so that nothing is read back from the device. Built by
    `documents_of`; `explicit.buckets` appends empty documents (cu_seqlens repeats its last entry,
    lengths leaves them out) and rounds `longest` up, so that one CUDA graph serves many batches.
    """

    cu_seqlens: Tensor  # int32 [documents + 1], on the device
    lengths: tuple[int, ...]
    longest: int  # an upper bound of the lengths
    uniform: int  # the length that all documents have; 0 if they differ


def documents_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Documents:
    """The documents of these lengths, one after the other."""
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    uniform = lengths[0] if len(set(lengths)) == 1 else 0
    return Documents(cu.to(device), tuple(lengths), max(lengths, default=0), uniform)


class LoraContext(NamedTuple):
    """What all adapted linears share: LoRA scale, dropout rate, and the tokens' dropout keys."""

    scaling: float
    dropout: float
    keys_T: Tensor | None


def linear(x_TI: Tensor, module: Linear, adapter: LoraContext) -> Tensor:
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


def dora_linear(x_TI: Tensor, module: Linear, adapter: LoraContext) -> Tensor:
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


def apply_rope(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotate the two halves of every head (NeoX order) by the token's angles."""
    x1, x2 = x_TNH.chunk(2, dim=-1)
    rotated = torch.cat((-x2, x1), dim=-1)
    return x_TNH * cos_TH.unsqueeze(1) + rotated * sin_TH.unsqueeze(1)


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
