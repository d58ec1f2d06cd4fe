"""Ops for LoRA's low-rank factors: narrow matmuls, sums over tokens, and their memory layout."""

from minisft.kernels.low_rank.op import (
    as_one_stack,
    empty_rows,
    narrow_products,
    outer_sum,
    place_block_diagonal,
    reduce_partials,
    row_stride,
)
from minisft.kernels.low_rank.reference import LowRank

__all__ = [
    "LowRank", "as_one_stack", "empty_rows", "narrow_products", "outer_sum", "place_block_diagonal",
    "reduce_partials", "row_stride",
]  # fmt: skip
