"""From a micro-batch to its summed loss."""

from __future__ import annotations

from torch import Tensor

from minisft.batches import MicroBatch
from minisft.llama import Compute, Weights, head_weight, hidden_states
from minisft.nn import linear_cross_entropy


def loss_sum(trainable: Weights, frozen: Weights, batch: MicroBatch, compute: Compute) -> Tensor:
    """Sum of -log p(target) over the micro-batch's targets, in nats, [] float32.

    Only hidden states that predict something go through the head; logits never exist as a whole.
    A micro-batch without targets is exactly 0.
    """
    h_TD = hidden_states(trainable, frozen, batch.tokens, compute)
    head_VD = head_weight(trainable, frozen, compute.model, compute.dtype)
    return linear_cross_entropy(h_TD[batch.target_rows_M], head_VD, batch.targets_M)
