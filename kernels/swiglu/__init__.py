"""SwiGLU, silu(gate) * up, and its backward pass fused with LoRA's dB and dA."""

from minisft.kernels.swiglu.op import swiglu, swiglu_backward_

__all__ = ["swiglu", "swiglu_backward_"]
