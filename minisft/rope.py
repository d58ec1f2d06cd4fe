"""Rotary position embedding: the frequencies of five RoPE types, cos and sin of every token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minisft.config.model import RopeConfig


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
