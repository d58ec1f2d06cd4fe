"""PiSSA and OLoRA: adapters that start as a part of their weight, beside a frozen rest.

W = W_rest + s B0 A0: W_rest is frozen, and A and B, which are trained, start as A0 and B0
(arXiv:2404.02948, arXiv:2406.01775). Seen from W, s (B A - B0 A0) is a plain adapter of twice the
rank, and such is every file: lora_A holds A above A0, lora_B holds B beside -B0.

O/I linear out/in  R lora rank  s its scale
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from minisft.config.errors import UserError
from minisft.config.lora import LoraConfig


def initial_lora(path: str, W_OI: Tensor, lora: LoraConfig, seed: int) -> tuple[Tensor, Tensor]:
    """(A0 [R, I], B0 [O, R]) of the linear at a path, float32 on W's device.

    pissa: the R largest singular values of W and their vectors, the values' roots on either side;
    pissa_niter_N: the same by a randomised SVD of N power iterations (arXiv:0909.4061), drawn from
    the seed. olora: the first R columns of Q and rows of R of W = Q R.
    UserError if W is not finite.
    """
    W_OI, r, kind = W_OI.float(), lora.rank_of(path), lora.init_lora_weights
    if not W_OI.isfinite().all():
        raise UserError(
            f"{path}.weight holds a value that is not finite, and --init-lora-weights {kind} "
            "starts from its largest part; copy or download the model again"
        )
    if kind == "olora":
        Q_OI, R_II = torch.linalg.qr(W_OI)
        return R_II[:r], Q_OI[:, :r]
    if kind == "pissa":
        U_OK, S_K, Vt_KI = torch.linalg.svd(W_OI, full_matrices=False)
    else:
        with torch.random.fork_rng([W_OI.device] if W_OI.is_cuda else []):
            torch.manual_seed(seed)
            wider = min(2 * r, *W_OI.shape)  # than R: the last directions come out true as well
            U_OK, S_K, V_IK = torch.svd_lowrank(W_OI, wider, int(kind.rpartition("_")[2]))
        Vt_KI = V_IK.T
    root_R = (S_K[:r] / lora.scaling_of(path)).sqrt()
    return root_R.unsqueeze(1) * Vt_KI[:r], U_OK[:, :r] * root_R


def exported_lora(lora: LoraConfig) -> LoraConfig:
    """What a file says of an adapter: for PiSSA and OLoRA every rank doubled, every scale kept."""
    if not lora.splits_weights:
        return lora
    factor = math.sqrt(2) if lora.use_rslora else 2
    return dataclasses.replace(
        lora,
        r=2 * lora.r,
        lora_alpha=factor * lora.lora_alpha,
        rank_pattern=tuple((key, 2 * r) for key, r in lora.rank_pattern),
        alpha_pattern=tuple((key, factor * alpha) for key, alpha in lora.alpha_pattern),
        init_lora_weights="default",
    )


def exported_tensors(
    trained: Mapping[str, Tensor], start: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of that adapter. start: A0 and B0 under the names of A and B."""
    tensors = dict(trained)
    for name, first in start.items():
        below = first if _is_A(name) else -first
        tensors[name] = torch.cat([trained[name].detach().cpu(), below], dim=_axis(name))
    return tensors


def trained_half(name: str, tensor: Tensor) -> Tensor:
    """A or B of a lora_A or lora_B in a file."""
    return tensor.chunk(2, _axis(name))[0]


def initial_half(name: str, tensor: Tensor) -> Tensor:
    """Return A0 or B0 of a lora_A or lora_B in a file, in memory of its own."""
    half = tensor.chunk(2, _axis(name))[-1]
    return half.clone() if _is_A(name) else -half


def is_pair(name: str) -> bool:
    """Whether it names an A or a B."""
    return ".lora_A." in name or ".lora_B." in name


def _is_A(name: str) -> bool:
    return ".lora_A." in name


def _axis(name: str) -> int:
    """That of the rank."""
    return 0 if _is_A(name) else 1
