"""Specification of the RoPE kernels in plain torch.

minisft's model is defined by nn.apply_rope, which rotates in the dtype of q and k and equals
transformers bit for bit. These functions compute in float32 and round once, as the kernels do.

T tokens  N query heads  K key/value heads  H head_dim  R rank  S splits of the tokens
"""

import torch
from minisft.kernels.low_rank.reference import outer_sum_reference
from torch import Tensor

Three = tuple[Tensor | None, Tensor | None, Tensor | None]


def rotate(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Return x with the pairs (i, i + H/2) of every head rotated by the token's angles, float32."""
    x1, x2 = x_TNH.float().chunk(2, dim=-1)
    rotated = torch.cat((-x2, x1), dim=-1)
    return x_TNH.float() * cos_TH.float().unsqueeze(1) + rotated * sin_TH.float().unsqueeze(1)


def rope_reference_(qk: Tensor, cos_TH: Tensor, sin_TH: Tensor, heads: int) -> None:
    """Rotate the first `heads` heads of every row of qk in place, rounding once."""
    H = cos_TH.shape[1]
    part = qk[:, : heads * H]
    part.copy_(rotate(part.unflatten(1, (heads, H)), cos_TH, sin_TH).flatten(1))


def rope_backward_reference(
    grads: tuple[Tensor, Tensor, Tensor],
    us: Three,
    cos_TH: Tensor,
    sin_TH: Tensor,
    out: Tensor,
    partials: Three,
) -> None:
    """Write dy (q and k gradients rotated back, v's copied) to out and dy^T u to partials."""
    start = 0
    for i, (grad, u, partial) in enumerate(zip(grads, us, partials, strict=True)):
        d = (rotate(grad, cos_TH, -sin_TH) if i < 2 else grad.float()).flatten(1)
        stop = start + d.shape[1]
        out[:, start:stop] = d
        if u is not None and partial is not None:
            outer_sum_reference(u, out[:, start:stop], None, None, partial.transpose(1, 2))
        start = stop
