"""Problem sizes shared by the test and the benchmark of nf4_lora_linear."""

from typing import NamedTuple


class Case(NamedTuple):
    """One problem size: M rows of I inputs, a weight [O, I], an adapter of rank R (0: none)."""

    M: int
    I: int
    O: int
    R: int


# Cases of the fused product: one row, partial tiles, 64 rows (its maximum), rank 256, no adapter.
SMALL = (
    Case(1, 64, 1, 1), Case(16, 128, 70, 16), Case(37, 192, 130, 3), Case(64, 256, 65, 256),
    Case(5, 64, 64, 0),
)  # fmt: skip
# Cases that the fused product rejects: quantisation blocks that cross rows, more than 64 rows.
DECODED_ONLY = (Case(3, 33, 7, 2), Case(130, 64, 40, 4))
# Cases of the joined product: 16-byte aligned rows, partial tiles, several tiles, ranks 1 to 256.
JOINED = (
    Case(1, 64, 8, 1), Case(130, 72, 520, 16), Case(300, 192, 264, 40), Case(37, 8, 16, 256),
    Case(1471, 16, 264, 2), Case(8193, 8, 16, 2),
)  # fmt: skip
# A case with O = 4 I and a rank that is not a multiple of 8.
RAGGED_RANK = Case(9, 64, 256, 5)

# [out, in] of Llama 1B and 8B projections; row counts from one token to a packed micro-batch.
BENCH_SHAPES = (
    (2048, 2048), (16384, 2048), (2048, 8192), (4096, 4096), (14336, 4096), (4096, 14336),
)  # fmt: skip
BENCH_ROWS = (1, 16, 64, 256, 1024, 4096, 16384)
