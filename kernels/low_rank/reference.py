"""The definitions in plain torch.

T tokens  R rank  N features  S splits of the tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """scale * left @ right: a matrix [T, N] that another kernel adds to what it reads.

    It is never written out: a LoRA update costs the bytes of left and right alone. left: [T, R],
    right: [R, N], one half-precision or float32 dtype, any strides. The product is float32.
    """

    left: Tensor
    right: Tensor
    scale: float


def add_reference(x_TN: Tensor, delta: LowRank | None) -> Tensor:
    """x + scale * left @ right, float32 [T, N]."""
    if delta is None:
        return x_TN.float()
    return x_TN.float() + delta.left.float() @ delta.right.float() * delta.scale


def narrow_products_reference(
    x_TN: Tensor, rights: Sequence[Tensor | None], sizes: Sequence[int], out_TR: Tensor
) -> None:
    """out = [x_1 M_1, x_2 M_2, ...], M_j [size_j, R_j]; columns of x as cut by sizes."""
    row = column = 0
    for size, right in zip(sizes, rights, strict=True):
        if right is not None:
            out = out_TR[:, column : column + right.shape[1]]
            torch.mm(x_TN[:, row : row + size], right, out=out)
            column += right.shape[1]
        row += size


def split_rows(num_rows: int, splits: int, block: int = 64) -> list[slice]:
    """The rows of each split: whole blocks of rows, the last one shorter or empty."""
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
    """partials[s] = sum over the tokens of split s of left[t] (x) x[t], scaled by row and column.

    partials: float32, S sums to be added up by the caller; overwritten.
    """
    left = left_TR.float()
    if row_scale_T is not None:
        left = (left * row_scale_T.unsqueeze(1)).to(left_TR.dtype).float()
    for i, rows in enumerate(split_rows(left.shape[0], partials_SRN.shape[0])):
        total = left[rows].T @ x_TN[rows].float()
        partials_SRN[i] = total if column_scale_N is None else total * column_scale_N.float()


def reduce_partials_reference(partials_Sn: Tensor, grads_n: Tensor, scale: float) -> None:
    """grads += scale * sum of the splits, in float32 and in a fixed order."""
    grads_n.add_(partials_Sn.sum(0), alpha=scale)
