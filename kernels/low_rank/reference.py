"""Specification of the low-rank kernels in plain torch.

T tokens  R rank  N features  S splits of the tokens
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """A low-rank matrix [T, N] = scale * left @ right that is stored only as its factors.

    Other kernels compute and add the product in float32, so a LoRA update loads only left and
    right. left [T, R], right [R, N]: one half-precision or float32 dtype, any strides.
    """

    left: Tensor
    right: Tensor
    scale: float


def add_reference(x_TN: Tensor, delta: LowRank | None) -> Tensor:
    """Return x + scale * left @ right (x alone if delta is None), float32 [T, N]."""
    if delta is None:
        return x_TN.float()
    return x_TN.float() + delta.left.float() @ delta.right.float() * delta.scale


def narrow_products_reference(
    x_TN: Tensor, rights: Sequence[Tensor | None], sizes: Sequence[int], out_TR: Tensor
) -> None:
    """Write out = [x_1 M_1, x_2 M_2, ...]; x_j: the next sizes[j] columns of x."""
    row = column = 0
    for size, right in zip(sizes, rights, strict=True):
        if right is not None:
            out = out_TR[:, column : column + right.shape[1]]
            torch.mm(x_TN[:, row : row + size], right, out=out)
            column += right.shape[1]
        row += size


def split_rows(num_rows: int, splits: int, block: int = 64) -> list[slice]:
    """Return each split's rows; sizes are multiples of `block`, but last splits may be shorter."""
    size = -(-num_rows // splits)
    size = -(-size // block) * block
    return [slice(min(i * size, num_rows), min((i + 1) * size, num_rows)) for i in range(splits)]


def outer_sum_reference(
    left_TR: Tensor,
    x_TN: Tensor,
    row_scale_T: Tensor | None,
    column_scale_N: Tensor | None,
    partials_SRN: Tensor,
) -> None:
    """Write partials[s] = sum of outer products left[t] x[t]^T over the tokens t of split s.

    row_scale [T], column_scale [N]: optional factors of the rows and columns of x. partials:
    float32 [S, R, N], overwritten; the caller adds up the S sums.
    """
    left = left_TR.float()
    if row_scale_T is not None:
        # round to the input dtype, as the kernel does before its tensor-core product
        left = (left * row_scale_T.unsqueeze(1)).to(left_TR.dtype).float()
    for i, rows in enumerate(split_rows(left.shape[0], partials_SRN.shape[0])):
        total = left[rows].T @ x_TN[rows].float()
        partials_SRN[i] = total if column_scale_N is None else total * column_scale_N.float()


def reduce_partials_reference(partials_Sn: Tensor, grads_n: Tensor, scale: float) -> None:
    """Add scale * (sum of partials over the splits) to grads, in float32."""
    grads_n.add_(partials_Sn.sum(0), alpha=scale)
