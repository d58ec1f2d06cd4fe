"""Tokenise the rows of several sources into one TokenizedDataset, optionally packed.

The result is deterministic: the same rows, tokenizer and settings give the same arrays. Sources may
be larger than memory. Every row that is dropped or cut is counted in `stats`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np

from minisft.batches import TokenizedDataset
from minisft.config.errors import UserError
from minisft.data import formats, one_row
from minisft.data.formats import Example
from minisft.data.one_row import Document, Piece
from minisft.data.packing import GROUP_ROWS, write_packed
from minisft.data.readers import Rows
from minisft.data.settings import Settings, settings_of_source
from minisft.data.stats import (
    Counts,
    check_instruction_part,
    dataset_stats,
    nothing_to_train,
    source_stats,
)
from minisft.data.token_files import TokenWriter
from minisft.text.encoding import encode_batch
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
    """Return token ids and labels of every row of the sources, in order, equal to TRL 1.16's.

    Without packing, each row of the result is one document. `overlong` is applied to labelled rows
    longer than max_length; without packing, rows without a trained label are then dropped. Rows
    with a blank completion are dropped; skip_bad drops malformed rows too. Packing never crosses
    groups of 1000 documents or sources. writer: stores the tokens (default: in memory). num_proc:
    processes that render and tokenise; the result does not depend on it. limit: rows to read per
    source. Raises UserError naming a malformed row, or if nothing is left to train.
    """
    writer = writer or TokenWriter()
    counts, stats_of_sources = Counts(), []
    try:
        for rows in sources:
            resolved = settings_of_source(settings, rows, tokenizer)
            end = one_row.end_of_turn(resolved, tokenizer) if len(rows) else None
            here, first_row = Counts(), writer.num_rows
            here.dropped["malformed"] += rows.skipped
            groups = _groups(_Job(rows, tokenizer, resolved), num_proc, limit)
            _write_source(groups, settings, writer, here)
            check_instruction_part(settings, here, rows.source)
            num_rows = writer.num_rows - first_row
            stats_of_sources.append(source_stats(rows, resolved, end, here, num_rows))
            counts.add(here)
        stats = dataset_stats(stats_of_sources, counts, writer, settings, tokenizer.chat_template)
        if not writer.num_trained:
            raise nothing_to_train(stats, settings)
        return writer.finish(stats)
    except BaseException:
        writer.abandon()
        raise


def _write_source(
    groups: Iterator[_Group], settings: Settings, writer: TokenWriter, counts: Counts
) -> None:
    """Write the documents of one source as rows, packed if settings.packing; update `counts`."""
    waiting: list[Piece] = []
    max_length = settings.max_length or 0  # packing has one
    for documents, group_counts in groups:
        counts.add(group_counts)
        for ids, _ in documents:
            writer.seen(ids)
        waiting += documents
        while len(waiting) >= GROUP_ROWS:
            write_packed(writer, waiting[:GROUP_ROWS], max_length, settings.packing)
            waiting = waiting[GROUP_ROWS:]
    if waiting:
        write_packed(writer, waiting, max_length, settings.packing)


class _Job(NamedTuple):
    """The arguments to tokenise one source; sent once to each worker process."""

    rows: Rows
    tokenizer: Tokenizer
    settings: Settings  # from `settings_of_source`: format and completion_only_loss are known


# The documents of consecutive rows, in row order, and the counts for these rows.
_Group = tuple[list[Piece], Counts]


def _tokenize_group(job: _Job, begin: int, stop: int) -> _Group:
    """Tokenise rows begin..stop-1 of a source; raise UserError naming a malformed row."""
    counts = Counts()
    counts.seen["read"] = stop - begin
    rows = _read(job, begin, stop, counts)
    found = list(rows.items()) if job.settings.format == "input_ids" else _encode(job, rows, counts)
    counts.longest = max((len(document.ids) for _, document in found), default=0)
    documents, bos = [], job.tokenizer.bos_token_id
    for i, document in found:
        pieces = one_row.fit(document, job.settings, job.rows.where(i), counts)
        documents += pieces
        if pieces:
            ids = document.ids
            counts.seen["kept"] += 1
            counts.seen["two_bos"] += bool(len(ids) > 1 and ids[0] == bos == ids[1])
            counts.seen.update(document.seen)
    return documents, counts


def _malformed(job: _Job, row: int, error: UserError | str, counts: Counts) -> None:
    """Count a malformed row as dropped if skip_bad is set, else raise UserError naming the row."""
    if not job.settings.skip_bad:
        raise UserError(f"{job.rows.where(row)}: {error}") from None
    counts.dropped["malformed"] += 1


def _read(job: _Job, begin: int, stop: int, counts: Counts) -> dict[int, Any]:
    """Read rows begin..stop-1; return row number -> Example, or Document if rows are token ids."""
    settings, rows = job.settings, job.rows
    readers = {
        "text": lambda r: formats.read_text(r, text_field=settings.text_field),
        "prompt-completion": formats.read_prompt_completion,
        "messages": formats.read_messages,
        "sharegpt": formats.read_sharegpt,
        "alpaca": formats.read_alpaca,
        "input_ids": lambda r: one_row.read_ids(r, bool(settings.completion_only_loss)),
    }
    read = readers[settings.format or ""]
    examples = {}
    for i in range(begin, stop):
        try:
            example = read(rows[i])
        except UserError as e:
            _malformed(job, i, e, counts)
            continue
        if isinstance(example, Example) and formats.is_empty(example):
            counts.dropped["empty"] += 1
            continue
        examples[i] = example
    return examples


def _encode(job: _Job, examples: dict[int, Example], counts: Counts) -> list[tuple[int, Document]]:
    """Tokenise examples in one batch, on all cores; return (row number, Document) in row order."""
    settings, tokenizer = job.settings, job.tokenizer
    rendered: dict[int, one_row.Rendered] = {}
    for i, example in examples.items():
        try:
            rendered[i] = one_row.render_example(example, settings, tokenizer)
        except UserError as e:
            _malformed(job, i, e, counts)
            continue
        if settings.instruction_part:
            counts.seen["instruction"] += settings.instruction_part in rendered[i].text
    encoded = iter(_encode_all(tokenizer, list(rendered.values())))
    rows = rendered.values()
    alone = [row._replace(text=row.prompt, spans=None) for row in rows if row.prompt is not None]
    prompts = iter(_encode_all(tokenizer, alone))
    documents = []
    for i, row in rendered.items():
        ids, mask = next(encoded)
        prompt = next(prompts)[0] if row.prompt is not None else None
        untrained = mask is not None and settings.assistant_only_loss and not mask.any()
        # A chat whose every answer is marked as untrained is dropped later; it is not malformed.
        if untrained and not row.untrained_answer:
            why = (
                "assistant_only_loss finds no assistant token in this chat; does it hold an "
                "answer, and does the chat template mark every assistant turn?"
            )
            _malformed(job, i, why, counts)
            continue
        documents.append((i, one_row.label_row(ids, mask, prompt, row, settings, tokenizer)))
    return documents


def _encode_all(
    tokenizer: Tokenizer, texts: list[one_row.Rendered]
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Return (ids, mask) of each text; mask is True on tokens in its spans, None if all trained."""
    encoded = {}
    for is_chat in (False, True):
        mine = [(text.text, text.spans) for text in texts if text.is_chat == is_chat]
        encoded[is_chat] = iter(encode_batch(tokenizer, mine, add_special_tokens=not is_chat))
    out = []
    for text in texts:
        ids, mask = next(encoded[text.is_chat])
        out.append((np.array(ids, np.int32), None if mask is None else np.array(mask, bool)))
    return out


def _groups(job: _Job, num_proc: int, limit: int | None) -> Iterator[_Group]:
    """Yield the groups of a source in order, tokenised in this process or by num_proc workers."""
    num_rows = len(job.rows) if limit is None else min(limit, len(job.rows))
    ranges = [(a, min(a + GROUP_ROWS, num_rows)) for a in range(0, num_rows, GROUP_ROWS)]
    if num_proc <= 1 or len(ranges) <= 1:
        for begin, stop in ranges:
            yield _tokenize_group(job, begin, stop)
        return
    try:
        yield from _groups_of_workers(job, min(num_proc, len(ranges)), ranges)
    except BrokenProcessPool:
        raise UserError(
            f"--dataset-num-proc {num_proc}: a tokenising worker died (out of memory, or no "
            "`if __name__ == '__main__'` guard in the calling script); try --dataset-num-proc 1"
        ) from None


def _groups_of_workers(job: _Job, num_proc: int, ranges: list[tuple[int, int]]) -> Iterator[_Group]:
    # Use spawn: a forked worker would inherit this process's CUDA context and locked mutexes.
    with ProcessPoolExecutor(
        num_proc,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(job,),
    ) as pool:
        pending: deque[Future[_Group]] = deque()
        try:
            for begin, stop in ranges:
                pending.append(pool.submit(_work, begin, stop))
                # Bound the number of finished groups that wait in memory for a slower one.
                if len(pending) > 2 * num_proc:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# The job of this worker process (else empty). A global: pickled once per worker, not per group.
_worker_job: list[_Job] = []


def _start_worker(job: _Job) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    # Ctrl-C reaches the whole process group. Ignore it here: the main process ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker_job[:] = [job]


def _work(begin: int, stop: int) -> _Group:
    return _tokenize_group(_worker_job[0], begin, stop)
