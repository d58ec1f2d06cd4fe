"""The public function: differentiable in hidden and head; the forward pass makes the gradients."""

import torch
from torch import Tensor

from kernels.linear_cross_entropy.reference import loss_and_grads_by_chunk


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps d_hidden [M, D] (and d_head [V, D]) instead of any logits."""

    @staticmethod
    def forward(ctx, hidden_MD, head_VD, targets_M, chunk):
        need_hidden, need_head = ctx.needs_input_grad[:2]
        loss, d_hidden, d_head = loss_and_grads_by_chunk(
            hidden_MD,
            head_VD,
            targets_M,
            chunk=chunk,
            need_hidden_grad=need_hidden,
            need_head_grad=need_head,
        )
        ctx.save_for_backward(d_hidden, d_head)
        ctx.head_dtype = head_VD.dtype
        return loss

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        d_hidden, d_head = ctx.saved_tensors
        # The product is formed in float32: 1 / num_tokens would lose bits in bfloat16.
        d_hidden = None if d_hidden is None else (d_hidden.float() * grad).to(d_hidden.dtype)
        d_head = None if d_head is None else (d_head * grad).to(ctx.head_dtype)
        return d_hidden, d_head, None, None


def linear_cross_entropy(
    hidden_MD: Tensor, head_VD: Tensor, targets_M: Tensor, *, chunk: int = 0
) -> Tensor:
    """Summed cross-entropy of `hidden @ head.T` in nats, without materialising the [M, V] logits.

    hidden_MD: [M, D], head_VD: [V, D], one floating dtype. targets_M: int64 [M] in [0, V), already
    shifted and with ignored rows left out. chunk: rows of logits alive at once; 0 keeps one float32
    block of about 256 MiB. Returns [] float32; gradients flow to hidden and, where it needs one,
    head. Raises ValueError on mismatched shapes or dtypes (target values are not read: that would
    synchronise). Definition: reference.py.
    """
    M, D = hidden_MD.shape
    V = head_VD.shape[0]
    if head_VD.shape[1] != D or targets_M.shape != (M,):
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden_MD.shape)}, head {tuple(head_VD.shape)} "
            f"and targets {tuple(targets_M.shape)} do not fit as [M, D], [V, D], [M]"
        )
    if targets_M.dtype != torch.int64 or hidden_MD.dtype != head_VD.dtype:
        raise ValueError(
            f"linear_cross_entropy: hidden {hidden_MD.dtype}, head {head_VD.dtype}, targets "
            f"{targets_M.dtype}; expected one floating dtype for both and int64 targets"
        )
    chunk = chunk or max(64, min(4096, 2**26 // V))
    return _LinearCrossEntropy.apply(hidden_MD, head_VD, targets_M, chunk)  # pyright: ignore[reportReturnType]
