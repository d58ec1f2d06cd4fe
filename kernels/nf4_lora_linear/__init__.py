"""Linear layer with 4-bit W and LoRA, y = x dequant(W)^T + b + s (x A^T) B^T, and its backward."""

from minisft.kernels.nf4_lora_linear.op import backward, forward, nf4_lora_linear
from minisft.kernels.nf4_lora_linear.reference import Adapter

__all__ = ["Adapter", "backward", "forward", "nf4_lora_linear"]
