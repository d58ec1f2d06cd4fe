"""Rows to token arrays: render, tokenise, label, cut, pack; each row counted.

Everything is exact and in order: the same rows, tokenizer and settings give the same arrays, so a
run can be repeated from its flags. Rows go through in groups of 1000, so a source may be larger
than memory. Nothing is dropped or cut without being counted in `stats`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from minisft.batches import IGNORED, TokenizedDataset
from minisft.config.errors import UserError
from minisft.data import formats
from minisft.data.formats import Example
from minisft.data.packing import GROUP_ROWS, check_packing, pack_group
from minisft.data.readers import Rows
from minisft.data.token_files import TokenWriter
from minisft.text import chat, masks, sandbox
from minisft.text.encoding import (
    TEXT_OPEN,
    encode_batch,
    encode_chat,
    encode_spans,
    mark_special_text,
)
from minisft.text.parts import join_unread
from minisft.text.tokenizer import Tokenizer

OVERLONG = ("truncate", "drop", "split", "error")


@dataclass(frozen=True)
class Settings:
    """What shapes the arrays besides the rows and the tokenizer."""

    format: str | None = None  # one of formats.FORMATS; None detects it
    text_field: str = "text"
    max_length: int | None = None
    overlong: str | None = None  # one of OVERLONG; None: truncate, or what the packing does
    packing: str | None = None  # one of packing.PACKING
    completion_only_loss: bool | None = None  # None: where rows have a prompt and a completion
    assistant_only_loss: bool = False
    instruction_part: str = ""  # with response_part: only what follows the one is trained,
    response_part: str = ""  # up to the other
    keep_untrained: bool = False  # neither cut nor drop rows: `pack` takes them as they are
    skip_bad: bool = False

    def __post_init__(self):
        if self.overlong is not None and self.overlong not in OVERLONG:
            raise UserError(f"overlong is {self.overlong!r}; expected one of {', '.join(OVERLONG)}")
        if bool(self.instruction_part) != bool(self.response_part):
            raise UserError(
                "--instruction-part and --response-part belong together: the one says where "
                "training on a response ends, the other where it begins; give both"
            )
        if self.response_part and self.assistant_only_loss:
            raise UserError(
                "--assistant-only-loss and --response-part both say what is trained; give one"
            )
        if self.packing is not None:
            check_packing(self.packing, self.max_length)


def tokenize_rows(
    rows: Rows | Sequence[dict],
    tokenizer: Tokenizer,
    *,
    format: str | None,
    text_field: str = "text",
    max_length: int | None,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    keep_untrained: bool = False,
    skip_bad: bool = False,
    source: str,
) -> TokenizedDataset:
    """`tokenize` for one source, in memory; a list of dicts is named by `source` in messages."""
    settings = Settings(
        format=format,
        text_field=text_field,
        max_length=max_length,
        completion_only_loss=completion_only_loss,
        assistant_only_loss=assistant_only_loss,
        keep_untrained=keep_untrained,
        skip_bad=skip_bad,
    )
    rows = rows if isinstance(rows, Rows) else named_rows(rows, source)
    return tokenize([rows], tokenizer, settings)


def named_rows(records: Sequence[dict], source: str) -> Rows:
    """Dicts in memory as Rows; their columns are the union over all of them."""
    return Rows(source, records, tuple(dict.fromkeys(name for r in records for name in r)))


def tokenize(
    sources: Sequence[Rows],
    tokenizer: Tokenizer,
    settings: Settings,
    *,
    writer: TokenWriter | None = None,
    num_proc: int = 1,
    limit: int | None = None,
) -> TokenizedDataset:
    """Token ids and labels of every row of the sources, one after the other; as TRL 1.16.

    Without packing a row of the result is one document. Rows longer than max_length are treated as
    `overlong` says once labelled, and dropped if no trained label is left (packing keeps those).
    Rows with a blank completion are dropped; skip_bad drops rows at fault too. All are counted in
    `stats`, which also tells what each source held. With packing, each group of 1000 documents of
    a source is packed by itself. writer: where the tokens go (memory). num_proc: processes that
    render and tokenise; the result does not depend on it. limit: read that many rows of a source.
    Raises UserError naming the row, and if no row or no trained token is left.
    """
    writer = writer or TokenWriter()
    try:
        return _tokenize(sources, tokenizer, settings, writer, num_proc, limit)
    except BaseException:
        writer.abandon()
        raise


def _tokenize(
    sources: Sequence[Rows],
    tokenizer: Tokenizer,
    settings: Settings,
    writer: TokenWriter,
    num_proc: int,
    limit: int | None,
) -> TokenizedDataset:
    counts, told = _Counts(), []
    for rows in sources:
        resolved = _resolve(settings, rows, tokenizer)
        job = _Job(rows, tokenizer, resolved, _end_of_turn(rows, tokenizer, resolved))
        here, first_row = _Counts(), writer.num_rows
        here.dropped["malformed"] += rows.skipped
        waiting: list[tuple[np.ndarray, np.ndarray]] = []
        for group in _groups(job, num_proc, limit):
            here.add(group.counts)
            for ids, _ in group.documents:
                writer.seen(ids)
            if settings.packing is None:
                for document in group.documents:
                    writer.add([document])
                continue
            waiting += group.documents
            while len(waiting) >= GROUP_ROWS:
                _add_packed(writer, waiting[:GROUP_ROWS], settings)
                waiting = waiting[GROUP_ROWS:]
        _add_packed(writer, waiting, settings)
        if here.seen["kept"] and settings.instruction_part and not here.seen["instruction"]:
            raise UserError(
                f"{rows.source}: --instruction-part {settings.instruction_part!r} is in none of "
                "the rendered rows, so all behind the first response would be trained"
                + _newline_hint(settings.instruction_part)
            )
        told.append(_source_stats(job, here, writer.num_rows - first_row))
        counts.add(here)
    stats = _stats(told, counts, writer, settings, sources, tokenizer)
    if not writer.num_trained:
        raise _nothing_to_train(stats, settings, sources)
    return writer.finish(stats)


def _add_packed(
    writer: TokenWriter, documents: list[tuple[np.ndarray, np.ndarray]], settings: Settings
) -> None:
    if not documents or settings.packing is None:
        return
    assert settings.max_length is not None
    ids, labels = (np.concatenate(arrays) for arrays in zip(*documents, strict=True))
    offsets = [0, *itertools.accumulate(len(d[0]) for d in documents)]
    for row in pack_group(offsets, max_length=settings.max_length, strategy=settings.packing):
        writer.add([(ids[a:b], labels[a:b]) for a, b in row])


# ---------------------------------------------------------------------------------------- counts


@dataclass
class _Counts:
    """What happened to rows: why some were dropped, and what was seen in the others."""

    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    seen: Counter[str] = field(default_factory=Counter)
    longest: int = 0  # tokens, before a row is cut

    def add(self, other: _Counts) -> None:
        self.dropped.update(other.dropped)
        self.seen.update(other.seen)
        self.longest = max(self.longest, other.longest)


def _source_stats(job: _Job, counts: _Counts, num_rows: int) -> dict[str, Any]:
    rows, settings = job.rows, job.settings
    return {
        "source": rows.source,
        "format": settings.format,
        "columns": rows.renames,
        "rows_total": len(rows) + rows.skipped,
        "rows_read": counts.seen["read"] + rows.skipped,
        "rows_kept": counts.seen["kept"],
        "rows": num_rows,
        "end_of_turn": job.end_of_turn,
    }


def _stats(
    told: list[dict[str, Any]],
    counts: _Counts,
    writer: TokenWriter,
    settings: Settings,
    sources: Sequence[Rows],
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    found = dict.fromkeys(s["format"] for s in told)
    template = tokenizer.chat_template
    stats = {
        "format": ", ".join(found),
        "rows_read": sum(s["rows_read"] for s in told),
        "rows_kept": counts.seen["kept"],
        "dropped": {reason: n for reason, n in counts.dropped.items() if n},
        "padded": counts.seen["padded"],
        "truncated": counts.seen["truncated"],
        "split": counts.seen["split"],
        "longest": counts.longest,
        "duplicates": writer.num_duplicates(),
        "packing_efficiency": None,
        "chat_template_sha256": template and hashlib.sha256(template.encode()).hexdigest(),
        "warnings": _warnings(counts.seen),
        "sources": told,
    }
    if settings.packing is not None and settings.max_length is not None:
        stats["rows_packed"] = writer.num_rows
        stats["packing_efficiency"] = writer.num_tokens / max(
            writer.num_rows * settings.max_length, 1
        )
    if settings.completion_only_loss is None and (n := counts.seen["unread_mask"]):
        stats["warnings"].append(
            f"{n} of {counts.seen['kept']} rows have a completion_mask, which only "
            "--completion-only-loss heeds; without it every token is trained"
        )
    if settings.completion_only_loss and found.keys() & {"text", "messages", "sharegpt"}:
        stats["warnings"].append(
            f"completion_only_loss has no effect on format {stats['format']!r}: every token is "
            "trained; use prompt and completion columns, or assistant_only_loss"
        )
    return stats


# What was seen of n of the kept rows, and what to do.
_SEEN = {
    "lost_prompt_tokens": (
        "in {n} of {kept} rows the prompt's last tokens change when the completion "
        "follows, and count as completion; end the prompt at a token boundary, for instance "
        "with the blank at the start of the completion"
    ),
    "two_bos": (
        "{n} of {kept} rows start with two BOS tokens; the tokenizer adds one, so leave "
        "it out of the text"
    ),
    "special_text": (
        "{n} of {kept} chats hold special-token strings in their messages; they are "
        "encoded as plain text"
    ),
    "joined_parts": (
        "{n} of {kept} chats hold contents in parts that the chat template does not read; "
        "the texts of the parts are joined"
    ),
    "no_answer": (
        "{n} of {kept} chats hold no assistant message, and every token of them is trained, "
        "the user's words too; leave them out, or use --assistant-only-loss"
    ),
    "no_end": (
        "in {n} of {kept} chats the last trained token is no special token, so nothing there "
        "teaches the model to stop; does the chat template end the assistant's turn, inside "
        "what is trained?"
    ),
    "unread_tools": (
        "{n} of {kept} chats have tools that the chat template does not write, so the model "
        "does not see them; give a --chat-template that does, or leave the tools out"
    ),
    "unread_marks": (
        "{n} of {kept} chats mark answers with 'weight': 0 or 'train': false, and these are "
        "trained all the same; with --assistant-only-loss they are not"
    ),
}


def _warnings(seen: Counter[str]) -> list[str]:
    told = ((seen[name], text) for name, text in _SEEN.items())
    return [text.format(n=n, kept=seen["kept"]) for n, text in told if n]


def _newline_hint(part: str) -> str:
    return "; bash writes a line end as $'...\\n'" if "\\n" in part else ""


def _nothing_to_train(
    stats: dict[str, Any], settings: Settings, sources: Sequence[Rows]
) -> UserError:
    names = ", ".join(rows.source for rows in sources)
    dropped = "".join(f", {n} dropped ({reason})" for reason, n in stats["dropped"].items())
    cut = settings.max_length is not None and stats["longest"] > settings.max_length
    remedy = "raise --max-length" if cut else "give rows with something to learn"
    if settings.response_part and not cut:
        remedy = (
            f"is --response-part {settings.response_part!r} in the rendered rows? Look at them "
            "with --preview" + _newline_hint(settings.response_part)
        )
    return UserError(
        f"{names}: nothing is left to train: {stats['rows_read']} rows read, "
        f"{stats['rows_kept']} kept{dropped}; the longest row has "
        f"{stats['longest']} tokens, --max-length is {settings.max_length}; {remedy}"
    )


# ---------------------------------------------------------------------------------------- groups


class _Job(NamedTuple):
    """One source, and all that its rows are tokenised with."""

    rows: Rows
    tokenizer: Tokenizer
    settings: Settings  # its format and completion_only_loss are known
    end_of_turn: str | None  # what ends a trained turn, where only the assistant's are


class _Group(NamedTuple):
    documents: list[tuple[np.ndarray, np.ndarray]]  # (ids, labels), int32
    counts: _Counts


def _groups(job: _Job, num_proc: int, limit: int | None) -> Iterator[_Group]:
    """The groups of a source in order, tokenised here or by num_proc processes."""
    num_rows = len(job.rows) if limit is None else min(limit, len(job.rows))
    ranges = [(a, min(a + GROUP_ROWS, num_rows)) for a in range(0, num_rows, GROUP_ROWS)]
    if num_proc <= 1 or len(ranges) <= 1:
        for begin, stop in ranges:
            yield _tokenize_range(job, begin, stop)
        return
    try:
        yield from _groups_of_processes(job, min(num_proc, len(ranges)), ranges)
    except BrokenProcessPool:
        raise UserError(
            f"--dataset-num-proc {num_proc}: a process that tokenises ended unasked; was it short "
            "of memory, or is the calling script without `if __name__ == '__main__'`? Use 1"
        ) from None


def _groups_of_processes(
    job: _Job, num_proc: int, ranges: list[tuple[int, int]]
) -> Iterator[_Group]:
    # Fresh processes: a forked one would share the threads and the GPU of this one.
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
                if len(pending) > 2 * num_proc:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_worker_job: list[_Job] = []  # of a worker process; empty elsewhere


def _start_worker(job: _Job) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which then ends these
    _worker_job[:] = [job]


def _work(begin: int, stop: int) -> _Group:
    return _tokenize_range(_worker_job[0], begin, stop)


def _tokenize_range(job: _Job, begin: int, stop: int) -> _Group:
    """Rows begin..stop of a source as documents, in row order, with their counts."""
    counts = _Counts()
    counts.seen["read"] = stop - begin
    examples = _read_examples(job, begin, stop, counts)
    found = _tokenize_group(job, examples, counts)
    counts.longest = max((len(d.ids) for _, d in found), default=0)
    documents = []
    for i, document in found:
        pieces = _fit(document, job, i, counts)
        counts.seen["kept"] += bool(pieces)
        documents += pieces
        if pieces:
            _note(document, job, counts)
    return _Group(documents, counts)


def _note(document: _Document, job: _Job, counts: _Counts) -> None:
    ids, bos = document.ids, job.tokenizer.bos_token_id
    counts.seen["two_bos"] += len(ids) > 1 and ids[0] == bos == ids[1]
    for name in _Document._fields[2:]:
        counts.seen[name] += getattr(document, name)


def _fit(
    document: _Document, job: _Job, row: int, counts: _Counts
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The document as it is kept: whole, cut, in pieces, or not at all."""
    settings = job.settings
    whole = [(document.ids, document.labels)]
    if settings.keep_untrained:
        return whole
    length = settings.max_length or max(1, len(document.ids))
    too_long = len(document.ids) > length
    if too_long and settings.overlong == "error":
        raise UserError(
            f"{job.rows.where(row)}: {len(document.ids)} tokens; --max-length is {length} and "
            "--overlong is error; raise the one, or choose truncate, split or drop"
        )
    if too_long and settings.overlong == "drop":
        counts.dropped["longer than max_length"] += 1
        return []
    if too_long and settings.packing is not None and settings.overlong is None:
        counts.seen["truncated" if settings.packing == "bfd" else "split"] += 1
        return whole  # packing cuts it
    if not too_long:
        pieces = whole
    else:
        stops = range(0, len(document.ids), length) if settings.overlong == "split" else [0]
        pieces = [(document.ids[a : a + length], document.labels[a : a + length]) for a in stops]
    if settings.packing is None:
        # The first token of a document is never a target, but TRL keeps such a row, and so here.
        pieces = [piece for piece in pieces if (piece[1] != IGNORED).any()]
    if not pieces:
        reason = "nothing to train within max_length" if too_long else "nothing to train"
        counts.dropped[reason] += 1
    elif too_long:
        counts.seen["split" if settings.overlong == "split" else "truncated"] += 1
    return pieces


# ------------------------------------------------------------------------------------- settings


def _resolve(settings: Settings, rows: Rows, tokenizer: Tokenizer) -> Settings:
    """The settings with the source's format, and whether prompts are masked; checked."""
    format = settings.format
    if format is None:
        format = formats.detect_format(
            rows.columns, text_field=settings.text_field, source=rows.source
        )
    elif missing := formats.missing_columns(format, rows.columns, text_field=settings.text_field):
        close = formats.nearest(missing[0], rows.columns)
        hint = f"did you mean {close!r}? " if close else ""
        raise UserError(
            f"{rows.source}: format {format} needs column {', '.join(missing)}; found columns "
            f"{', '.join(rows.columns)}; {hint}name yours with --columns or --dataset-text-field"
        )
    completion_only = settings.completion_only_loss
    if completion_only is None:
        completion_only = format == "alpaca" or not formats.missing_columns(
            "prompt-completion", rows.columns
        )
    if format != "input_ids" and tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos_token; set it in tokenizer_config.json")
    if settings.assistant_only_loss and format == "text":
        raise UserError(
            f"{rows.source}: assistant_only_loss needs chat rows, but the format is 'text'; "
            "leave it out, or give a 'messages' column"
        )
    if settings.response_part and format == "input_ids":
        raise UserError(
            f"{rows.source}: --response-part looks into text, but the rows are token ids; give "
            "them labels or masks"
        )
    return replace(settings, format=format, completion_only_loss=completion_only)


# ------------------------------------------------------------------------------------- one row


class _Document(NamedTuple):
    ids: np.ndarray  # int32 [n]
    labels: np.ndarray  # int32 [n]
    lost_prompt_tokens: bool = False  # the prompt alone ends in other tokens
    special_text: bool = False  # a message holds a special token's string
    joined_parts: bool = False  # the template does not read the parts of a content
    no_answer: bool = False  # a chat that is trained whole has no assistant message
    no_end: bool = False  # the last trained token of a chat is no special token
    unread_tools: bool = False  # the template does not write the row's tools
    unread_marks: bool = False  # an answer that is trained is marked as one to leave out
    padded: bool = False  # tokens were taken out: attention_mask is 0 there
    unread_mask: bool = False  # completion_mask is 0 somewhere, and not asked for


def _read_examples(job: _Job, begin: int, stop: int, counts: _Counts) -> dict[int, Any]:
    """Row number -> Example, or _Document for rows that hold token ids."""
    settings, rows = job.settings, job.rows
    readers = {
        "text": lambda r: formats.read_text(r, text_field=settings.text_field),
        "prompt-completion": formats.read_prompt_completion,
        "messages": formats.read_messages,
        "sharegpt": formats.read_sharegpt,
        "alpaca": formats.read_alpaca,
        "input_ids": lambda r: _read_ids(r, bool(settings.completion_only_loss)),
    }
    read = readers[settings.format or ""]
    examples = {}
    for i in range(begin, stop):
        try:
            example = read(rows[i])
        except UserError as e:
            if not settings.skip_bad:
                raise UserError(f"{rows.where(i)}: {e}") from None
            counts.dropped["malformed"] += 1
            continue
        if isinstance(example, Example) and formats.is_empty(example):
            counts.dropped["empty"] += 1
            continue
        examples[i] = example
    return examples


def _read_ids(record: dict, completion_only_loss: bool) -> _Document:
    """A row that is tokenised already: labels if it has them, else ids under its masks.

    Padding, where attention_mask is 0, is taken out of both.
    """
    ids = _int_array(record, "input_ids", None)
    unread_mask = False
    if record.get("labels") is not None:
        labels = _int_array(record, "labels", len(ids))
    else:
        labels = ids.copy()
        for name in ("completion_mask", "assistant_masks"):
            if record.get(name) is None:
                continue
            untrained = _int_array(record, name, len(ids)) == 0
            if name == "completion_mask" and not completion_only_loss:
                unread_mask = bool(untrained.any())
            else:
                labels[untrained] = IGNORED
    if record.get("attention_mask") is None:
        return _Document(ids, labels, unread_mask=unread_mask)
    mask = _int_array(record, "attention_mask", len(ids))
    if len(mask) and mask.max() > 1:
        raise UserError(
            f"attention_mask holds {mask.max()}; expected 1 for a token and 0 for padding"
        )
    kept = mask == 1
    return _Document(ids[kept], labels[kept], padded=not kept.all(), unread_mask=unread_mask)


def _int_array(record: dict, name: str, length: int | None) -> np.ndarray:
    value = record.get(name)
    try:
        array = np.asarray(value if value != [] else np.zeros(0, dtype=np.int64))
    except ValueError:  # lists of several lengths inside it
        raise UserError(f"{name} is a list of lists; expected a list of integers") from None
    if not isinstance(value, list) or array.ndim != 1 or array.dtype.kind not in "iub":
        raise UserError(f"{name} is {type(value).__name__}; expected a list of integers")
    if length is not None and len(array) != length:
        raise UserError(f"{name} has {len(array)} entries; expected {length}, as input_ids")
    lowest = IGNORED if name == "labels" else 0
    if len(array) and not (lowest <= array.min() and array.max() < 2**31):
        raise UserError(f"{name} holds {array.min()}..{array.max()}; expected {lowest}..2^31-1")
    return array.astype(np.int32)


def _tokenize_group(
    job: _Job, examples: dict[int, Any], counts: _Counts
) -> list[tuple[int, _Document]]:
    """(row, document) of one group in row order; texts of a kind go through one batch."""
    settings, tokenizer = job.settings, job.tokenizer
    if settings.format == "input_ids":
        return list(examples.items())
    prepared: dict[int, _Prepared] = {}
    for i, example in examples.items():
        try:
            prepared[i] = _prepare(example, job)
            if settings.instruction_part:
                counts.seen["instruction"] += settings.instruction_part in prepared[i].whole.text
        except UserError as e:
            if not settings.skip_bad:
                raise UserError(f"{job.rows.where(i)}: {e}") from None
            counts.dropped["malformed"] += 1
    whole = _encode_wholes(tokenizer, list(prepared.values()))
    prompts = iter(
        _encode_all(tokenizer, [p.prompt for p in prepared.values() if p.prompt is not None])
    )
    documents = []
    for (i, p), (ids, mask) in zip(prepared.items(), whole, strict=True):
        prompt = next(prompts) if p.prompt is not None else None
        unmarked = mask is not None and settings.assistant_only_loss and not mask.any()
        if unmarked and not p.marked:
            if not settings.skip_bad:
                raise UserError(
                    f"{job.rows.where(i)}: assistant_only_loss finds no assistant token in this "
                    "chat; does it hold an answer, and does the chat template mark every "
                    "assistant turn?"
                )
            counts.dropped["malformed"] += 1
            continue
        documents.append((i, _label(ids, mask, prompt, p, job)))
    return documents


class _Text(NamedTuple):
    """A string to encode; a chat carries its own special tokens, a text gets the tokenizer's."""

    text: str
    is_chat: bool


class _Prepared(NamedTuple):
    whole: _Text
    prompt: _Text | None
    spans: list[tuple[int, int]] | None  # characters of `whole` that are trained; None: all
    joined_parts: bool = False
    no_answer: bool = False
    unread_tools: bool = False
    marked: bool = False  # an answer is marked as one to leave out


def _prepare(example: Example, job: _Job) -> _Prepared:
    """The strings of a row: EOS appended to text, chats rendered."""
    settings, tokenizer = job.settings, job.tokenizer
    if isinstance(example.completion, str):
        if settings.assistant_only_loss:
            raise UserError("assistant_only_loss needs chat rows; this row is text")
        prompt, completion = example.prompt, example.completion
        assert prompt is None or isinstance(prompt, str)
        eos = tokenizer.special_tokens["eos_token"]
        completion += "" if completion.endswith(eos) else eos
        whole = _Text(_encodable((prompt or "") + completion), False)
        asked = None if prompt is None else _Text(prompt, False)
        return _Prepared(whole, asked, _marked_spans(whole.text, settings))
    prompt = example.prompt if isinstance(example.prompt, list) else None
    given = [*(prompt or []), *example.completion]
    messages = join_unread(given, lambda m: _render(example, m, tokenizer, generate=False))
    joined = messages != given
    if settings.assistant_only_loss:
        text, spans = _assistant_spans(example, messages, tokenizer)
        spans = masks.without_marked(spans, messages)
    else:
        text = _render(example, messages, tokenizer, generate=False)
        spans = _marked_spans(text, settings)
    no_answer = spans is None and not masks.answers(messages)
    trained = example.completion if settings.completion_only_loss else messages
    marked = not all(map(masks.is_trained, masks.answers(trained)))
    unread_tools = _leaves_out_tools(example, messages, tokenizer, text)
    asked = None
    if prompt is not None:
        asked = _Text(_render(example, messages[: len(prompt)], tokenizer, generate=True), True)
    return _Prepared(_Text(text, True), asked, spans, joined, no_answer, unread_tools, marked)


def _marked_spans(text: str, settings: Settings) -> list[tuple[int, int]] | None:
    if not settings.response_part:
        return None
    return masks.marker_spans(text, settings.instruction_part, settings.response_part)


def _encodable(text: str) -> str:
    """Refuse what cannot be tokenised: half of a surrogate pair, which JSON can spell and no UTF-8
    text can hold, and a row so long that its tokens alone would fill the memory."""
    if len(text) > sandbox.MAX_CHARS:
        raise UserError(
            f"the text has {len(text):,} characters; at most {sandbox.MAX_CHARS:,} of one row are "
            "tokenised: split it into several rows"
        )
    try:
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise UserError(
            f"the text holds a lone surrogate U+{ord(text[e.start]):04X} at character {e.start}; "
            "repair the row's \\u escapes"
        ) from None
    return text


# Names that a row's chat_template_kwargs may set but that are not template variables.
_RENDER_NAMES = ("chat_template", "tools", "documents", "add_generation_prompt")
_REFUSED_NAMES = ("messages", "continue_final_message", "tokenize", "return_dict")


def _render_arguments(example: Example, tokenizer: Tokenizer) -> tuple[str, dict[str, Any]]:
    variables = dict(example.variables or {})
    if refused := [name for name in _REFUSED_NAMES if name in variables]:
        raise UserError(f"chat_template_kwargs sets {refused[0]!r}, which a row cannot choose")
    given = {name: variables.pop(name) for name in _RENDER_NAMES if name in variables}
    tools = given.get("tools", example.tools)
    return given.get("chat_template") or tokenizer.template_for(tools), {
        "special_tokens": tokenizer.special_tokens,
        "tools": mark_special_text(tokenizer, tools),
        "documents": mark_special_text(tokenizer, given.get("documents")),
        "variables": variables,
        "add_generation_prompt": bool(given.get("add_generation_prompt", False)),
    }


def _render(example: Example, messages: list[dict], tokenizer: Tokenizer, *, generate: bool) -> str:
    template, arguments = _render_arguments(example, tokenizer)
    arguments["add_generation_prompt"] |= generate
    marked = mark_special_text(tokenizer, messages)
    return _encodable(chat.render(template, marked, **arguments))


def _leaves_out_tools(
    example: Example, messages: list[dict], tokenizer: Tokenizer, text: str
) -> bool:
    """Whether the chat, rendered as `text`, is the same without the row's tools."""
    variables = dict(example.variables or {})
    if not variables.pop("tools", example.tools):
        return False
    bare = example._replace(tools=None, variables=variables)
    try:
        return _render(bare, messages, tokenizer, generate=False) == text
    except UserError:  # the template needs them
        return False


def _assistant_spans(
    example: Example, messages: list[dict], tokenizer: Tokenizer
) -> tuple[str, list[tuple[int, int]]]:
    """(rendered chat, the characters of the assistant's turns)."""
    template, arguments = _render_arguments(example, tokenizer)
    del arguments["add_generation_prompt"]
    marked = mark_special_text(tokenizer, messages)
    if chat.has_generation_block(template):
        text, spans = chat.assistant_spans(template, marked, **arguments)
        return _encodable(text), spans

    def render(messages: list[dict], generate: bool) -> str:
        return chat.render(template, messages, add_generation_prompt=generate, **arguments)

    special = tokenizer.special_text
    shape = _turn_shape(template, json.dumps(arguments, sort_keys=True, default=str), special)
    text, spans = masks.prefix_spans(render, marked, shape, special)
    return _encodable(text), spans


@lru_cache(maxsize=64)
def _turn_shape(template: str, arguments: str, special: re.Pattern[str]) -> masks.TurnShape:
    """`masks.turn_shape` of a template under the arguments (JSON) that a row renders with."""
    given = json.loads(arguments)

    def render(messages: list[dict], generate: bool) -> str:
        return chat.render(template, messages, add_generation_prompt=generate, **given)

    return masks.turn_shape(render, special)


def _end_of_turn(rows: Rows, tokenizer: Tokenizer, settings: Settings) -> str | None:
    """With assistant_only_loss, what ends a trained turn; the masks are tried on a probe first."""
    if not settings.assistant_only_loss or settings.format == "input_ids" or not len(rows):
        return None
    if tokenizer.chat_template is None:
        return None  # each row says so, unless it brings its own

    def find(messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        return _assistant_spans(Example(None, messages), messages, tokenizer)

    try:
        return masks.check_spans(find)
    except UserError as e:
        raise UserError(f"assistant_only_loss: {e}") from None


def _encode_wholes(
    tokenizer: Tokenizer, prepared: list[_Prepared]
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """(ids, mask) of each row; mask (None: all) is True on the tokens that the spans cover."""
    plain = iter(_encode_all(tokenizer, [p.whole for p in prepared if p.spans is None]))
    covered = {
        is_chat: iter(
            encode_spans(
                tokenizer,
                [
                    (p.whole.text, p.spans)
                    for p in prepared
                    if p.spans is not None and p.whole.is_chat == is_chat
                ],
                add_special_tokens=not is_chat,
            )
        )
        for is_chat in (False, True)
    }
    out = []
    for p in prepared:
        if p.spans is None:
            out.append((next(plain), None))
        else:
            ids, mask = next(covered[p.whole.is_chat])
            out.append((np.array(ids, dtype=np.int32), np.array(mask, dtype=bool)))
    return out


def _encode_all(tokenizer: Tokenizer, texts: list[_Text]) -> list[np.ndarray]:
    plain = [t.text for t in texts if not t.is_chat]
    chats = [t.text for t in texts if t.is_chat and TEXT_OPEN not in t.text]
    batches = {
        False: iter(encode_batch(tokenizer, plain, add_special_tokens=True)),
        True: iter(encode_batch(tokenizer, chats, add_special_tokens=False)),
    }
    ids = [
        encode_chat(tokenizer, t.text)
        if t.is_chat and TEXT_OPEN in t.text
        else next(batches[t.is_chat])
        for t in texts
    ]
    return [np.array(row, dtype=np.int32) for row in ids]


def _label(
    whole: np.ndarray,
    mask: np.ndarray | None,
    prompt: np.ndarray | None,
    prepared: _Prepared,
    job: _Job,
) -> _Document:
    """Labels of a row: the ids, masked up to where the prompt's tokens end."""
    labels = whole.copy()
    lost = False
    if prompt is not None:
        shared = min(len(prompt), len(whole))
        differs = np.flatnonzero(prompt[:shared] != whole[:shared])
        prompt_length = int(differs[0]) if len(differs) else shared
        lost = prompt_length < len(prompt)
        if job.settings.completion_only_loss:
            labels[:prompt_length] = IGNORED
    if mask is not None:
        labels[~mask] = IGNORED
    is_chat = prepared.whole.is_chat
    return _Document(
        whole,
        labels,
        lost,
        TEXT_OPEN in prepared.whole.text,
        prepared.joined_parts,
        prepared.no_answer and prompt is None,
        is_chat and not prepared.no_answer and not _ends_in_special(whole, labels, job.tokenizer),
        prepared.unread_tools,
        prepared.marked and not job.settings.assistant_only_loss,
    )


def _ends_in_special(ids: np.ndarray, labels: np.ndarray, tokenizer: Tokenizer) -> bool:
    """Whether the last trained token, blanks aside, is a special token; True if none is trained."""
    trained = ids[labels != IGNORED]
    for i in trained[:-5:-1].tolist():  # a template may write a line end behind the turn
        if i in tokenizer.special_ids:
            return True
        if tokenizer.backend.decode([i], skip_special_tokens=False).strip():
            return False
    return not len(trained)
