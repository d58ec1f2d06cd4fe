"""Sizes shared by the test and the benchmark: rows, inputs, outputs and the adapter's rank."""

from typing import NamedTuple


class Case(NamedTuple):
    """M rows of I inputs through a weight [O, I] with an adapter of rank R (0: none)."""

    M: int
    I: int
    O: int
    R: int


# One row, ragged tiles, the most rows of the fused product, large ranks, no adapter.
SMALL = (
    Case(1, 64, 1, 1), Case(16, 128, 70, 16), Case(37, 192, 130, 3), Case(64, 256, 65, 256),
    Case(5, 64, 64, 0),
)  # fmt: skip
# Not for the fused product: quantisation blocks across rows; more than 64 rows.
DECODED_ONLY = (Case(3, 33, 7, 2), Case(130, 64, 40, 4))
# For the joined product: 16-byte aligned rows; ragged tiles, several tiles, small to full rank.
JOINED = (
    Case(1, 64, 8, 1), Case(130, 72, 520, 16), Case(300, 192, 264, 40), Case(37, 8, 16, 256),
    Case(1471, 16, 264, 2), Case(8193, 8, 16, 2),
)  # fmt: skip
# Four times as many outputs as inputs, and a rank that is not a multiple of 8.
RAGGED_RANK = Case(9, 64, 256, 5)

# Projections of Llama 1B and 8B, [out, in], and rows from one token to a packed micro-batch.
BENCH_SHAPES = (
    (2048, 2048), (16384, 2048), (2048, 8192), (4096, 4096), (14336, 4096), (4096, 14336),
)  # fmt: skip
BENCH_ROWS = (1, 16, 64, 256, 1024, 4096, 16384)
