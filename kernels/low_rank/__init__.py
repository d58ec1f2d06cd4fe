"""The skinny products of LoRA: what other kernels add on the fly, and the sums over tokens."""

from kernels.low_rank.op import (
    LowRank,
    narrow_products,
    outer_sum,
    place_block_diagonal,
    reduce_partials,
)

__all__ = ["LowRank", "narrow_products", "outer_sum", "place_block_diagonal", "reduce_partials"]
