"""Rows as the loss sees them: their text with the trained tokens marked, their ids, and totals."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from minisft.batches import IGNORED, TokenizedDataset
from minisft.config.errors import UserError
from minisft.text.encoding import decode
from minisft.text.tokenizer import Tokenizer

_SHORT = 150  # characters of a stretch of text, in the short form
_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"


class Style(NamedTuple):
    """What goes around trained tokens, and a stretch of text as it may be printed."""

    on: str
    off: str


def terminal_style() -> Style:
    """Green on a terminal that takes colour, else brackets."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        return Style(_GREEN, _PLAIN)
    return Style("[[", "]]")


class _Stretch(NamedTuple):
    ids: list[int]
    trained: bool


def _stretches(ids: list[int], labels: list[int]) -> Iterator[_Stretch]:
    """Runs of tokens of one document that are all trained, or all not.

    The first token of a document has nothing before it: it is not trained, whatever its label.
    """
    start = 0
    for i in range(1, len(ids) + 1):
        trained = start > 0 and labels[start] != IGNORED
        if i == len(ids) or (labels[i] != IGNORED) != trained:
            yield _Stretch(ids[start:i], trained)
            start = i


def preview_row(dataset: TokenizedDataset, row: int, tokenizer: Tokenizer, style: Style) -> str:
    """One row in full: a heading, the text, and the ids beside it, document by document."""
    documents = dataset.row_documents(row)
    text, total, trained = "", 0, 0
    for number, (a, b) in enumerate(documents):
        ids, labels = dataset.input_ids[a:b].tolist(), dataset.labels[a:b].tolist()
        if len(documents) > 1:
            text += f"--- document {number}: {len(ids)} tokens ---\n"
        shown, listed = "", []
        for stretch in _stretches(ids, labels):
            piece = printable(decode(tokenizer, stretch.ids, skip_special_tokens=False))
            numbers = " ".join(map(str, stretch.ids))
            shown += f"{style.on}{piece}{style.off}" if stretch.trained else piece
            listed.append(f"{style.on}{numbers}{style.off}" if stretch.trained else numbers)
            trained += len(stretch.ids) * stretch.trained
        text += f"{shown}\nids: {' '.join(listed)}\n"
        total += len(ids)
    return f"=== row {row}: {total} tokens, {trained} trained ===\n{text}"


def preview_short(dataset: TokenizedDataset, tokenizer: Tokenizer, style: Style) -> str:
    """The first document on one line, long stretches shortened."""
    a, b = dataset.row_documents(0)[0]
    ids, labels = dataset.input_ids[a:b].tolist(), dataset.labels[a:b].tolist()
    line = ""
    for stretch in _stretches(ids, labels):
        piece = printable(decode(tokenizer, stretch.ids, skip_special_tokens=False))
        if len(piece) > _SHORT:
            piece = f"{piece[: _SHORT // 2]} ... {piece[-_SHORT // 2 :]}"
        piece = piece.replace("\n", "\\n")
        line += f"{style.on}{piece}{style.off}" if stretch.trained else piece
        if len(line) > 4 * _SHORT:
            return line + " ..."
    return line


def printable(text: str) -> str:
    """The text with escapes for what standard output cannot write, and for terminal controls."""
    text = "".join(
        c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def describe_data(what: str, stats: dict[str, Any]) -> list[str]:
    """Lines on a dataset: its totals, what each source was taken for, and warnings."""
    sources = stats["sources"]
    names = " + ".join(told["source"] for told in sources)
    lines = [f"{what}    {names}: {_totals(stats)}"]
    for told in sources:
        line = f"        format {told['format']}"
        if len(sources) > 1:
            rows = _counted(told["rows"], "row")
            line = f"        {told['source']}: {rows}, format {told['format']}"
        if told["columns"]:
            line += f" ({', '.join(f'{o} = {t}' for o, t in told['columns'].items())})"
        if told["end_of_turn"] is not None:
            line += f"; a trained turn ends in {told['end_of_turn']!r}"
        lines.append(line)
    return lines + [f"warning: {warning}" for warning in stats["warnings"]]


def _totals(stats: dict[str, Any]) -> str:
    """Rows read, kept, dropped, cut; tokens and the share of them that is trained."""
    text = _counted(stats["rows_kept"], "row")
    if stats["rows_read"] != stats["rows_kept"]:
        text += f" of {stats['rows_read']:,} read"
    share = stats["num_trained_tokens"] / max(1, stats["num_tokens"])
    text += f", {stats['num_tokens']:,} tokens, {share:.1%} trained, longest {stats['longest']:,}"
    for reason, count in stats["dropped"].items():
        text += f"; {count:,} dropped ({reason})"
    if stats["padded"]:
        text += f"; padding taken out of {_counted(stats['padded'], 'row')}"
    if stats["truncated"]:
        text += f"; {stats['truncated']:,} truncated to --max-length"
    if stats["split"]:
        text += f"; {stats['split']:,} split at --max-length"
    if stats["duplicates"]:
        text += f"; {_counted(stats['duplicates'], 'duplicate')}"
    if stats["packing_efficiency"]:
        packed = _counted(stats["rows_packed"], "packed row")
        text += f"; in {packed}, {stats['packing_efficiency']:.1%} full"
    return text


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def write_preview(
    dataset: TokenizedDataset, tokenizer: Tokenizer, count: int | None, file: str
) -> None:
    """The first `count` rows (None: all) as {"rows": [...]}, in dataset order.

    A row has text, input_ids, labels (not shifted, -100 where not trained), position_ids (from 0
    in each document) and document_ids (the number of each token's document in the row).
    """
    num_rows = len(dataset) if count is None else min(count, len(dataset))
    path = Path(file)
    partial = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as out:
            out.write('{"rows": [')
            for row in range(num_rows):
                out.write(",\n" if row else "\n")
                json.dump(_json_row(dataset, row, tokenizer), out, ensure_ascii=False)
            out.write("\n]}\n")
        partial.replace(path)
    except OSError as e:
        raise UserError(f"--preview-json {file}: cannot be written ({e.strerror})") from None


def _json_row(dataset: TokenizedDataset, row: int, tokenizer: Tokenizer) -> dict[str, Any]:
    documents = dataset.row_documents(row)
    a, b = documents[0][0], documents[-1][1]
    ids = dataset.input_ids[a:b].tolist()
    return {
        "text": decode(tokenizer, ids, skip_special_tokens=False),
        "input_ids": ids,
        "labels": dataset.labels[a:b].tolist(),
        "position_ids": [i for x, y in documents for i in range(y - x)],
        "document_ids": [number for number, (x, y) in enumerate(documents) for _ in range(y - x)],
    }


def show_preview(
    dataset: TokenizedDataset,
    tokenizer: Tokenizer,
    count: int,
    file: str,
    say: Callable[[str], None],
) -> None:
    """--preview and --preview-json: `count` rows in full, else the first one on a line."""
    style = terminal_style()
    if count == 0:
        say(f"row 0   {preview_short(dataset, tokenizer, style)}")
    for row in range(min(count, len(dataset))):
        say(preview_row(dataset, row, tokenizer, style))
    if count:
        how = "in green" if style.on == _GREEN else f"between {style.on} and {style.off}"
        say(
            f"{min(count, len(dataset)):,} of {len(dataset):,} rows shown; trained tokens are {how}"
        )
    if file:
        write_preview(dataset, tokenizer, count or None, file)
        say(f"rows written to {file}")
