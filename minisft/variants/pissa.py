"""PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775): LoRA initialised from parts of the weight.

W = W_residual + s B0 A0. W_residual is frozen; A and B are trained and start as A0 and B0. Relative
to W the trained change is s (B A - B0 A0), a plain LoRA of twice the rank. Every file stores that
LoRA: lora_A = [A; A0], lora_B = [B, -B0].

O/I linear out/in  R LoRA rank  s LoRA scale
"""

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from minisft.config.errors import UserError
from minisft.config.lora import LoraConfig


def initial_lora(path: str, W_OI: Tensor, lora: LoraConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Return (A0 [R, I], B0 [O, R]) of the linear at a path, float32 on W's device.

    pissa: the R largest singular values of W, their roots times the singular vectors in A0 and B0.
    pissa_niter_N: as pissa, by randomised SVD with N power iterations (arXiv:0909.4061). olora: QR
    of W; B0 = R columns of Q, A0 = R rows of the other factor. Raises UserError if W is not finite.
    """
    W_OI, r, kind = W_OI.float(), lora.rank_of(path), lora.init_lora_weights
    if not W_OI.isfinite().all():
        raise UserError(
            f"{path}.weight holds a value that is not finite, so --init-lora-weights {kind} cannot "
            "decompose it; copy or download the model again"
        )
    if kind == "olora":
        Q_OI, R_II = torch.linalg.qr(W_OI)
        return R_II[:r], Q_OI[:, :r]
    if kind == "pissa":
        # Exact but slow: a 2048 x 2048 matrix takes 23 s on two CPU cores, svd_lowrank 0.5 s.
        U_OK, S_K, Vt_KI = torch.linalg.svd(W_OI, full_matrices=False)
    else:
        with torch.random.fork_rng([W_OI.device] if W_OI.is_cuda else []):
            torch.manual_seed(seed)
            # Compute 2 R directions and use R: the last directions of a randomised SVD are inexact.
            K = min(2 * r, *W_OI.shape)
            U_OK, S_K, V_IK = torch.svd_lowrank(W_OI, K, int(kind.rpartition("_")[2]))
        Vt_KI = V_IK.T
    root_R = (S_K[:r] / lora.scaling_of(path)).sqrt()
    return root_R.unsqueeze(1) * Vt_KI[:r], U_OK[:, :r] * root_R


def exported_lora(lora: LoraConfig) -> LoraConfig:
    """Return the config of the adapter file; PiSSA and OLoRA export twice the rank, equal scale."""
    if not lora.splits_weights:
        return lora
    # The scale is alpha / r (rsLoRA: alpha / sqrt(r)) and the rank doubles, so multiply alpha by 2
    # (rsLoRA: by sqrt 2) to leave the scale unchanged.
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
    """Return the tensors of the adapter file. start: A0 and B0 on the CPU, by the names of A, B."""
    tensors = dict(trained)
    for name, initial in start.items():
        half = initial if _is_A(name) else -initial
        tensors[name] = torch.cat([trained[name].detach().cpu(), half], dim=_axis(name))
    return tensors


def trained_half(name: str, tensor: Tensor) -> Tensor:
    """Return a view of the half of a stored lora_A or lora_B that holds the trained A or B."""
    return tensor.chunk(2, _axis(name))[0]


def initial_half(name: str, tensor: Tensor) -> Tensor:
    """Return a copy of the half of a stored lora_A or lora_B that holds the initial A0 or B0."""
    half = tensor.chunk(2, _axis(name))[-1]
    return half.clone() if _is_A(name) else -half


def is_pair(name: str) -> bool:
    """Return whether `name` is that of a lora_A or lora_B tensor."""
    return ".lora_A." in name or ".lora_B." in name


def _is_A(name: str) -> bool:
    return ".lora_A." in name


def _axis(name: str) -> int:
    """Return the dimension of a lora_A or lora_B tensor that has the size of the rank."""
    return 0 if _is_A(name) else 1
