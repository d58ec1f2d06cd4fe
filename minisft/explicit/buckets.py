"""Micro-batches padded to a few static shapes, so that few CUDA graphs serve all of them.

T tokens  M targets (tokens to predict)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.batches import MicroBatch
from minisft.nn import Documents

_NO_TARGET = -1  # linear_cross_entropy_grad gives such a row no loss and no gradient


@dataclass(frozen=True)
class StaticBatch:
    """A micro-batch padded to a bucket. Padding does not change the loss or the gradients."""

    input_ids_T: Tensor
    position_ids_T: Tensor
    rows_M: Tensor  # the token whose hidden state predicts target i; not read if dense
    targets_M: Tensor  # -1 where there is none
    documents: Documents
    dense: bool  # M = T, and target i belongs to token i

    def to(self, device: torch.device) -> "StaticBatch":
        """Return a copy of the batch whose tensors are on the device, without `lengths`."""
        ids, positions, rows, targets, cu = (t.to(device, copy=True) for t in self._tensors())
        # Drop the lengths: a captured graph replays on documents of other lengths.
        documents = self.documents._replace(cu_seqlens=cu, lengths=())
        return StaticBatch(ids, positions, rows, targets, documents, self.dense)

    def copy_into(self, other: "StaticBatch") -> None:
        """Copy the tensors into those of `other`, a batch of the same bucket on a GPU."""
        for source, target in zip(self._tensors(), other._tensors(), strict=True):
            # pinned, because a copy from pageable memory would block the host
            target.copy_(source.pin_memory(), non_blocking=True)

    def _tensors(self) -> tuple[Tensor, ...]:
        cu = self.documents.cu_seqlens
        return self.input_ids_T, self.position_ids_T, self.rows_M, self.targets_M, cu

    def key(self) -> tuple:
        """Return the bucket: all shapes and Python values that a captured graph fixes."""
        sizes = (len(tensor) for tensor in self._tensors())
        return *sizes, self.documents.longest, self.documents.uniform, self.dense


def bucketed(micro: MicroBatch) -> StaticBatch:
    """Pad the micro-batch to one of few bucket sizes: few CUDA graphs, little padding."""
    lengths = micro.tokens.documents.lengths
    n = sum(lengths)
    tokens = bucket_tokens(n)
    # Round targets up to quarters of the tokens; above 80 %, use one target per token (dense).
    share = _round_up(len(micro.targets_M), max(1, tokens // 4))
    targets = tokens if share > 0.8 * tokens else share
    # Documents of one length without padding can use the faster attention of cuDNN.
    if tokens == n and len(set(lengths)) == 1:
        return pad(micro, n, len(lengths), targets, lengths[0])
    longest = min(tokens, max(1024, 1 << (max(lengths) - 1).bit_length()))
    documents = len(lengths) + 1 + (tokens - n) // longest
    documents = _round_up(documents, 16 if documents <= 32 else 32)
    return pad(micro, tokens, documents, targets, longest)


def bucket_tokens(n: int) -> int:
    """Return the number of tokens that n tokens are padded to; monotone in n."""
    return _round_up(n, 256 if n <= 4096 else 512)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def pad(micro: MicroBatch, tokens: int, documents: int, targets: int, longest: int) -> StaticBatch:
    """Pad the micro-batch to these numbers of tokens, documents and targets.

    longest: upper bound of the documents' lengths. The result is on the micro-batch's device.
    """
    ids, positions = micro.tokens.input_ids_T, micro.tokens.position_ids_T
    padding = (0, tokens - len(ids))
    rows, target_ids = micro.target_rows_M.cpu(), micro.targets_M.cpu()
    if targets == tokens:
        by_token = torch.full((tokens,), _NO_TARGET, dtype=torch.int64)
        by_token[rows] = target_ids
        rows, target_ids = torch.zeros(1, dtype=torch.int64), by_token
    else:
        missing = (0, targets - len(target_ids))
        rows, target_ids = F.pad(rows, missing), F.pad(target_ids, missing, value=_NO_TARGET)
    return StaticBatch(
        F.pad(ids, padding),
        F.pad(positions, padding),
        rows.to(ids.device),
        target_ids.to(ids.device),
        _padded_documents(micro.tokens.documents, tokens, documents, longest),
        dense=targets == tokens,
    )


def _padded_documents(real: Documents, tokens: int, documents: int, longest: int) -> Documents:
    """Append documents that consist of the padding tokens, then empty documents."""
    uniform = real.uniform if sum(real.lengths) == tokens else 0
    lengths, spare = list(real.lengths), tokens - sum(real.lengths)
    while spare > 0:
        lengths.append(min(spare, longest))
        spare -= lengths[-1]
    empty = [0] * (documents - len(lengths))
    cu = torch.tensor([0, *lengths, *empty]).cumsum(0).int()
    return Documents(cu.to(real.cu_seqlens.device), tuple(lengths), longest, uniform)
