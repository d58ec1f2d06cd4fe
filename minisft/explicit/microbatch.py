"""Compute loss and gradients of a step by the explicit pass: layers, head, layers in reverse.

Shapes are static, and nothing uses autograd or copies values from the device to the host, so that
on a GPU the entire micro-batch is captured in a CUDA graph (`graphs.py`).

T tokens  M targets  D hidden  R rank
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.batches import StepBatch
from minisft.explicit.block import LayerContext, Saved, backward, forward
from minisft.explicit.buckets import StaticBatch, bucketed
from minisft.explicit.buffers import ExplicitPass
from minisft.explicit.policy import mlp_chunks
from minisft.kernels.linear_cross_entropy import linear_cross_entropy_grad
from minisft.kernels.rms_norm import add_rms_norm, rms_norm_backward
from minisft.lora import Flat
from minisft.rope import cos_and_sin


def explicit_loss_and_grads(
    explicit: ExplicitPass, trainable: Flat, batch: StepBatch, loss_scale: float
) -> tuple[Tensor, Tensor]:
    """Return the token-mean loss of a step, float32 [], and its gradient, float32 [n].

    batch: micro-batches on the CPU. loss_scale: factor on the loss in the backward pass, divided
    out of the gradient. The gradient is ordered like trainable.buffer; the next call overwrites it.
    """
    load_(explicit, trainable)
    explicit.sums.buffer.zero_()
    explicit.loss.zero_()
    # A tensor, not a Python number: graphs are replayed, and the weight changes between steps.
    explicit.loss_weight.fill_(loss_scale / max(1, batch.num_loss_tokens))
    for micro in batch.micro_batches:
        if micro.targets_M.numel():
            explicit.graphs.run_(partial(micro_step_, explicit), bucketed(micro))
    grads = gathered(explicit)
    if loss_scale != 1:
        grads.mul_(1 / loss_scale)
    return explicit.loss / max(1, batch.num_loss_tokens), grads


def load_(explicit: ExplicitPass, trainable: Flat) -> None:
    """Copy the trained adapters into explicit.adapters, in the compute dtype."""
    if explicit.grads is explicit.sums:  # no rank was padded
        explicit.adapters.buffer.copy_(trainable.buffer)
        return
    for name, view in trainable.views.items():
        _corner(explicit.adapters.views[name], view).copy_(view)


def gathered(explicit: ExplicitPass) -> Tensor:
    """Return the gradient, float32 [n] in the order of trainable.buffer, without rank padding."""
    if explicit.grads is not explicit.sums:
        for name, view in explicit.grads.views.items():
            view.copy_(_corner(explicit.sums.views[name], view))
    return explicit.grads.buffer


def _corner(padded: Tensor, like: Tensor) -> Tensor:
    # Drop the padding of the rank.
    return padded[: like.shape[0], : like.shape[1]]


def micro_step_(explicit: ExplicitPass, batch: StaticBatch) -> None:
    """Add the loss to explicit.loss, and the gradient of loss_weight * loss to explicit.sums."""
    layers, compute = explicit.layers, explicit.compute
    cos, sin = cos_and_sin(batch.position_ids_T, *explicit.rope, compute.dtype)
    ctx = LayerContext(
        compute.model, compute.lora_scaling, cos, sin, batch.documents, explicit.scratch
    )
    tokens, most = len(batch.input_ids_T), explicit.mlp_tokens
    chunks = [mlp_chunks(tokens, policy, most) for policy in explicit.policies]
    contexts = [ctx._replace(mlp_chunks=count) for count in chunks]
    x, h, rstd, saved = _forward(explicit, batch, contexts)
    dh = _head_(explicit, h, batch)
    del h
    dx = rms_norm_backward(dh, x, explicit.norm, rstd, rank_columns=layers[-1].down.rank)
    del dh, x
    explicit.host.start_fetching(len(layers) - 1)
    for i in range(len(layers) - 1, -1, -1):
        slot = [explicit.host.fetch(i, saved[i])]
        saved[i] = None
        previous_rank = layers[i - 1].down.rank if i else None
        assert dx is not None
        # `backward` empties the list, so that this loop holds no reference to the activations.
        dx = backward(dx, slot, layers[i], previous_rank, contexts[i])


def _forward(
    explicit: ExplicitPass, batch: StaticBatch, contexts: list[LayerContext]
) -> tuple[Tensor, Tensor, Tensor, list[Saved | None]]:
    """Return (residual stream x [T, D], final norm of x [T, D], 1 / rms float32 [T], saved)."""
    layers, eps = explicit.layers, explicit.compute.model.rms_norm_eps
    # Each layer ends by computing the next layer's first norm, so layer 0's is computed here.
    norms = [*((y.norm1, y.qkv.rank) for y in layers), (explicit.norm, 0)]
    x = F.embedding(batch.input_ids_T, explicit.embedding).to(explicit.compute.dtype)
    x, h, rstd = add_rms_norm(x, None, norms[0][0], eps, rank_columns=norms[0][1])
    saved: list[Saved | None] = []
    for i, layer in enumerate(layers):
        x, h, rstd, everything = forward(x, h, rstd, layer, *norms[i + 1], contexts[i])
        saved.append(explicit.host.store(i, everything, explicit.policies[i]))
        # This reference would keep all activations in memory during the next layer's forward pass.
        del everything
    return x, h, rstd, saved


def _head_(explicit: ExplicitPass, h_TD: Tensor, batch: StaticBatch) -> Tensor:
    """Add the loss to explicit.loss; return the gradient of the final norm's output, [T, D]."""
    h_MD = h_TD if batch.dense else h_TD[batch.rows_M]
    loss, d_MD = linear_cross_entropy_grad(
        h_MD, explicit.head, batch.targets_M, explicit.loss_weight, chunk=explicit.chunk
    )
    explicit.loss += loss
    if batch.dense:
        return d_MD
    # Padding targets refer to row 0 and have a gradient of zero.
    return torch.zeros_like(h_TD).index_add_(0, batch.rows_M, d_MD)
