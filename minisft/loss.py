"""The loss summed over a micro-batch, for training, and means over micro-batches, for evaluation.

T tokens  M targets  C targets of a chunk  D hidden  V vocab
"""

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
    """Return the loss summed over the targets of a micro-batch, in nats, [] float32.

    nll: -log p(target). dft and label smoothing: see `variant_sum`. 0 if there are no targets.
    """
    h_TD = hidden_states(trainable, frozen, batch.tokens, compute)
    head_VD = head_weight(trainable, frozen, compute.model, compute.dtype)
    # The head is often the largest matrix: multiply it by the states that predict a target only.
    h_MD = h_TD[batch.target_rows_M]
    if compute.loss_type == "nll" and not compute.label_smoothing:
        return linear_cross_entropy(h_MD, head_VD, batch.targets_M)
    total = h_MD.new_zeros((), dtype=torch.float32)
    chunk = rows_of_logits(head_VD.shape[0])
    for h_CD, targets_C in zip(h_MD.split(chunk), batch.targets_M.split(chunk), strict=True):
        # With checkpointing, the backward pass recomputes the logits of one chunk at a time, so
        # that the [M, V] matrix never exists.
        total = total + checkpoint(
            variant_sum, h_CD, head_VD, targets_C, compute.loss_type, compute.label_smoothing,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
    return total


def variant_sum(
    h_CD: Tensor, head_VD: Tensor, targets_C: Tensor, loss_type: str, smoothing: float
) -> Tensor:
    """Return the summed loss of one chunk of targets, [] float32.

    dft: -p log p of the target, p without gradient (arXiv:2508.05629). Otherwise label smoothing:
    (1 - smoothing) * -log p(target) + smoothing * (mean of -log p over the vocabulary).
    """
    log_p_CV = (h_CD @ head_VD.T).float().log_softmax(1)
    log_p_C = log_p_CV.gather(1, targets_C.unsqueeze(1)).squeeze(1)
    if loss_type == "dft":
        return -(log_p_C * log_p_C.detach().exp()).sum()
    return -((1 - smoothing) * log_p_C + smoothing * log_p_CV.mean(1)).sum()


def rows_of_logits(V: int) -> int:
    """Return how many rows of float32 logits take about 256 MiB, at least 64 and at most 4096."""
    return max(64, min(4096, 2**26 // V))


def rows_evaluated(V: int) -> int:
    """Return how many rows of logits an evaluation computes at a time, about 64 MiB in float32."""
    # A quarter of a training chunk: two [C, V] matrices are alive, and larger chunks do not help.
    return -(-rows_of_logits(V) // 4)


class Evaluation(NamedTuple):
    """Mean loss, entropy and accuracy over all targets of an evaluation; nan without targets."""

    loss: float  # -log p(target), nats
    entropy: float  # of the predicted distribution, nats
    accuracy: float  # share of targets that are the most likely token
    count: int  # targets


@torch.no_grad()
def evaluation(
    trainable: Weights, frozen: Weights, batches: Iterable[MicroBatch], compute: Compute
) -> Evaluation:
    """Evaluate all targets of the micro-batches, without dropout or label smoothing."""
    compute = dataclasses.replace(compute, lora_dropout=0.0)
    head_VD = head_weight(trainable, frozen, compute.model, compute.dtype)
    chunk = rows_evaluated(head_VD.shape[0])
    # Sum in float64, so that rounding does not make the result depend on the batch size.
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
