"""Public functions: cross-entropy of a linear head; the forward pass also computes gradients."""

import torch
from minisft.kernels._impl import use_triton
from minisft.kernels.linear_cross_entropy.reference import (
    cross_entropy_reference_,
    loss_and_grads_by_chunk,
)
from torch import Tensor


class _LinearCrossEntropy(torch.autograd.Function):
    """Autograd function that saves d_hidden [M, D] (and d_head [V, D]) instead of logits."""

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
        # multiply in float32: `grad` (1 / num_tokens) rounded to bfloat16 would scale every entry
        # by a factor that is wrong by up to 0.4 %
        d_hidden = None if d_hidden is None else (d_hidden.float() * grad).to(d_hidden.dtype)
        d_head = None if d_head is None else (d_head * grad).to(ctx.head_dtype)
        return d_hidden, d_head, None, None


def linear_cross_entropy(
    hidden_MD: Tensor, head_VD: Tensor, targets_M: Tensor, *, chunk: int = 0
) -> Tensor:
    """Return the summed cross-entropy of hidden @ head.T in nats, [] float32, differentiable.

    hidden [M, D], head [V, D]: one floating dtype. targets: int64 [M] in [0, V), already shifted,
    no ignored rows. chunk: number of rows of logits in memory at a time; 0 means about 256 MiB of
    float32 logits. hidden and head get gradients if they require them. Raises ValueError on
    mismatched shapes or dtypes. Target values are not checked: reading them would synchronise.
    """
    M, D = hidden_MD.shape
    V = head_VD.shape[0]
    if head_VD.shape[1] != D or targets_M.shape != (M,):
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden_MD.shape)}, head {tuple(head_VD.shape)} "
            f"and targets {tuple(targets_M.shape)} do not match [M, D], [V, D], [M]"
        )
    if targets_M.dtype != torch.int64 or hidden_MD.dtype != head_VD.dtype:
        raise ValueError(
            f"linear_cross_entropy: hidden {hidden_MD.dtype}, head {head_VD.dtype}, targets "
            f"{targets_M.dtype}; expected one floating dtype for both and int64 targets"
        )
    # 2^26 float32 logits are 256 MiB; fewer than 64 rows would slow down the matrix product
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
    """Return (summed cross-entropy [] float32, weight * its gradient by hidden), without autograd.

    Arguments as in `linear_cross_entropy`, but the head is frozen and targets may be -1 (zero loss
    and gradient). weight: float32 [1] on the device (1 / number of targets), which may change
    between replays of a captured CUDA graph. At most [chunk, V] logits in hidden's dtype exist at a
    time; gradients overwrite them. Raises ValueError for chunks of 2^31 logits or more.
    """
    triton = use_triton(hidden_MD, impl)
    M, V = hidden_MD.shape[0], head_VD.shape[0]
    # the kernel's offsets within a chunk have 32 bits
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
