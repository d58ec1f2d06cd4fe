"""Rows of several sources to one TokenizedDataset: rows in groups, worker processes, packing.

The result is deterministic: the same rows, tokenizer and settings give the same arrays. Sources may
be larger than memory. No row is dropped or cut without being counted in `stats`.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from minisft.batches import TokenizedDataset
from minisft.config.errors import UserError
from minisft.data.groups import Group, Job, tokenize_group
from minisft.data.one_row import Piece
from minisft.data.packing import GROUP_ROWS, pack_group
from minisft.data.readers import Rows
from minisft.data.render import end_of_turn
from minisft.data.settings import Settings, settings_of_source
from minisft.data.stats import (
    Counts,
    check_instruction_part,
    dataset_stats,
    nothing_to_train,
    source_stats,
)
from minisft.data.token_files import TokenWriter
from minisft.text.tokenizer import Tokenizer


def tokenize(
    sources: Sequence[Rows],
    tokenizer: Tokenizer,
    settings: Settings,
    *,
    writer: TokenWriter | None = None,
    num_proc: int = 1,
    limit: int | None = None,
) -> TokenizedDataset:
    """Return token ids and labels of every row of the sources, in order, as TRL 1.16 makes them.

    Without packing a row of the result is one document. Rows longer than max_length are treated as
    `overlong` says once labelled, and dropped if no trained label is left (packing keeps those).
    Rows with a blank completion are dropped; skip_bad drops malformed rows too. With packing, each
    group of 1000 documents of a source is packed by itself. writer: where the tokens go (default:
    memory). num_proc: processes that render and tokenise; the result does not depend on it. limit:
    rows to read of each source. Raises UserError naming the row, and if nothing is left to train.
    """
    writer = writer or TokenWriter()
    counts, stats_of_sources = Counts(), []
    try:
        for rows in sources:
            resolved = settings_of_source(settings, rows, tokenizer)
            end = end_of_turn(resolved, tokenizer) if len(rows) else None
            here, first_row = Counts(), writer.num_rows
            here.dropped["malformed"] += rows.skipped
            groups = _groups(Job(rows, tokenizer, resolved), num_proc, limit)
            _write_source(groups, settings, writer, here)
            check_instruction_part(settings, here, rows.source)
            num_rows = writer.num_rows - first_row
            stats_of_sources.append(source_stats(rows, resolved, end, here, num_rows))
            counts.add(here)
        stats = dataset_stats(stats_of_sources, counts, writer, settings, tokenizer.chat_template)
        if not writer.num_trained:
            raise nothing_to_train(stats, settings, sources)
        return writer.finish(stats)
    except BaseException:
        writer.abandon()
        raise


def _write_source(
    groups: Iterator[Group], settings: Settings, writer: TokenWriter, counts: Counts
) -> None:
    """Write the documents of a source as rows; adds to counts."""
    waiting: list[Piece] = []
    for group in groups:
        counts.add(group.counts)
        for ids, _ in group.documents:
            writer.seen(ids)
        if settings.packing is None:
            for document in group.documents:
                writer.add([document])
            continue
        waiting += group.documents
        while len(waiting) >= GROUP_ROWS:
            _write_packed(writer, waiting[:GROUP_ROWS], settings)
            waiting = waiting[GROUP_ROWS:]
    if waiting:
        _write_packed(writer, waiting, settings)


def _write_packed(writer: TokenWriter, documents: list[Piece], settings: Settings) -> None:
    assert settings.max_length is not None and settings.packing is not None
    ids, labels = (np.concatenate(arrays) for arrays in zip(*documents, strict=True))
    offsets = [0, *itertools.accumulate(len(d[0]) for d in documents)]
    for row in pack_group(offsets, max_length=settings.max_length, strategy=settings.packing):
        writer.add([(ids[a:b], labels[a:b]) for a, b in row])


# ------------------------------------------------------------------------------ worker processes


def _groups(job: Job, num_proc: int, limit: int | None) -> Iterator[Group]:
    """The groups of a source in order, tokenised in this process or by num_proc workers."""
    num_rows = len(job.rows) if limit is None else min(limit, len(job.rows))
    ranges = [(a, min(a + GROUP_ROWS, num_rows)) for a in range(0, num_rows, GROUP_ROWS)]
    if num_proc <= 1 or len(ranges) <= 1:
        for begin, stop in ranges:
            yield tokenize_group(job, begin, stop)
        return
    try:
        yield from _groups_of_workers(job, min(num_proc, len(ranges)), ranges)
    except BrokenProcessPool:
        raise UserError(
            f"--dataset-num-proc {num_proc}: a tokenising worker died (out of memory, or no "
            "`if __name__ == '__main__'` guard in the calling script); try --dataset-num-proc 1"
        ) from None


def _groups_of_workers(job: Job, num_proc: int, ranges: list[tuple[int, int]]) -> Iterator[Group]:
    # spawn: a forked process would share the threads and the CUDA context of this one.
    with ProcessPoolExecutor(
        num_proc,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(job,),
    ) as pool:
        pending: deque[Future[Group]] = deque()
        try:
            for begin, stop in ranges:
                pending.append(pool.submit(_work, begin, stop))
                # Bounds the finished groups that wait in memory for the slowest one.
                if len(pending) > 2 * num_proc:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# The job of a worker process; empty elsewhere. Pickled once per worker instead of once per group.
_worker_job: list[Job] = []


def _start_worker(job: Job) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    # Ctrl-C is sent to the whole process group: the run handles it, and then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker_job[:] = [job]


def _work(begin: int, stop: int) -> Group:
    return tokenize_group(_worker_job[0], begin, stop)
