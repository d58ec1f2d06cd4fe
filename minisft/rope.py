"""Rotary position embedding (arXiv:2104.09864): frequencies of five RoPE types, cos/sin tables.

Operations and roundings match transformers. The rotation is `minisft.nn.apply_rope`. H: head_dim.
"""

import math

import torch
from torch import Tensor

from minisft.config.model import RopeConfig


def rope_inverse_frequencies(
    rope: RopeConfig, head_dim: int, max_positions: int, length: int = 0
) -> tuple[Tensor, float]:
    """Return angular frequencies, float32 [H/2] on the CPU, and the factor on cos and sin.

    length: tokens of the document, used by the `dynamic` type only. Types: default; linear
    (frequencies divided by factor); dynamic (NTK: theta grows if length exceeds max_positions);
    llama3 (low frequencies divided by factor, middle ones blended); yarn (arXiv:2309.00071).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    theta = rope.rope_theta
    if rope.rope_type == "dynamic":
        # A float32 tensor, as in transformers' forward pass; a Python float differs by one ulp.
        longest = torch.tensor(max(length, max_positions))
        stretch = rope.factor * longest / max_positions - (rope.factor - 1)
        theta = theta * stretch ** (head_dim / (head_dim - 2))
    frequencies = 1.0 / (theta**exponents)
    if rope.rope_type == "linear":
        return frequencies / rope.factor, 1.0
    if rope.rope_type == "llama3":
        return _llama3_frequencies(frequencies, rope), 1.0
    if rope.rope_type == "yarn":
        return _yarn_frequencies(exponents, head_dim, rope), _yarn_attention_factor(rope)
    return frequencies, 1.0


def _llama3_frequencies(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Divide low frequencies by rope.factor, leave high ones unchanged, and blend in between."""
    original = rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    assert original is not None and low is not None and high is not None
    wavelengths = 2 * math.pi / frequencies
    ramp = (original / wavelengths - low) / (high - low)
    blended = (1 - ramp) * frequencies / rope.factor + ramp * frequencies
    # Outside the ramp use f / factor or f, as transformers does: a clamped ramp would round them.
    scaled = torch.where(wavelengths > original / low, frequencies / rope.factor, blended)
    return torch.where(wavelengths < original / high, frequencies, scaled)


def _yarn_frequencies(exponents: Tensor, dim: int, rope: RopeConfig) -> Tensor:
    """Divide low frequencies by rope.factor, leave high ones unchanged, and blend in between."""
    original = rope.original_max_position_embeddings
    assert original is not None

    def pair_of(turns: float) -> float:
        """Return the (fractional) channel pair that rotates `turns` times over the context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    # The YaRN paper recommends beta_fast = 32 and beta_slow = 1 for Llama.
    low, high = pair_of(rope.beta_fast or 32), pair_of(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0  # an empty ramp would divide by zero
    ramp = ((torch.arange(dim // 2).float() - low) / (high - low)).clamp(0, 1)
    powers = rope.rope_theta**exponents
    unscaled = 1 - ramp
    # As in transformers, compute 1 - (1 - ramp), which differs from ramp in the last bits.
    return 1.0 / (rope.factor * powers) * (1 - unscaled) + 1.0 / powers * unscaled


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """Return YaRN's factor on cos and sin; attention scores are scaled by its square."""
    if rope.attention_factor is not None:
        return float(rope.attention_factor)
    log = math.log(rope.factor) if rope.factor > 1 else 0.0
    if rope.mscale and rope.mscale_all_dim:
        return float((0.1 * rope.mscale * log + 1.0) / (0.1 * rope.mscale_all_dim * log + 1.0))
    return 0.1 * log + 1.0


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
    """Return cos and sin of the angles of every token, [T, H] each in dtype.

    positions_T: int64, from 0 in every document. lengths: tokens per document. The `dynamic` type
    scales each document by its length, or by `contexts`, its length including cached tokens.
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
    """Return factor * cos and factor * sin of position * frequency [1 or T, H/2], [T, H] each."""
    # Compute angles in float32: bfloat16 has 8 bits of precision, and a position needs more.
    angles = (positions_T.float().unsqueeze(1) * frequencies).repeat(1, 2)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
