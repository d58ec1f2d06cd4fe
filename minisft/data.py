"""Files to token arrays: read rows, tokenise them, pack them.

Everything is exact and in order: the same rows, tokenizer and settings give the same arrays, so a
run can be repeated from its flags. Nothing is dropped or cut without being counted in `stats`.
"""

from __future__ import annotations

import bisect
import csv
import hashlib
import io
import itertools
import json
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from minisft import chat, formats
from minisft.config import UserError
from minisft.formats import Example
from minisft.tokenizer import (
    TEXT_OPEN,
    Tokenizer,
    encode_batch,
    encode_chat,
    encode_chat_spans,
    mark_special_text,
)

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")
IGNORED = -100  # label of a token that is not trained
PACKING = ("bfd", "bfd_split", "wrapped")
_GROUP_ROWS = 1000  # rows that are tokenised, and packed, together


# -------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, eq=False)
class Rows:
    """A sequence of row dicts; `rows[i]` has its columns under our names."""

    source: str  # file name or hub id, for messages
    records: Sequence[dict]
    columns: tuple[str, ...]  # under our names: the union over rows
    renames: dict[str, str] = field(default_factory=dict)  # our name -> the file's
    lines: Sequence[int] | None = None  # line of each row, where the file has lines
    skipped: int = 0  # malformed rows left out on request

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        record = self.records[i]
        if not self.renames:
            return record
        hidden = {*self.renames, *self.renames.values()}
        kept = {name: value for name, value in record.items() if name not in hidden}
        return kept | {ours: record[name] for ours, name in self.renames.items() if name in record}

    def where(self, i: int) -> str:
        """Names row i (counted from 0) for a message: "data.jsonl:4 (row 3)"."""
        line = f":{self.lines[i]}" if self.lines is not None else ""
        return f"{self.source}{line} (row {i})"


def read_rows(
    source: str, *, split: str = "train", columns: dict[str, str], skip_bad: bool = False
) -> Rows:
    """Read a .jsonl, .json, .csv or .parquet file, or a dataset of the Hugging Face hub by its id.

    columns: our name -> the file's column, e.g. {"prompt": "question"}. split is for the hub.
    skip_bad: leave out and count malformed lines of a .jsonl file instead of stopping.
    Raises UserError naming the file, and the line or byte where it is at fault; also for an empty
    file, an unknown extension, or a column that is not there.
    """
    path = Path(source)
    if path.is_dir():
        raise UserError(f"{source}: is a directory; expected a file ending in {_extensions()}")
    if not path.exists() and not _looks_like_path(source):
        return _renamed(_read_hub(source, split), columns)
    if path.suffix not in EXTENSIONS:
        raise UserError(f"{source}: unknown file type {path.suffix!r}; expected {_extensions()}")
    if not path.exists():
        raise UserError(f"{source}: no such file; check the path")
    if split != "train":
        raise UserError(
            f"{source}: split is {split!r}, but a file has no splits; name its own file"
        )
    readers = {".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    try:
        if path.suffix == ".jsonl":
            rows = _read_jsonl(path, skip_bad)
        else:
            rows = readers[path.suffix](path)
    except OSError as e:
        raise UserError(f"{source}: cannot be read ({e.strerror or e})") from None
    if not len(rows):
        skipped = f" ({rows.skipped} malformed lines were skipped)" if rows.skipped else ""
        raise UserError(f"{source}: holds no rows{skipped}; give a file with at least one")
    return _renamed(rows, columns)


def _extensions() -> str:
    return ", ".join(EXTENSIONS)


def _looks_like_path(source: str) -> bool:
    return Path(source).suffix in EXTENSIONS or source.startswith((".", "/", "~"))


def _renamed(rows: Rows, columns: dict[str, str]) -> Rows:
    for ours, theirs in columns.items():
        if ours not in formats.KNOWN_COLUMNS:
            close = formats.nearest(ours, formats.KNOWN_COLUMNS)
            hint = f"did you mean {close}?" if close else ", ".join(formats.KNOWN_COLUMNS)
            raise UserError(f"--columns {ours}={theirs}: {ours!r} is not a name we read; {hint}")
        if theirs not in rows.columns:
            close = formats.nearest(theirs, rows.columns)
            hint = f"; did you mean {close!r}?" if close else ""
            raise UserError(
                f"{rows.source}: no column {theirs!r} (asked for by --columns {ours}={theirs}); "
                f"found columns {', '.join(rows.columns)}{hint}"
            )
    hidden = {*columns, *columns.values()}
    kept = tuple(name for name in rows.columns if name not in hidden)
    return Rows(
        rows.source, rows.records, (*columns, *kept), dict(columns), rows.lines, rows.skipped
    )


def _read_jsonl(path: Path, skip_bad: bool) -> Rows:
    records, lines, names, skipped = [], [], {}, 0
    with path.open("rb") as file:
        for number, offset, raw in _numbered_lines(file):
            try:
                record = _parse_line(raw, f"{path}:{number}", path, offset)
            except UserError:
                if not skip_bad:
                    raise
                skipped += 1
                continue
            if record is not None:
                records.append(record)
                lines.append(number)
                names.update(dict.fromkeys(record))
    return Rows(str(path), records, tuple(names), {}, lines, skipped)


def _numbered_lines(file: io.BufferedReader) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset of the line, its bytes), without the byte order mark."""
    offset = 0
    for number, raw in enumerate(file, 1):
        mark = 3 if number == 1 and raw.startswith(b"\xef\xbb\xbf") else 0
        yield number, offset + mark, raw[mark:]
        offset += len(raw)


def _parse_line(raw: bytes, where: str, path: Path, offset: int) -> dict | None:
    try:
        text = raw.decode("utf-8").strip()
        if not text:
            return None
        record = json.loads(text)
    except UnicodeDecodeError as e:
        raise UserError(
            f"{where}: {path.name} is not UTF-8 at byte {offset + e.start} "
            f"(0x{raw[e.start]:02x}); convert it to UTF-8"
        ) from None
    except (ValueError, RecursionError) as e:
        raise UserError(
            f"{where}: malformed JSON ({_json_reason(e, text)}); expected one JSON object per line"
        ) from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: the row is {type(record).__name__}; expected a JSON object")
    return record


def _json_reason(error: Exception, text: str) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return "nested too deeply" if isinstance(error, RecursionError) else str(error)
    snippet = text[max(error.pos - 20, 0) : error.pos + 20]
    return f"{error.msg} at column {error.colno}: ...{snippet!r}..."


def _read_json(path: Path) -> Rows:
    text = _read_utf8(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        if getattr(e, "msg", "") == "Extra data":  # JSON lines under the name .json
            return _read_jsonl(path, skip_bad=False)
        line = f":{e.lineno}" if isinstance(e, json.JSONDecodeError) else ""
        raise UserError(
            f"{path}{line}: malformed JSON ({_json_reason(e, text)}); expected a list of objects"
        ) from None
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        if len(lists) != 1:
            raise UserError(
                f"{path}: an object with keys {', '.join(value)}; expected a list of objects, or "
                "an object that holds one such list"
            )
        value = lists[0]
    if not isinstance(value, list):
        raise UserError(f"{path}: is {type(value).__name__}; expected a list of objects")
    names: dict[str, None] = {}
    for i, record in enumerate(value):
        if not isinstance(record, dict):
            raise UserError(
                f"{path} (row {i}): the row is {type(record).__name__}; expected a JSON object"
            )
        names.update(dict.fromkeys(record))
    return Rows(str(path), value, tuple(names))


def _read_utf8(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        # The codec counts from behind a byte order mark.
        start = e.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
        raise UserError(
            f"{path}: not UTF-8 at byte {start} (0x{raw[start]:02x}); convert it to UTF-8"
        ) from None


def _read_csv(path: Path) -> Rows:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(_read_utf8(path), newline=""), strict=True)
    records, lines = [], []
    try:
        header = next((row for row in reader if row), [])
        if len(set(header)) != len(header) or "" in header:
            raise UserError(f"{path}: header is {header}; expected distinct, non-empty names")
        for row in reader:
            if len(row) == len(header):
                records.append(dict(zip(header, row, strict=True)))
                lines.append(reader.line_num)
            elif row:  # a blank line is an empty row
                raise UserError(
                    f"{path}:{reader.line_num}: {len(row)} fields; the header has {len(header)} "
                    f"({', '.join(header)}); quote fields that hold commas"
                )
    except csv.Error as e:
        raise UserError(f"{path}:{reader.line_num}: malformed CSV ({e})") from None
    return Rows(str(path), records, tuple(header), {}, lines)


def _read_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, ValueError) as e:
        raise UserError(
            f"{path}: not a readable parquet file ({' '.join(str(e).split())}); write it again"
        ) from None
    return Rows(str(path), table.to_pylist(), tuple(table.column_names))


def _read_hub(source: str, split: str) -> Rows:
    import datasets  # seconds to import, so only here

    try:
        dataset = datasets.load_dataset(source, split=split)
    except (OSError, ValueError) as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(
            f"{source}: neither a file nor a dataset that can be loaded with split {split!r} "
            f"({reason}); a local file ends in {_extensions()}"
        ) from None
    if not len(dataset):
        raise UserError(f"{source}: split {split!r} holds no rows")
    records = cast(Sequence[dict], dataset)
    return Rows(source, records, tuple(dataset.column_names))


# ----------------------------------------------------------------------------------- tokenising


@dataclass(frozen=True, eq=False)
class TokenizedDataset:
    """Token arrays of all rows, back to back, on the CPU.

    Row i holds documents row_offsets[i]..row_offsets[i+1]; document d holds tokens
    document_offsets[d]..document_offsets[d+1]. Labels are not shifted: the model's output at
    position t is scored against labels[t+1] of the same document.
    """

    input_ids: Tensor  # int32 [total]
    labels: Tensor  # int32 [total]; IGNORED where not trained
    document_offsets: Tensor  # int64 [num_documents + 1]
    row_offsets: Tensor  # int64 [num_rows + 1]
    stats: dict[str, Any]

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def row_documents(self, i: int) -> list[tuple[int, int]]:
        """[(start, stop)] into the token arrays of each document of row i."""
        first, last = self.row_offsets[i : i + 2].tolist()
        offsets = self.document_offsets[first : last + 1].tolist()
        return list(itertools.pairwise(offsets))

    @property
    def max_token_id(self) -> int:
        """The largest id, to compare with the embedding's rows; -1 if there is no token."""
        return int(self.input_ids.max()) if len(self.input_ids) else -1


class _Document(NamedTuple):
    ids: np.ndarray  # int32 [n]
    labels: np.ndarray  # int32 [n]
    lost_prompt_tokens: bool = False  # the prompt alone ends in other tokens
    special_text: bool = False  # a message holds a special token's string


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
    """Token ids and labels of every row, one document per row; as TRL 1.16's SFTTrainer.

    rows: what `read_rows` gives, or a list of dicts named by source in messages. format: one of
    formats.FORMATS; None detects it. Rows are cut to max_length (None: not cut) once labelled, and
    dropped if no trained label is left; with keep_untrained, for `pack`, neither is done here.
    A row with a blank completion is dropped; skip_bad drops rows at fault too. All are counted.
    Raises UserError naming the row, and if no row or no trained token is left.
    """
    rows = rows if isinstance(rows, Rows) else _named_rows(rows, source)
    format = _checked_format(rows, format, text_field)
    if completion_only_loss is None:
        completion_only = not formats.missing_columns("prompt-completion", rows.columns)
    else:
        completion_only = completion_only_loss
    settings = _Settings(format, text_field, completion_only, assistant_only_loss, skip_bad)
    _check_settings(settings, tokenizer, rows)
    counts = _Counts(Counter({"malformed": rows.skipped}), Counter())
    documents: list[_Document] = []
    for begin in range(0, len(rows), _GROUP_ROWS):
        examples = _read_examples(rows, begin, settings, counts)
        found = _tokenize_group(rows, examples, tokenizer, settings, counts)
        counts.seen["longest"] = max([counts.seen["longest"], *(len(d.ids) for d in found)])
        if not keep_untrained:
            found = _cut_and_drop(found, max_length, counts)
        documents += found
    stats = _stats(rows, settings, documents, counts, tokenizer.bos_token_id)
    if completion_only_loss and format in ("text", "messages"):
        stats["warnings"].append(
            f"completion_only_loss has no effect on format {format!r}: every token is trained; "
            "use prompt and completion columns, or assistant_only_loss"
        )
    dataset = _dataset(
        _joined([document.ids for document in documents]),
        _joined([document.labels for document in documents]),
        np.cumsum([0, *(len(document.ids) for document in documents)]),
        np.arange(len(documents) + 1),
        stats,
    )
    if not dataset.stats["num_trained_tokens"]:
        cut = max_length is not None and stats["longest"] > max_length
        remedy = "raise --max-length" if cut else "give rows with something to learn"
        raise UserError(
            f"{rows.source}: nothing is left to train: {stats['rows_read']} rows read, "
            f"{len(documents)} kept, dropped {stats['dropped']}; the longest row has "
            f"{stats['longest']} tokens, --max-length is {max_length}; {remedy}"
        )
    return dataset


class _Settings(NamedTuple):
    format: str
    text_field: str
    completion_only_loss: bool
    assistant_only_loss: bool
    skip_bad: bool


class _Counts(NamedTuple):
    dropped: Counter[str]  # by reason
    seen: Counter[str]


def _named_rows(records: Sequence[dict], source: str) -> Rows:
    return Rows(source, records, tuple(dict.fromkeys(name for r in records for name in r)))


def _cut_and_drop(
    documents: list[_Document], max_length: int | None, counts: _Counts
) -> list[_Document]:
    kept = []
    for document in documents:
        too_long = max_length is not None and len(document.ids) > max_length
        cut = document._replace(ids=document.ids[:max_length], labels=document.labels[:max_length])
        if (cut.labels != IGNORED).any():
            kept.append(cut)
            counts.seen["truncated"] += too_long
        else:
            reason = "nothing to train within max_length" if too_long else "nothing to train"
            counts.dropped[reason] += 1
    return kept


def _stats(
    rows: Rows, settings: _Settings, documents: list[_Document], counts: _Counts, bos: int | None
) -> dict[str, Any]:
    kept = len(documents)
    twice = sum(len(d.ids) > 1 and d.ids[0] == bos == d.ids[1] for d in documents)
    lost = sum(d.lost_prompt_tokens for d in documents)
    literal = sum(d.special_text for d in documents)
    return {
        "format": settings.format,
        "rows_read": len(rows) + rows.skipped,
        "rows_kept": kept,
        "dropped": {reason: n for reason, n in counts.dropped.items() if n},
        "truncated": counts.seen["truncated"],
        "longest": counts.seen["longest"],  # before it is cut
        "duplicates": kept - len({d.ids.tobytes() for d in documents}),
        "packing_efficiency": None,
        "warnings": _warnings(kept, lost=lost, twice=twice, literal=literal),
    }


def _warnings(kept: int, *, lost: int, twice: int, literal: int) -> list[str]:
    warnings = []
    if lost:
        warnings.append(
            f"in {lost} of {kept} rows the prompt's last tokens change when the completion "
            "follows, and count as completion; end the prompt at a token boundary, for instance "
            "with the blank at the start of the completion"
        )
    if twice:
        warnings.append(
            f"{twice} of {kept} rows start with two BOS tokens; the tokenizer adds one, so leave "
            "it out of the text"
        )
    if literal:
        warnings.append(
            f"{literal} of {kept} chats hold special-token strings in their messages; they are "
            "encoded as plain text"
        )
    return warnings


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)


def _checked_format(rows: Rows, format: str | None, text_field: str) -> str:
    if format is None:
        return formats.detect_format(rows.columns, text_field=text_field, source=rows.source)
    if missing := formats.missing_columns(format, rows.columns, text_field=text_field):
        close = formats.nearest(missing[0], rows.columns)
        hint = f"; did you mean {close!r}?" if close else ""
        raise UserError(
            f"{rows.source}: format {format} needs column {', '.join(missing)}; found columns "
            f"{', '.join(rows.columns)}{hint} Use --columns or --dataset-text-field"
        )
    return format


def _check_settings(settings: _Settings, tokenizer: Tokenizer, rows: Rows) -> None:
    if settings.format != "input_ids" and tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos_token; set it in tokenizer_config.json")
    if settings.assistant_only_loss and settings.format == "text":
        raise UserError(
            f"{rows.source}: assistant_only_loss needs chat rows, but the format is 'text'; "
            "leave it out, or give a 'messages' column"
        )


def _read_examples(rows: Rows, begin: int, settings: _Settings, counts: _Counts) -> dict[int, Any]:
    """Row number -> Example, or _Document for rows that hold token ids."""
    readers = {
        "text": lambda r: formats.read_text(r, text_field=settings.text_field),
        "prompt-completion": formats.read_prompt_completion,
        "messages": formats.read_messages,
        "input_ids": lambda r: _read_ids(r, settings.completion_only_loss),
    }
    read = readers[settings.format]
    examples = {}
    for i in range(begin, min(begin + _GROUP_ROWS, len(rows))):
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
    """A row that is tokenised already: labels if it has them, else ids under its masks."""
    ids = _int_array(record, "input_ids", None)
    if record.get("labels") is not None:
        return _Document(ids, _int_array(record, "labels", len(ids)))
    labels = ids.copy()
    masks = ["completion_mask"] if completion_only_loss else []
    for name in [*masks, "assistant_masks"]:
        if record.get(name) is not None:
            labels[_int_array(record, name, len(ids)) == 0] = IGNORED
    return _Document(ids, labels)


def _int_array(record: dict, name: str, length: int | None) -> np.ndarray:
    value = record.get(name)
    array = np.asarray(value if value != [] else np.zeros(0, dtype=np.int64))
    if not isinstance(value, list) or array.ndim != 1 or array.dtype.kind not in "iub":
        raise UserError(f"{name} is {type(value).__name__}; expected a list of integers")
    if length is not None and len(array) != length:
        raise UserError(f"{name} has {len(array)} entries; expected {length}, as input_ids")
    lowest = IGNORED if name == "labels" else 0
    if len(array) and not (lowest <= array.min() and array.max() < 2**31):
        raise UserError(f"{name} holds {array.min()}..{array.max()}; expected {lowest}..2^31-1")
    return array.astype(np.int32)


def _tokenize_group(
    rows: Rows,
    examples: dict[int, Any],
    tokenizer: Tokenizer,
    settings: _Settings,
    counts: _Counts,
) -> list[_Document]:
    """Documents of one group, in row order. Prompts and whole texts go through one batch each."""
    if settings.format == "input_ids":
        return list(examples.values())
    prepared: dict[int, _Prepared] = {}
    for i, example in examples.items():
        try:
            prepared[i] = _prepare(example, tokenizer, settings)
        except UserError as e:
            if not settings.skip_bad:
                raise UserError(f"{rows.where(i)}: {e}") from None
            counts.dropped["malformed"] += 1
    wholes = _encode_all(tokenizer, [p.whole for p in prepared.values()])
    prompts = iter(
        _encode_all(tokenizer, [p.prompt for p in prepared.values() if p.prompt is not None])
    )
    documents = []
    for p, whole in zip(prepared.values(), wholes, strict=True):
        prompt = next(prompts) if p.prompt is not None else None
        documents.append(_label(whole, prompt, p, settings.completion_only_loss))
    return documents


class _Text(NamedTuple):
    """A string to encode; a chat carries its own special tokens, a text gets the tokenizer's."""

    text: str
    is_chat: bool


class _Prepared(NamedTuple):
    whole: _Text
    prompt: _Text | None
    mask: list[int] | None  # 1 on the assistant's tokens, where asked for


def _prepare(example: Example, tokenizer: Tokenizer, settings: _Settings) -> _Prepared:
    """The strings of a row: EOS appended to text, chats rendered."""
    if isinstance(example.completion, str):
        if settings.assistant_only_loss:
            raise UserError("assistant_only_loss needs chat rows; this row is text")
        prompt, completion = example.prompt, example.completion
        assert prompt is None or isinstance(prompt, str)
        eos = tokenizer.special_tokens["eos_token"]
        completion += "" if completion.endswith(eos) else eos
        whole = _Text(_encodable((prompt or "") + completion), False)
        return _Prepared(whole, None if prompt is None else _Text(prompt, False), None)
    prompt = example.prompt if isinstance(example.prompt, list) else None
    whole = _render(example, (prompt or []) + example.completion, tokenizer, generate=False)
    mask = _assistant_mask(example, tokenizer) if settings.assistant_only_loss else None
    if prompt is None:
        return _Prepared(_Text(whole, True), None, mask)
    rendered_prompt = _render(example, prompt, tokenizer, generate=True)
    return _Prepared(_Text(whole, True), _Text(rendered_prompt, True), mask)


def _encodable(text: str) -> str:
    """JSON can spell half of a surrogate pair, which no UTF-8 text can hold."""
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


def _assistant_mask(example: Example, tokenizer: Tokenizer) -> list[int]:
    template, arguments = _render_arguments(example, tokenizer)
    del arguments["add_generation_prompt"]
    messages = [*(example.prompt or []), *example.completion]
    marked = mark_special_text(tokenizer, messages)
    text, spans = chat.assistant_spans(template, marked, **arguments)
    _, mask = encode_chat_spans(tokenizer, text, spans)
    if 1 not in mask:
        raise UserError(
            "assistant_only_loss finds no assistant token in this chat; does the chat template "
            "mark every assistant turn with {% generation %}?"
        )
    return mask


def _encode_all(tokenizer: Tokenizer, texts: list[_Text]) -> list[np.ndarray]:
    if texts and texts[0].is_chat:  # a dataset is all chats or all text
        marked = [TEXT_OPEN in t.text for t in texts]
        plain = [t.text for t, m in zip(texts, marked, strict=True) if not m]
        batch = iter(encode_batch(tokenizer, plain, add_special_tokens=False))
        ids = [
            encode_chat(tokenizer, t.text) if m else next(batch)
            for t, m in zip(texts, marked, strict=True)
        ]
    else:
        ids = encode_batch(tokenizer, [t.text for t in texts], add_special_tokens=True)
    return [np.array(row, dtype=np.int32) for row in ids]


def _label(
    whole: np.ndarray, prompt: np.ndarray | None, prepared: _Prepared, completion_only: bool
) -> _Document:
    """Labels of a row: the ids, masked up to where the prompt's tokens end."""
    labels = whole.copy()
    lost = False
    if prompt is not None:
        shared = min(len(prompt), len(whole))
        differs = np.flatnonzero(prompt[:shared] != whole[:shared])
        prompt_length = int(differs[0]) if len(differs) else shared
        lost = prompt_length < len(prompt)
        if completion_only:
            labels[:prompt_length] = IGNORED
    if prepared.mask is not None:
        labels[np.array(prepared.mask, dtype=np.int32) == 0] = IGNORED
    return _Document(whole, labels, lost, TEXT_OPEN in prepared.whole.text)


def _dataset(
    ids: np.ndarray,
    labels: np.ndarray,
    document_offsets: np.ndarray,
    row_offsets: np.ndarray,
    stats: dict[str, Any],
) -> TokenizedDataset:
    # The first token of a document has nothing before it, so it is never a target.
    targets = labels != IGNORED
    starts = document_offsets[:-1]
    num_trained = int(targets.sum()) - int(targets[starts[starts < len(ids)]].sum())
    stats = stats | {"num_tokens": len(ids), "num_trained_tokens": num_trained}
    return TokenizedDataset(
        torch.from_numpy(ids.astype(np.int32, copy=False)),
        torch.from_numpy(labels.astype(np.int32, copy=False)),
        torch.from_numpy(document_offsets.astype(np.int64)),
        torch.from_numpy(row_offsets.astype(np.int64)),
        stats,
    )


def data_hash(dataset: TokenizedDataset) -> str:
    """sha256 over the token arrays and their offsets as hex; equal if and only if the data is."""
    digest = hashlib.sha256()
    for name in ("input_ids", "labels", "document_offsets", "row_offsets"):
        array = getattr(dataset, name).numpy()
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


# -------------------------------------------------------------------------------------- packing


def pack(dataset: TokenizedDataset, *, max_length: int, strategy: str) -> TokenizedDataset:
    """Rows of at most max_length tokens made from many documents; as TRL 1.16's pack_dataset.

    "bfd": best fit decreasing, documents cut to max_length; "bfd_split": the rest of a long
    document becomes documents of its own; "wrapped": everything back to back, cut every max_length
    tokens, one document per row. Each group of 1000 rows is packed by itself. Labels are kept.
    Raises UserError for an unknown strategy or max_length below 1.
    """
    if strategy not in PACKING:
        raise UserError(f"packing strategy is {strategy!r}; expected one of {', '.join(PACKING)}")
    if max_length < 1:
        raise UserError(f"max_length is {max_length}; packing needs at least 1")
    assert len(dataset) == len(dataset.document_offsets) - 1, "pack takes one document per row"
    offsets = dataset.document_offsets.tolist()
    packed: list[list[tuple[int, int]]] = []  # rows of (start, stop)
    for begin in range(0, len(dataset), _GROUP_ROWS):
        group = offsets[begin : begin + _GROUP_ROWS + 1]
        if strategy == "wrapped":
            packed += [[piece] for piece in _cut(group[0], group[-1], max_length)]
            continue
        pieces = [_cut(a, b, max_length) for a, b in itertools.pairwise(group)]
        kept = 1 if strategy == "bfd" else None
        fragments = [piece for document in pieces for piece in document[:kept]]
        bins = _best_fit_decreasing([b - a for a, b in fragments], max_length)
        packed += [[fragments[i] for i in bin] for bin in bins]
    fragments = [piece for row in packed for piece in row]
    ids, labels = dataset.input_ids.numpy(), dataset.labels.numpy()
    lengths = [b - a for a, b in fragments]
    stats = dataset.stats | {
        "rows_packed": len(packed),
        "packing_efficiency": sum(lengths) / max(len(packed) * max_length, 1),
    }
    if strategy == "bfd":
        stats["truncated"] = int((np.diff(offsets) > max_length).sum())
    return _dataset(
        _joined([ids[a:b] for a, b in fragments]),
        _joined([labels[a:b] for a, b in fragments]),
        np.cumsum([0, *lengths]),
        np.cumsum([0, *(len(row) for row in packed)]),
        stats,
    )


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
