"""Pack several documents into each row of at most max_length tokens, as TRL 1.16 does.

Reimplemented so that a run does not need TRL. The rows equal those of trl.pack_dataset
(tests/parity/test_data_trl.py), so losses are comparable with TRL.
"""

import bisect
import itertools
from collections import deque

import numpy as np

from minisft.data.token_files import TokenWriter

GROUP_ROWS = 1000  # documents that are packed together, as the datasets library batches them


def write_packed(
    writer: TokenWriter,
    documents: list[tuple[np.ndarray, np.ndarray]],
    max_length: int,
    strategy: str | None,
) -> None:
    """Write at most GROUP_ROWS documents (ids, labels) as packed rows; strategy None: one a row."""
    ids, labels = (np.concatenate(arrays) for arrays in zip(*documents, strict=True))
    offsets = [0, *itertools.accumulate(len(d[0]) for d in documents)]
    rows = [[piece] for piece in itertools.pairwise(offsets)]
    for row in _pack_group(offsets, max_length, strategy) if strategy else rows:
        writer.add([(ids[a:b], labels[a:b]) for a, b in row])


def _pack_group(offsets: list[int], max_length: int, strategy: str) -> list[list[tuple[int, int]]]:
    """Pack n documents with n + 1 offsets; return per row the (start, stop) of each fragment."""
    if strategy == "wrapped":
        return [[piece] for piece in _cut(offsets[0], offsets[-1], max_length)]
    pieces = [_cut(a, b, max_length) for a, b in itertools.pairwise(offsets)]
    count = 1 if strategy == "bfd" else None
    fragments = [piece for document in pieces for piece in document[:count]]
    bins = _best_fit_decreasing([b - a for a, b in fragments], max_length)
    return [[fragments[i] for i in bin] for bin in bins]


def _cut(start: int, stop: int, length: int) -> list[tuple[int, int]]:
    return [(a, min(a + length, stop)) for a in range(start, stop, length)]


def _best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Pack lengths into bins, longest first, each into the tightest fit; return indices per bin.

    Takes O(n log n) time for n lengths.
    """
    bins: list[list[int]] = []
    spaces: list[int] = []  # distinct spaces of open bins, ascending
    # Free space -> bins that have it, oldest first. TRL too fills the oldest of equal bins first.
    waiting: dict[int, deque[list[int]]] = {}
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
