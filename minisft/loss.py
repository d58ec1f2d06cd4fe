"""From a micro-batch to its summed loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minisft.batches import MicroBatch
from minisft.kernels.linear_cross_entropy import linear_cross_entropy
from minisft.llama import Compute, Weights, head_weight, hidden_states


def loss_sum(trainable: Weights, frozen: Weights, batch: MicroBatch, compute: Compute) -> Tensor:
    """Sum of the loss over the micro-batch's targets, in nats, [] float32: -log p(target) by nll.

    Only hidden states that predict something go through the head; logits never exist as a whole.
    A micro-batch without targets is exactly 0.
    """
    h_TD = hidden_states(trainable, frozen, batch.tokens, compute)
    head_VD = head_weight(trainable, frozen, compute.model, compute.dtype)
    h_MD = h_TD[batch.target_rows_M]
    if compute.loss_type == "nll" and not compute.label_smoothing:
        return linear_cross_entropy(h_MD, head_VD, batch.targets_M)
    total = h_MD.new_zeros((), dtype=torch.float32)
    chunk = rows_of_logits(head_VD.shape[0])
    for h_CD, targets_C in zip(h_MD.split(chunk), batch.targets_M.split(chunk), strict=True):
        total = total + checkpoint(  # a chunk's logits are made again in the backward pass
            variant_sum, h_CD, head_VD, targets_C, compute.loss_type, compute.label_smoothing,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
    return total


def variant_sum(
    h_CD: Tensor, head_VD: Tensor, targets_C: Tensor, loss_type: str, smoothing: float
) -> Tensor:
    """Summed loss of one chunk of rows, [] float32.

    Smoothing: (1 - s) of -log p(target), s of the mean of -log p over the vocabulary. dft: -log p
    times p, through which no gradient flows.
    """
    log_p_CV = (h_CD @ head_VD.T).float().log_softmax(1)
    log_p_C = log_p_CV.gather(1, targets_C.unsqueeze(1)).squeeze(1)
    if loss_type == "dft":
        return -(log_p_C * log_p_C.detach().exp()).sum()
    return -((1 - smoothing) * log_p_C + smoothing * log_p_CV.mean(1)).sum()


def rows_of_logits(V: int) -> int:
    """How many rows of float32 logits are about 256 MiB."""
    return max(64, min(4096, 2**26 // V))


def rows_evaluated(V: int) -> int:
    """How many an evaluation takes at a time: about 64 MiB, since nothing is gained by more."""
    return -(-rows_of_logits(V) // 4)


class Evaluation(NamedTuple):
    """Means over the targets of an evaluation; without targets they are nan."""

    loss: float  # -log p(target), nats
    entropy: float  # of the predicted distribution, nats
    accuracy: float  # share of targets that are the likeliest token
    count: int  # targets


@torch.no_grad()
def evaluation(
    trainable: Weights, frozen: Weights, batches: Iterable[MicroBatch], compute: Compute
) -> Evaluation:
    """Token-weighted means over micro-batches, nothing dropped out; sums are float64.

    Logits exist for one chunk of rows only: two float32 blocks of about 64 MiB.
    """
    compute = dataclasses.replace(compute, lora_dropout=0.0)
    head_VD = head_weight(trainable, frozen, compute.model, compute.dtype)
    chunk = rows_evaluated(head_VD.shape[0])
    sums = torch.zeros(3, dtype=torch.float64, device=head_VD.device)
    count = 0
    for batch in batches:
        h_TD = hidden_states(trainable, frozen, batch.tokens, compute)
        for rows in torch.stack((batch.target_rows_M, batch.targets_M)).split(chunk, dim=1):
            z_CV = (h_TD[rows[0]] @ head_VD.T).float()
            right = z_CV.argmax(1) == rows[1]
            z_CV = z_CV.log_softmax(1)
            losses = -z_CV.gather(1, rows[1].unsqueeze(1))
            entropies = z_CV.mul_(z_CV.exp()).sum(1).neg()
            sums += torch.stack([x.sum(dtype=torch.float64) for x in (losses, entropies, right)])
        count += batch.targets_M.numel()
    if count == 0:
        return Evaluation(math.nan, math.nan, math.nan, 0)
    loss, entropy, accuracy = (sums / count).tolist()
    return Evaluation(loss, entropy, accuracy, count)
