"""RoPE of queries and keys in place, and its inverse together with the LoRA gradients dB."""

from minisft.kernels.rope.op import rope_, rope_backward

__all__ = ["rope_", "rope_backward"]
