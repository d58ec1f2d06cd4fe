"""Specification in plain torch; the differentiable op runs `loss_and_grads_by_chunk` itself.

M rows that have a target  D hidden  V vocab
"""

import torch
from torch import Tensor


def loss_and_grads_by_chunk(
    hidden_MD: Tensor,
    head_VD: Tensor,
    targets_M: Tensor,
    *,
    chunk: int,
    need_hidden_grad: bool,
    need_head_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the summed cross-entropy of hidden @ head.T and its gradients on request.

    hidden_MD, head_VD: one floating dtype. targets_M: int64 in [0, V). At most [chunk, V] logits
    exist at a time; statistics are float32. With z = hidden @ head.T and p = softmax(z):
    loss = sum(logsumexp(z) - z[target]), dz = p - onehot(target), d_hidden = dz @ head,
    d_head = dz.T @ hidden (accumulated in float32).
    Returns (loss [] float32, d_hidden like hidden or None, d_head [V, D] float32 or None).
    """
    loss = hidden_MD.new_zeros((), dtype=torch.float32)
    d_hidden = torch.empty_like(hidden_MD) if need_hidden_grad else None
    d_head = torch.zeros_like(head_VD, dtype=torch.float32) if need_head_grad else None
    for start in range(0, hidden_MD.shape[0], chunk):
        rows = slice(start, start + chunk)
        x_CD, target_C1 = hidden_MD[rows], targets_M[rows].unsqueeze(1)
        z_CV = (x_CD @ head_VD.T).float()
        lse_C1 = z_CV.logsumexp(dim=1, keepdim=True)
        loss += (lse_C1 - z_CV.gather(1, target_C1)).sum()
        if d_hidden is None and d_head is None:
            continue
        dz_CV = z_CV.sub_(lse_C1).exp_()
        dz_CV.scatter_add_(1, target_C1, torch.full_like(target_C1, -1, dtype=torch.float32))
        dz_CV = dz_CV.to(hidden_MD.dtype)
        if d_hidden is not None:
            d_hidden[rows] = dz_CV @ head_VD
        if d_head is not None:
            d_head += dz_CV.T @ x_CD
        # free both: otherwise they stay allocated while the next chunk's logits are computed
        del z_CV, dz_CV
    return loss, d_hidden, d_head


def cross_entropy_reference_(
    logits_MV: Tensor, targets_M: Tensor, weight: Tensor, *, gradient: bool
) -> Tensor:
    """Return losses, float32 [M]; if `gradient`, set logits to (softmax - onehot) * weight.

    Rows with a negative target get zero loss and gradient.
    """
    z = logits_MV.float()
    lse = z.logsumexp(dim=1, keepdim=True)
    at = targets_M.clamp(min=0).unsqueeze(1)
    there = (targets_M >= 0).unsqueeze(1)
    losses = torch.where(there, lse - z.gather(1, at), 0).squeeze(1)
    if gradient:
        d = (z - lse).exp()
        d.scatter_add_(1, at, torch.full_like(at, -1, dtype=torch.float32))
        logits_MV.copy_(torch.where(there, d * weight, 0))
    return losses
