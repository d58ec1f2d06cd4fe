"""Show dataset rows: text with the trained tokens marked, token ids, and totals."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minisft.batches import IGNORED, TokenizedDataset
from minisft.files.disk import atomically, writing
from minisft.text.encoding import decode
from minisft.text.tokenizer import Tokenizer

_SHORT = 150  # characters of a stretch of text in the short form
_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"
Style = tuple[str, str]  # before and after trained tokens


def terminal_style() -> Style:
    """Return the marks to print around trained tokens: green on a terminal, else [[ and ]]."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        return _GREEN, _PLAIN
    return "[[", "]]"


def _stretches(
    dataset: TokenizedDataset, span: tuple[int, int], tokenizer: Tokenizer, style: Style
) -> Iterator[tuple[str, list[int], Style]]:
    """Yield (text, ids, marks) of each run of trained or untrained (empty marks) tokens."""
    ids, labels = (a[slice(*span)].tolist() for a in (dataset.input_ids, dataset.labels))
    start = 0
    for i in range(1, len(ids) + 1):
        # The first token of a document has no context, so it is not a target, whatever its label.
        trained = start > 0 and labels[start] != IGNORED
        if i == len(ids) or (labels[i] != IGNORED) != trained:
            text = decode(tokenizer, ids[start:i], skip_special_tokens=False)
            yield printable(text), ids[start:i], style if trained else ("", "")
            start = i


def preview_row(dataset: TokenizedDataset, row: int, tokenizer: Tokenizer, style: Style) -> str:
    """Format one row without truncation: a heading, then the text and the ids of each document."""
    documents = dataset.row_documents(row)
    text, num_trained = "", 0
    for number, (a, b) in enumerate(documents):
        if len(documents) > 1:
            text += f"--- document {number}: {b - a} tokens ---\n"
        listed = []
        for piece, ids, (on, off) in _stretches(dataset, (a, b), tokenizer, style):
            text += f"{on}{piece}{off}"
            listed.append(f"{on}{' '.join(map(str, ids))}{off}")
            num_trained += len(ids) if on else 0
        text += f"\nids: {' '.join(listed)}\n"
    total = documents[-1][1] - documents[0][0]
    return f"=== row {row}: {total} tokens, {num_trained} trained ===\n{text}"


def preview_short(dataset: TokenizedDataset, tokenizer: Tokenizer, style: Style) -> str:
    """Format the first document as one line, shortening long runs of text."""
    line = ""
    for piece, _, (on, off) in _stretches(dataset, dataset.row_documents(0)[0], tokenizer, style):
        if len(piece) > _SHORT:
            piece = f"{piece[: _SHORT // 2]} ... {piece[-_SHORT // 2 :]}"
        line += on + piece.replace("\n", "\\n") + off
        if len(line) > 4 * _SHORT:
            return line + " ..."
    return line


def printable(text: str) -> str:
    """Return the text with terminal controls, and characters that stdout cannot encode, escaped."""
    text = "".join(
        c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def describe_data(what: str, stats: dict[str, Any]) -> list[str]:
    """Describe a dataset in lines to print: totals, the format of each source, and warnings."""
    sources = stats["sources"]
    names = " + ".join(source["source"] for source in sources)
    lines = [f"{what}    {names}: {_totals(stats)}"]
    for source in sources:
        rows = f"{source['source']}: {_counted(source['rows'], 'row')}, "
        line = f"        {rows if len(sources) > 1 else ''}format {source['format']}"
        if source["columns"]:
            line += f" ({', '.join(f'{o} = {t}' for o, t in source['columns'].items())})"
        if source["end_of_turn"] is not None:
            line += f"; a trained turn ends in {source['end_of_turn']!r}"
        lines.append(line)
    return lines + [f"warning: {warning}" for warning in stats["warnings"]]


def _totals(stats: dict[str, Any]) -> str:
    """Format the totals of a dataset: rows read and dropped, tokens, share of trained tokens."""
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


def _write_json(dataset: TokenizedDataset, tokenizer: Tokenizer, num_rows: int, path: Path) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomically(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        out.write('{"rows": [')
        # Write row by row, because the rows may be larger than memory.
        for row in range(num_rows):
            out.write(",\n" if row else "\n")
            json.dump(_json_row(dataset, row, tokenizer), out, ensure_ascii=False)
        out.write("\n]}\n")


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
    data: TokenizedDataset, tokenizer: Tokenizer, count: int, file: str, say: Callable[[str], None]
) -> None:
    """Print the first `count` rows (--preview), or one line of row 0 if count is 0.

    file: if not "", write these rows (all if count is 0) to it as JSON. say: prints a line.
    """
    style, shown = terminal_style(), min(count, len(data))
    if count == 0:
        say(f"row 0   {preview_short(data, tokenizer, style)}")
    for row in range(shown):
        say(preview_row(data, row, tokenizer, style))
    if count:
        how = "in green" if style[0] == _GREEN else "between {} and {}".format(*style)
        say(f"{shown:,} of {len(data):,} rows shown; trained tokens are {how}")
    if file:
        _write_json(data, tokenizer, shown if count else len(data), Path(file))
        say(f"rows written to {file}")
