"""Optimizer moments in 8 bits, updated by bitsandbytes' kernels (arXiv:2110.02861).

A moment is one uint8 code per entry, an index into a table of 256 values, and one float32 scale per
block of 256 entries. bitsandbytes is imported when such an optimizer is first used.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minisft.config.errors import UserError
from minisft.config.train import TrainConfig

_BLOCK = 256  # entries per scale


class Moment(NamedTuple):
    """One moment of n parameters: codes uint8 [n], scales float32 [ceil(n / 256)]."""

    codes: Tensor
    scales: Tensor


def zero_moment(n: int, device: torch.device, paged: bool) -> Moment:
    """Return the moment of n parameters before the first step.

    paged: allocate codes on a GPU in managed memory, which the driver moves to the host and back.
    """
    codes = torch.zeros(n, dtype=torch.uint8, device=device)
    if paged and codes.is_cuda:
        functional = import_bitsandbytes()
        codes = functional.get_paged(n, dtype=torch.uint8, device=codes.device)
        # Managed memory comes uninitialised.
        functional.fill(codes, 0)
    return Moment(codes, torch.zeros(-(-n // _BLOCK), dtype=torch.float32, device=device))


def eight_bit_(
    p: Tensor,
    g: Tensor,
    moments: Sequence[Moment],
    config: TrainConfig,
    step: int,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """One AdamW step (two moments) or Lion step (one moment) in place, on p and the codes.

    p, g: contiguous float32 [n]. step counts from 1. Betas and epsilon are config's.
    """
    functional, signed, unsigned = _functions_and_tables(p.device)
    (m, m_scales), (v, v_scales) = moments if len(moments) == 2 else (*moments, (None, None))
    # The second moment is never negative: its table spends no codes on negative values.
    functional.optimizer_update_8bit_blockwise(
        "lion" if v is None else "adam", g, p, m, v, config.adam_beta1, config.adam_beta2, 0.0, 0.0,
        config.adam_epsilon, step, learning_rate, signed, None if v is None else unsigned,
        m_scales, v_scales, weight_decay=weight_decay,
    )  # fmt: skip


def import_bitsandbytes() -> Any:
    """Return bitsandbytes.functional. Raises UserError if it cannot be imported."""
    # bitsandbytes looks for PyPI's package `kernels` on a CPU, finds this project's, and warns.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    # A missing or mismatched CUDA library shows up as OSError or RuntimeError, not ImportError.
    except (ImportError, OSError, RuntimeError) as e:
        raise UserError(
            f"--optim: the 8-bit optimizers need bitsandbytes, which cannot be imported ({e}); "
            "install it, or use --optim adamw"
        ) from None
    return functional


# Cached: a step calls eight_bit_ once per group, and the two tables of a device never change.
@functools.cache
def _functions_and_tables(device: torch.device) -> tuple[Any, Tensor, Tensor]:
    functional = import_bitsandbytes()
    signed = functional.create_dynamic_map(signed=True).to(device)
    unsigned = functional.create_dynamic_map(signed=False).to(device)
    return functional, signed, unsigned
