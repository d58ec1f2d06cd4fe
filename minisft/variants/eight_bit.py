"""Optimizer moments in 8 bits, updated by bitsandbytes' kernels (arXiv:2110.02861).

A moment has one uint8 code per entry, an index into a table of 256 values, and one float32 scale
per block of 256 entries. bitsandbytes is imported when an 8-bit optimizer is first used.
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
    """One optimizer moment of n parameters: codes uint8 [n], scales float32 [ceil(n / 256)]."""

    codes: Tensor
    scales: Tensor


def zero_moment(n: int, device: torch.device, paged: bool) -> Moment:
    """Return a zero moment of n parameters, as before the first step.

    paged: allocate GPU codes in CUDA managed memory, which the driver moves to the host and back.
    """
    codes = torch.zeros(n, dtype=torch.uint8, device=device)
    if paged and codes.is_cuda:
        functional = import_bitsandbytes()
        codes = functional.get_paged(n, dtype=torch.uint8, device=codes.device)
        # get_paged returns uninitialised memory.
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
    """Update p and the moments in place by one AdamW step (two moments) or Lion step (one moment).

    p, g: contiguous float32 [n]. step counts from 1. The config has betas and epsilon.
    """
    functional, signed, unsigned = _functions_and_tables(p.device)
    (m, m_scales), (v, v_scales) = moments if len(moments) == 2 else (*moments, (None, None))
    # The second moment is never negative, so its table (unsigned) has no negative values.
    functional.optimizer_update_8bit_blockwise(
        "lion" if v is None else "adam", g, p, m, v, config.adam_beta1, config.adam_beta2, 0.0, 0.0,
        config.adam_epsilon, step, learning_rate, signed, None if v is None else unsigned,
        m_scales, v_scales, weight_decay=weight_decay,
    )  # fmt: skip


def import_bitsandbytes() -> Any:
    """Return bitsandbytes.functional. Raises UserError if it cannot be imported."""
    # On a CPU, bitsandbytes imports PyPI's `kernels`, finds this project's folder, and warns.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    # A missing or mismatched CUDA library raises OSError or RuntimeError instead of ImportError.
    except (ImportError, OSError, RuntimeError) as e:
        raise UserError(
            f"--optim: the 8-bit optimizers need bitsandbytes, which cannot be imported ({e}); "
            "install it, or use --optim adamw"
        ) from None
    return functional


# Cache the two tables of a device: they are constant, and every step needs them for each group.
@functools.cache
def _functions_and_tables(device: torch.device) -> tuple[Any, Tensor, Tensor]:
    functional = import_bitsandbytes()
    signed = functional.create_dynamic_map(signed=True).to(device)
    unsigned = functional.create_dynamic_map(signed=False).to(device)
    return functional, signed, unsigned
