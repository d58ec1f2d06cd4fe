"""Shapes, dtypes and inputs shared by the test and the benchmark of linear_cross_entropy."""

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """One problem size: M rows (each with a target), hidden size D, vocabulary size V."""

    M: int
    D: int
    V: int


class Inputs(NamedTuple):
    """Arguments of the op: hidden [M, D] and head [V, D] of one dtype, targets [M] int64."""

    hidden_MD: Tensor
    head_VD: Tensor
    targets_M: Tensor


# Test sizes for a CPU: 1, primes, block sizes, and neighbours of block sizes.
SMALL = {
    "one of each": Case(1, 1, 1),
    "one row": Case(1, 63, 1000),
    "one class": Case(17, 8, 1),
    "odd": Case(63, 33, 1001),
    "block": Case(64, 64, 512),
    "block and one": Case(65, 32, 257),
    "primes": Case(131, 47, 97),
}
# Benchmark sizes: the heads of Llama-3.2-1B and Llama-3.1-8B with one micro-batch.
LLAMA = {
    "1B, 2048 rows": Case(2048, 2048, 128256),
    "1B, 8192 rows": Case(8192, 2048, 128256),
    "8B, 4096 rows": Case(4096, 4096, 128256),
    "8B, 8192 rows": Case(8192, 4096, 128256),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_inputs(
    case: Case,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    logit_scale: float = 3.0,
) -> Inputs:
    """Return random inputs; logits have standard deviation logit_scale (2 to 4 in real models)."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    hidden_MD = normal(case.M, case.D)
    head_VD = normal(case.V, case.D) * (logit_scale / case.D**0.5)
    targets_M = torch.randint(case.V, (case.M,), device=device, generator=generator)
    return Inputs(hidden_MD.to(dtype), head_VD.to(dtype), targets_M)
