"""The public function: differentiable in hidden and head; the forward pass makes the gradients."""

import torch
from minisft.kernels.linear_cross_entropy.reference import (
    cross_entropy_reference_,
    loss_and_grads_by_chunk,
)
from torch import Tensor


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


def linear_cross_entropy_grad(
    hidden_MD: Tensor,
    head_VD: Tensor,
    targets_M: Tensor,
    weight: Tensor,
    *,
    chunk: int,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy, and weight * d(sum)/d(hidden): both passes at once, no autograd.

    As linear_cross_entropy, but for a frozen head and with targets of -1 allowed: such a row counts
    nothing. weight: float32 [1] on the device (one over the number of targets, say), so that a
    captured graph can change it. At most [chunk, V] logits in hidden's dtype live at a time; they
    become their own gradient in place. Returns ([] float32 unweighted loss, [M, D]).
    """
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl is {impl!r}; expected auto, triton or reference")
    triton = hidden_MD.is_cuda if impl == "auto" else impl == "triton"
    M, V = hidden_MD.shape[0], head_VD.shape[0]
    if min(chunk, M) * V >= 2**31:
        raise ValueError(f"linear_cross_entropy_grad: {chunk} rows of {V} logits; use fewer rows")
    losses = torch.empty(M, dtype=torch.float32, device=hidden_MD.device)
    d_hidden = torch.empty_like(hidden_MD)
    logits = torch.empty((min(chunk, M), V), dtype=hidden_MD.dtype, device=hidden_MD.device)
    for start in range(0, M, chunk):
        rows = slice(start, min(start + chunk, M))
        z_CV = logits[: rows.stop - start]
        torch.mm(hidden_MD[rows], head_VD.T, out=z_CV)
        if triton:
            from minisft.kernels.linear_cross_entropy.kernel import launch_cross_entropy_

            launch_cross_entropy_(z_CV, targets_M[rows], losses[rows], weight, gradient=True)
        else:
            losses[rows] = cross_entropy_reference_(z_CV, targets_M[rows], weight, gradient=True)
        torch.mm(z_CV, head_VD, out=d_hidden[rows])
    return losses.sum(), d_hidden
