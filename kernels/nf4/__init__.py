"""4-bit weights in bitsandbytes' formats: NF4 and FP4, single and double quantisation."""

from kernels.nf4.op import dequantize, dequantize_into
from kernels.nf4.reference import NF4Weight, quantize, side_by_side

__all__ = ["NF4Weight", "dequantize", "dequantize_into", "quantize", "side_by_side"]
