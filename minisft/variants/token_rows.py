"""Trained token rows: a few rows of the embedding are trained, the others stay frozen.

PEFT's name is trainable_token_indices. A trained row replaces the frozen row; it is not added.

T tokens  D hidden  V vocabulary  N trained rows
"""

import torch
from torch import Tensor


def replace_embeddings(x_TD: Tensor, input_ids_T: Tensor, ids_N: Tensor, rows_ND: Tensor) -> Tensor:
    """Return the embeddings x_TD, [T, D], replaced by the trained row where the token is in ids_N.

    input_ids_T, ids_N: int64, ids_N without duplicates. rows_ND is cast to x's dtype.
    """
    # Gather and select: an index_copy into the embedding matrix would copy all V rows in every
    # micro-batch.
    matches_TN = input_ids_T.unsqueeze(1) == ids_N
    # For a token that matches no id, argmax is 0, and torch.where discards the gathered row.
    rows_TD = rows_ND.to(x_TD.dtype)[matches_TN.int().argmax(1)]
    return torch.where(matches_TN.any(1, keepdim=True), rows_TD, x_TD)


def replace_head_rows(head_VD: Tensor, ids_N: Tensor, rows_ND: Tensor) -> Tensor:
    """Return the output projection, [V, D], with rows ids_N replaced by the trained rows."""
    return head_VD.index_copy(0, ids_N, rows_ND.to(head_VD.dtype))
