"""Trained token rows: a few rows of the embedding are trained, the others stay frozen.

PEFT calls this trainable_token_indices. The rows are full replacements, not differences.

T tokens  D hidden  V vocabulary  N trained rows
"""

import torch
from torch import Tensor


def replace_embeddings(x_TD: Tensor, input_ids_T: Tensor, ids_N: Tensor, rows_ND: Tensor) -> Tensor:
    """Return the embeddings x_TD with the trained row wherever the token is one of ids_N.

    input_ids_T, ids_N: int64, ids_N without duplicates. rows_ND is cast to x's dtype.
    """
    # Gather and select instead of an index_copy into the matrix: that would copy all V rows in
    # every micro-batch.
    matches_TN = input_ids_T.unsqueeze(1) == ids_N
    # argmax is 0 for a token that matches no id; torch.where discards that row.
    rows_TD = rows_ND.to(x_TD.dtype)[matches_TN.int().argmax(1)]
    return torch.where(matches_TN.any(1, keepdim=True), rows_TD, x_TD)


def replace_head_rows(head_VD: Tensor, ids_N: Tensor, rows_ND: Tensor) -> Tensor:
    """Return the output projection with its rows ids_N replaced by the trained ones, [V, D]."""
    return head_VD.index_copy(0, ids_N, rows_ND.to(head_VD.dtype))
