"""Cross-entropy of a linear head without the [rows, vocab] logits."""

from kernels.linear_cross_entropy.op import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
