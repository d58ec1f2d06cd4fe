"""RoPE of queries and keys in place, and its backward pass fused with LoRA's gradients dB."""

from minisft.kernels.rope.op import rope_, rope_backward

__all__ = ["rope_", "rope_backward"]
