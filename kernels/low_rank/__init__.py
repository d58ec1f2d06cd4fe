"""The skinny products of LoRA: what other kernels add on the fly, and the sums over tokens."""

from minisft.kernels.low_rank.op import (
    LowRank,
    empty_rows,
    narrow_products,
    outer_sum,
    place_block_diagonal,
    reduce_partials,
    row_stride,
)

__all__ = [
    "LowRank", "empty_rows", "narrow_products", "outer_sum", "place_block_diagonal",
    "reduce_partials", "row_stride",
]  # fmt: skip
