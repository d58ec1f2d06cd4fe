"""The operations of a Llama block as functions on tensors, in plain PyTorch.

This module defines each operation. The order of computation and the roundings are those of
transformers, so that logits are equal bit for bit. `kernels/rms_norm`, `kernels/rope` and
`kernels/swiglu` have a second PyTorch version of RMSNorm, RoPE and SwiGLU in `reference.py`, which
rounds where the fused Triton kernel rounds; the tests compare the kernel with it.

T tokens of a micro-batch (documents concatenated, no padding)  D hidden  F ffn
N query heads  K key/value heads  H head_dim  I/O linear in/out  R LoRA rank
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.kernels.nf4 import NF4Weight
from minisft.kernels.nf4_lora_linear import nf4_lora_linear
from minisft.variants import dora


class Lora(NamedTuple):
    """The low-rank update of one linear: y += scaling * (x A^T) B^T."""

    A_RI: Tensor
    B_OR: Tensor
    key: int  # identifies the module in the dropout hash
    magnitude_O: Tensor | None = None  # DoRA only: the trained length of each output row


class Linear(NamedTuple):
    """One projection: a frozen or trained weight [O, I], an optional bias [O], an optional LoRA."""

    weight: Tensor | NF4Weight
    bias: Tensor | None
    lora: Lora | None


class Documents(NamedTuple):
    """Document boundaries of a micro-batch: document i is tokens cu_seqlens[i]:cu_seqlens[i+1].

    All fields but cu_seqlens are Python numbers, so that nothing is read back from the device. To
    reuse one CUDA graph for many batches, `explicit.buckets` rounds `longest` up and appends empty
    documents: cu_seqlens repeats its last entry, and `lengths` leaves them out.
    """

    cu_seqlens: Tensor  # int32 [documents + 1], on the device
    lengths: tuple[int, ...]
    longest: int  # an upper bound of the lengths
    uniform: int  # the length that all documents have; 0 if they differ


def documents_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Documents:
    """Build the Documents of a micro-batch whose documents have these lengths, in order."""
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    uniform = lengths[0] if len(set(lengths)) == 1 else 0
    return Documents(cu.to(device), tuple(lengths), max(lengths, default=0), uniform)


class LoraContext(NamedTuple):
    """LoRA scale and dropout, shared by all linears of a forward pass."""

    scaling: float
    dropout: float  # rate
    keys_T: Tensor | None  # int64 dropout keys of the tokens; None: no dropout


def linear(x_TI: Tensor, module: Linear, lora_ctx: LoraContext) -> Tensor:
    """Return x W^T + b, plus scaling * (dropout(x) A^T) B^T if the module has an adapter.

    x_TI has the compute dtype; weights and the float32 A and B are cast to it. Returns [T, O] in
    x's dtype. A module with a DoRA magnitude follows the formula in `minisft.variants.dora`.
    """
    if module.lora is None:
        return frozen_linear(x_TI, module.weight, module.bias)
    if module.lora.magnitude_O is not None:
        return _dora_linear(x_TI, module, module.lora, module.lora.magnitude_O, lora_ctx)
    A_RI, B_OR, key, _ = module.lora
    A_RI, B_OR = A_RI.to(x_TI.dtype), B_OR.to(x_TI.dtype)
    if isinstance(module.weight, NF4Weight) and lora_ctx.keys_T is None:
        # A fused op for W and LoRA. Both read the same x, so it cannot be used with LoRA dropout.
        bias = None if module.bias is None else module.bias.to(x_TI.dtype)
        return nf4_lora_linear(x_TI, module.weight, bias, A_RI, B_OR, lora_ctx.scaling)
    y_TO = frozen_linear(x_TI, module.weight, module.bias)
    if lora_ctx.keys_T is not None:
        x_TI = dropout(x_TI, lora_ctx.keys_T, key, lora_ctx.dropout)
    # As in PEFT, scale the product rather than x or A: the roundings must be the same.
    return y_TO + F.linear(F.linear(x_TI, A_RI), B_OR) * lora_ctx.scaling


def _dora_linear(
    x_TI: Tensor, module: Linear, lora: Lora, magnitude_O: Tensor, lora_ctx: LoraContext
) -> Tensor:
    A_RI, B_OR, key, _ = lora
    dtype, dropped_y_TO = x_TI.dtype, None
    ratio_O = dora.magnitude_ratio(module.weight, A_RI, B_OR, magnitude_O, lora_ctx.scaling, dtype)
    # Add the bias after rescaling: the ratio scales the rows of W, but not b.
    y_TO = frozen_linear(x_TI, module.weight, None)
    if lora_ctx.keys_T is not None and lora_ctx.dropout:
        x_TI = dropout(x_TI, lora_ctx.keys_T, key, lora_ctx.dropout)
        dropped_y_TO = frozen_linear(x_TI, module.weight, None)
    update_TO = F.linear(F.linear(x_TI, A_RI.to(dtype)), B_OR.to(dtype)) * lora_ctx.scaling
    y_TO = dora.rescale(y_TO, update_TO, ratio_O, dropped_y_TO)
    return y_TO if module.bias is None else y_TO + module.bias.to(dtype)


def frozen_linear(x_TI: Tensor, weight: Tensor | NF4Weight, bias_O: Tensor | None) -> Tensor:
    """Return x W^T + b, [T, O] in x's dtype.

    A 4-bit weight gets no gradient; both the forward and the backward pass decode it.
    """
    bias_O = None if bias_O is None else bias_O.to(x_TI.dtype)
    if isinstance(weight, NF4Weight):
        return nf4_lora_linear(x_TI, weight, bias_O)
    return F.linear(x_TI, weight.to(x_TI.dtype), bias_O)


def dropout(x_TI: Tensor, keys_T: Tensor, module_key: int, rate: float) -> Tensor:
    """Zero entries of x with probability `rate` and scale the others by 1 / (1 - rate).

    keys_T: int64 [T], one key per token. The mask at (t, i) is a hash of keys_T[t], module_key, i.
    """
    # A hash instead of a random generator: activation checkpointing, another split into
    # micro-batches, a resumed run and another device all get the same mask, and there is no
    # generator state to save.
    keep_TI = random_bits(keys_T, module_key, x_TI.shape[1]) >= int(rate * 2**24)
    return x_TI * keep_TI * (1.0 / (1.0 - rate))


def random_bits(keys_T: Tensor, module_key: int, width: int) -> Tensor:
    """Hash (token key, module key, column) to 24 pseudo-random bits per entry, int64 [T, width]."""
    # The golden-ratio increment of splitmix64 without its top bit, which int64 cannot hold.
    columns = torch.arange(width, device=keys_T.device) * 0x1E3779B97F4A7C15
    # Take the high bits of the hash, and only 24, which float32 represents exactly.
    return (mix64((keys_T + module_key).unsqueeze(1) + columns) >> 40) & 0xFFFFFF


def module_key(path: str) -> int:
    """Return a 62-bit number that identifies the module at that path in the dropout hash."""
    # Python salts hash() per process, but a resumed run must compute the same dropout masks.
    return int.from_bytes(blake2b(path.encode(), digest_size=8).digest(), "big") >> 2


def mix64(x: Tensor) -> Tensor:
    """Apply splitmix64's final mixing function (Steele, Lea, Flood 2014) to each int64 entry."""
    # torch has no unsigned shift: >> copies the sign bit, and the masks clear the copies. The
    # multipliers are the published constants as signed 64-bit numbers.
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * weight, [T, D] in x's dtype; rms(x) = sqrt(mean(x^2) + eps)."""
    # Compute the mean square in float32: the square of 6e4 overflows float16.
    x32_TD = x_TD.float()
    x32_TD = x32_TD * torch.rsqrt(x32_TD.pow(2).mean(-1, keepdim=True) + eps)
    # As in transformers, round the normalised x to the compute dtype before applying the weight.
    return weight_D.to(x_TD.dtype) * x32_TD.to(x_TD.dtype)


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """Return silu(gate) * up (arXiv:2002.05202), [T, F]; silu(gate) is rounded to gate's dtype."""
    return F.silu(gate_TF) * up_TF


def apply_rope(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotate the channel pairs (i, i + H/2) of every head by the token's angles, [T, N, H].

    cos_TH, sin_TH: from `minisft.rope.rope_table`, in x's dtype; the rotation is computed in it.
    """
    x1, x2 = x_TNH.chunk(2, dim=-1)
    rotated = torch.cat((-x2, x1), dim=-1)
    return x_TNH * cos_TH.unsqueeze(1) + rotated * sin_TH.unsqueeze(1)


def packed_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, documents: Documents) -> Tensor:
    """Compute causal attention within each document; return [T, N, H] in q's dtype.

    Softmax scale 1 / sqrt(H); each key/value head serves N / K query heads.
    """
    lengths = documents.lengths
    if len(set(lengths)) == 1:
        # Equal lengths form a dense batch, which faster kernels accept: on an H200 with H = 128 and
        # documents of 2,048 tokens, 510 TFLOP/s forward (cuDNN) instead of 279 (varlen_attn).
        shape = (len(lengths), lengths[0])
        q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (q_TNH, k_TKH, v_TKH))
        return _causal_sdpa(q, k, v).transpose(1, 2).flatten(0, 1)
    if q_TNH.is_cuda and q_TNH.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        cu, longest = documents.cu_seqlens, max(lengths)
        # window_size (-1, 0) means causal: all tokens to the left are visible, none to the right.
        return varlen_attn(q_TNH, k_TKH, v_TKH, cu, cu, longest, longest, window_size=(-1, 0))  # pyright: ignore
    # varlen_attn supports CUDA and half precision only; otherwise, call SDPA for each document.
    splits = (x.split(lengths) for x in (q_TNH, k_TKH, v_TKH))
    out = [
        _causal_sdpa(*(x.transpose(0, 1).unsqueeze(0) for x in qkv)).squeeze(0).transpose(0, 1)
        for qkv in zip(*splits, strict=True)
    ]
    return torch.cat(out)


def _causal_sdpa(q_BNSH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor) -> Tensor:
    gqa = q_BNSH.shape[1] != k_BKSH.shape[1]
    return F.scaled_dot_product_attention(q_BNSH, k_BKSH, v_BKSH, is_causal=True, enable_gqa=gqa)
