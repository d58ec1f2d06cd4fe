"""4-bit weights in bitsandbytes' formats: NF4 and FP4, single and double quantisation."""

from minisft.kernels.nf4.op import (
    dequantize,
    dequantize_into,
    dequantize_with_A_below,
    dequantize_with_B_beside,
)
from minisft.kernels.nf4.reference import NF4Weight, quantize, side_by_side

__all__ = [
    "NF4Weight", "dequantize", "dequantize_into", "dequantize_with_A_below",
    "dequantize_with_B_beside", "quantize", "side_by_side",
]  # fmt: skip
