"""Shapes, dtypes and inputs shared by the tests and the benchmark of the 4-bit ops."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Test shapes: rows of full blocks, blocks or words that cross rows, odd numbers of weights.
SHAPES = ((128, 64), (100, 192), (16, 48), (3, 8), (7, 30), (5, 33))
# [out, in] of Llama 1B and 8B projections, some of them concatenated (q+k+v, gate+up).
BENCH_SHAPES = (
    (2048, 2048), (4096, 4096), (6144, 4096), (14336, 4096), (4096, 14336),
    (16384, 2048), (28672, 4096),
)  # fmt: skip


def make_weight(shape: tuple[int, int], device: str = "cpu", seed: int = 0) -> Tensor:
    """Return normally distributed float32 weights; one block is zero, one is scaled by 100."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.02
    flat = weight.view(-1)
    flat[:64] = 0
    flat[64:128] *= 100
    return weight.to(device)
