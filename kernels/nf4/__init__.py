"""Quantise and decode 4-bit weights in bitsandbytes' formats: NF4, FP4, double quantisation."""

from minisft.kernels.nf4.op import (
    dequantize,
    dequantize_concat_columns_B,
    dequantize_concat_rows_A,
    dequantize_into,
)
from minisft.kernels.nf4.reference import NF4Weight, quantize, side_by_side

__all__ = [
    "NF4Weight", "dequantize", "dequantize_concat_columns_B", "dequantize_concat_rows_A",
    "dequantize_into", "quantize", "side_by_side",
]  # fmt: skip
