"""Packing: several documents in one row of at most max_length tokens, boundaries kept."""

from __future__ import annotations

import bisect
import itertools
from collections import deque

import numpy as np

from minisft.batches import TokenizedDataset
from minisft.config.errors import UserError
from minisft.data.token_files import TokenWriter

PACKING = ("bfd", "bfd_split", "wrapped")
GROUP_ROWS = 1000  # documents that are packed together, as the datasets library batches them


def pack(dataset: TokenizedDataset, *, max_length: int, strategy: str) -> TokenizedDataset:
    """Rows of at most max_length tokens made from many documents; as TRL 1.16's pack_dataset.

    "bfd": best fit decreasing, documents cut to max_length; "bfd_split": the rest of a long
    document becomes documents of its own; "wrapped": everything back to back, cut every max_length
    tokens, one document per row. Each group of 1000 rows is packed by itself. Labels are kept.
    Raises UserError for an unknown strategy or max_length below 1.
    """
    check_packing(strategy, max_length)
    assert len(dataset) == len(dataset.document_offsets) - 1, "pack takes one document per row"
    offsets = dataset.document_offsets.tolist()
    ids, labels = dataset.input_ids.numpy(), dataset.labels.numpy()
    writer = TokenWriter()
    for begin in range(0, len(dataset), GROUP_ROWS):
        group = offsets[begin : begin + GROUP_ROWS + 1]
        for row in pack_group(group, max_length=max_length, strategy=strategy):
            writer.add([(ids[a:b], labels[a:b]) for a, b in row])
    stats = dataset.stats | {
        "rows_packed": writer.num_rows,
        "packing_efficiency": writer.num_tokens / max(writer.num_rows * max_length, 1),
    }
    if strategy == "bfd":
        stats["truncated"] = int((np.diff(offsets) > max_length).sum())
    return writer.finish(stats)


def check_packing(strategy: str, max_length: int | None) -> None:
    """UserError for an unknown strategy, or rows without a length."""
    if strategy not in PACKING:
        raise UserError(f"packing strategy is {strategy!r}; expected one of {', '.join(PACKING)}")
    if max_length is None or max_length < 1:
        raise UserError(f"max_length is {max_length}; packing needs at least 1")


def pack_group(
    offsets: list[int], *, max_length: int, strategy: str
) -> list[list[tuple[int, int]]]:
    """The rows of one group: (start, stop) of each fragment, in the units of `offsets`.

    offsets: where each document starts, and the end of the last; n + 1 for n documents.
    """
    if strategy == "wrapped":
        return [[piece] for piece in _cut(offsets[0], offsets[-1], max_length)]
    pieces = [_cut(a, b, max_length) for a, b in itertools.pairwise(offsets)]
    kept = 1 if strategy == "bfd" else None
    fragments = [piece for document in pieces for piece in document[:kept]]
    bins = _best_fit_decreasing([b - a for a, b in fragments], max_length)
    return [[fragments[i] for i in bin] for bin in bins]


def _cut(start: int, stop: int, length: int) -> list[tuple[int, int]]:
    return [(a, min(a + length, stop)) for a in range(start, stop, length)]


def _best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Bins of indices: longest first, each into the open bin with the least space that suffices.

    Among bins with equal space the one that came to it first is taken. n log n in the fragments.
    """
    bins: list[list[int]] = []
    spaces: list[int] = []  # distinct spaces of open bins, ascending
    waiting: dict[int, deque[list[int]]] = {}  # space -> its bins, oldest first
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(spaces, lengths[i])
        if at == len(spaces):
            bin, space = [], capacity
            bins.append(bin)
        else:
            space = spaces[at]
            bin = waiting[space].popleft()
            if not waiting[space]:
                del waiting[space], spaces[at]
        bin.append(i)
        if left := space - lengths[i]:
            if left not in waiting:
                waiting[left] = deque()
                bisect.insort(spaces, left)
            waiting[left].append(bin)
    return bins
