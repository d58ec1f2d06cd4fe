"""silu(gate) * up, and its gradients with those LoRA sums over tokens that need them."""

from minisft.kernels.swiglu.op import swiglu, swiglu_backward_

__all__ = ["swiglu", "swiglu_backward_"]
