"""silu(gate) * up, and its gradients together with the LoRA gradients that need them."""

from minisft.kernels.swiglu.op import swiglu, swiglu_backward_

__all__ = ["swiglu", "swiglu_backward_"]
