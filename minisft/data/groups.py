"""A group of rows of one source to documents: read, render, tokenise, label, cut, count."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minisft.config.errors import UserError
from minisft.data import formats
from minisft.data.formats import Example
from minisft.data.one_row import Document, Piece, fit, label_row, read_ids
from minisft.data.readers import Rows
from minisft.data.render import Rendered, render_example
from minisft.data.settings import Settings
from minisft.data.stats import Counts
from minisft.text.tokenizer import TEXT_OPEN, Tokenizer, encode_batch, encode_chat, encode_spans


class Job(NamedTuple):
    """One source and what its rows are tokenised with; sent once to each worker process."""

    rows: Rows
    tokenizer: Tokenizer
    settings: Settings  # from `settings_of_source`: format and completion_only_loss are known


class Group(NamedTuple):
    """The documents of some consecutive rows, in row order, with their counts."""

    documents: list[Piece]
    counts: Counts


def tokenize_group(job: Job, begin: int, stop: int) -> Group:
    """Return rows begin..stop of a source as documents.

    Raises UserError naming the row if one is malformed, unless skip_bad is set.
    """
    counts = Counts()
    counts.seen["read"] = stop - begin
    rows = _read(job, begin, stop, counts)
    found = list(rows.items()) if job.settings.format == "input_ids" else _encode(job, rows, counts)
    counts.longest = max((len(document.ids) for _, document in found), default=0)
    documents, bos = [], job.tokenizer.bos_token_id
    for i, document in found:
        pieces = fit(document, job.settings, job.rows.where(i), counts)
        documents += pieces
        if pieces:
            ids = document.ids
            counts.seen["kept"] += 1
            counts.seen["two_bos"] += bool(len(ids) > 1 and ids[0] == bos == ids[1])
            counts.seen.update(document.seen)
    return Group(documents, counts)


def _malformed(job: Job, row: int, error: UserError | str, counts: Counts) -> None:
    """Count a malformed row as dropped with skip_bad, else raise a UserError that names it."""
    if not job.settings.skip_bad:
        raise UserError(f"{job.rows.where(row)}: {error}") from None
    counts.dropped["malformed"] += 1


def _read(job: Job, begin: int, stop: int, counts: Counts) -> dict[int, Any]:
    """Row number -> Example, or Document for rows that hold token ids."""
    settings, rows = job.settings, job.rows
    readers = {
        "text": lambda r: formats.read_text(r, text_field=settings.text_field),
        "prompt-completion": formats.read_prompt_completion,
        "messages": formats.read_messages,
        "sharegpt": formats.read_sharegpt,
        "alpaca": formats.read_alpaca,
        "input_ids": lambda r: read_ids(
            r, completion_only_loss=bool(settings.completion_only_loss)
        ),
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


def _encode(job: Job, examples: dict[int, Example], counts: Counts) -> list[tuple[int, Document]]:
    """(row, document) in row order; texts go to the tokenizer in batches, which use all cores."""
    settings, tokenizer = job.settings, job.tokenizer
    rendered: dict[int, Rendered] = {}
    for i, example in examples.items():
        try:
            rendered[i] = render_example(example, settings, tokenizer)
        except UserError as e:
            _malformed(job, i, e, counts)
            continue
        if settings.instruction_part:
            counts.seen["instruction"] += settings.instruction_part in rendered[i].text
    texts = _encode_texts(tokenizer, list(rendered.values()))
    with_prompt = [(r.prompt, r.is_chat) for r in rendered.values() if r.prompt is not None]
    prompts = iter(_encode_all(tokenizer, with_prompt))
    documents = []
    for (i, row), (ids, mask) in zip(rendered.items(), texts, strict=True):
        prompt = next(prompts) if row.prompt is not None else None
        untrained = mask is not None and settings.assistant_only_loss and not mask.any()
        # Every answer may be marked as not to train: such a row is dropped later, not an error.
        if untrained and not row.untrained_answer:
            why = (
                "assistant_only_loss finds no assistant token in this chat; does it hold an "
                "answer, and does the chat template mark every assistant turn?"
            )
            _malformed(job, i, why, counts)
            continue
        documents.append((i, label_row(ids, mask, prompt, row, settings, tokenizer)))
    return documents


def _encode_texts(
    tokenizer: Tokenizer, rendered: list[Rendered]
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """(ids, mask) of each row; mask (None: all trained) is True on tokens that the spans cover."""
    plain = iter(_encode_all(tokenizer, [(r.text, r.is_chat) for r in rendered if r.spans is None]))
    covered = {}
    for is_chat in (False, True):
        texts = [(r.text, r.spans) for r in rendered if r.spans is not None if r.is_chat == is_chat]
        covered[is_chat] = iter(encode_spans(tokenizer, texts, add_special_tokens=not is_chat))
    out = []
    for row in rendered:
        if row.spans is None:
            out.append((next(plain), None))
        else:
            ids, mask = next(covered[row.is_chat])
            out.append((np.array(ids, dtype=np.int32), np.array(mask, dtype=bool)))
    return out


def _encode_all(tokenizer: Tokenizer, texts: list[tuple[str, bool]]) -> list[np.ndarray]:
    """Ids, int32, of each (text, is_chat)."""
    plain = [text for text, is_chat in texts if not is_chat]
    # A chat that marks special-token strings as text is encoded on its own, piece by piece.
    chats = [text for text, is_chat in texts if is_chat and TEXT_OPEN not in text]
    batches = {
        False: iter(encode_batch(tokenizer, plain, add_special_tokens=True)),
        True: iter(encode_batch(tokenizer, chats, add_special_tokens=False)),
    }
    ids = [
        encode_chat(tokenizer, text) if is_chat and TEXT_OPEN in text else next(batches[is_chat])
        for text, is_chat in texts
    ]
    return [np.array(row, dtype=np.int32) for row in ids]
