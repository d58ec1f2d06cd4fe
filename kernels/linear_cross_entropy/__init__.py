"""Cross-entropy from hidden states and output head without materialising the logits."""

from minisft.kernels.linear_cross_entropy.op import linear_cross_entropy, linear_cross_entropy_grad

__all__ = ["linear_cross_entropy", "linear_cross_entropy_grad"]
