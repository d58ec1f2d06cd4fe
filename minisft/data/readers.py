"""Read rows from .jsonl, .json, .csv and .parquet files and datasets of the Hugging Face hub.

.jsonl files, .parquet files and hub datasets are read when a row is accessed, so they may be larger
than memory; .json and .csv files are loaded into memory.
"""

import bisect
import csv
import io
import itertools
import json
import logging
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minisft.config.errors import UserError, closest
from minisft.data import formats
from minisft.files.disk import file_digest

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")
_EXPECTED = ", ".join(EXTENSIONS)
_CHUNK = 1000  # parquet rows that are converted to dicts together


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one source as dicts; `rows[i]` is row i with its columns renamed to our names."""

    source: str  # file name or hub id, for messages
    records: Any  # a sequence: records[i] is the dict of row i, under the file's column names
    columns: tuple[str, ...]  # under our names: the union over rows
    renames: dict[str, str] = field(default_factory=dict)  # our name -> the file's
    lines: array | list[int] | None = None  # line number of each row, where the file has lines
    skipped: int = 0  # malformed lines left out because of skip_bad

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        record = self.records[i]
        if not self.renames:
            return record
        hidden = {*self.renames, *self.renames.values()}
        rest = {name: value for name, value in record.items() if name not in hidden}
        return rest | {ours: record[name] for ours, name in self.renames.items() if name in record}

    def where(self, i: int) -> str:
        """Return the location of row i (from 0) for an error, such as "data.jsonl:4 (row 3)"."""
        line = f":{self.lines[i]}" if self.lines is not None else ""
        return f"{self.source}{line} (row {i})"


def read_rows(
    source: str,
    *,
    split: str = "train",
    columns: dict[str, str],
    columns_optional: bool = False,
    skip_bad: bool = False,
) -> Rows:
    """Read a .jsonl, .json, .csv or .parquet file, or a dataset of the Hugging Face hub by its id.

    columns: our name -> the file's column, e.g. {"prompt": "question"}. columns_optional: ignore
    the rename of a column that the source does not have. split: of a hub dataset. skip_bad: leave
    out and count malformed lines of a .jsonl file instead of stopping. Raises UserError with the
    file and the line or byte of the error; also for an empty file, an unknown extension, or a
    missing column.
    """
    path = Path(source)
    if path.is_dir():
        raise UserError(f"{source}: is a directory; expected a file ending in {_EXPECTED}")
    if not path.exists():
        if path.suffix in EXTENSIONS or source.startswith((".", "/", "~")):
            raise UserError(f"{source}: no such file; check the path")
        return _renamed(_read_hub(source, split), columns, columns_optional)
    if path.suffix not in EXTENSIONS:
        raise UserError(f"{source}: unknown file type {path.suffix!r}; expected {_EXPECTED}")
    if split != "train":
        raise UserError(
            f"{source}: split is {split!r}, but a file has no splits; give the split's own file"
        )
    readers = {".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    with _reading(source):
        read = readers.get(path.suffix)
        rows = read(path) if read else _read_jsonl(path, skip_bad)
    if not len(rows):
        skipped = f" ({rows.skipped} malformed lines were skipped)" if rows.skipped else ""
        raise UserError(f"{source}: holds no rows{skipped}; give a file with at least one")
    return _renamed(rows, columns, columns_optional)


@contextmanager
def _reading(where: str | Path) -> Iterator[None]:
    """Turn an OSError into a UserError that starts with `where`, a file or file:line."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{where}: cannot be read ({e.strerror or e})") from None


def _renamed(rows: Rows, columns: dict[str, str], optional: bool) -> Rows:
    if optional:
        columns = {ours: theirs for ours, theirs in columns.items() if theirs in rows.columns}
    for ours, theirs in columns.items():
        if ours not in formats.KNOWN_COLUMNS:
            close = closest(ours.lower(), formats.KNOWN_COLUMNS)
            hint = f"did you mean {close}?" if close else ", ".join(formats.KNOWN_COLUMNS)
            raise UserError(f"--columns {ours}={theirs}: {ours!r} is not a name we read; {hint}")
        if theirs not in rows.columns:
            close = closest(theirs.lower(), rows.columns)
            hint = f"; did you mean {close!r}?" if close else ""
            raise UserError(
                f"{rows.source}: no column {theirs!r} (asked for by --columns {ours}={theirs}); "
                f"found columns {', '.join(rows.columns)}{hint}"
            )
    hidden = {*columns, *columns.values()}
    rest = tuple(name for name in rows.columns if name not in hidden)
    return replace(rows, columns=(*columns, *rest), renames=dict(columns))


class _Lines:
    """The objects of a .jsonl file, parsed on access; only their byte offsets are in memory.

    The datasets library is not used because its errors do not name the line of a malformed row.
    """

    def __init__(self, path: Path):
        self.path = path
        self.offsets, self.numbers = array("q"), array("q")  # byte offset, line number from 1
        self._file: io.BufferedReader | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: int) -> dict:
        where = f"{self.path}:{self.numbers[i]}"
        with _reading(where):
            self._file = self._file or self.path.open("rb")
            self._file.seek(self.offsets[i])
            record = _parse_line(self._file.readline(), where, self.offsets[i])
        if record is None:
            raise UserError(f"{where}: the line is gone; the file was changed while it was read")
        return record

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}  # a worker process opens the file itself


def _read_jsonl(path: Path, skip_bad: bool) -> Rows:
    records, names, offset, skipped = _Lines(path), {}, 0, 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                record = _parse_line(raw, f"{path}:{number}", offset)
            except UserError:
                if not skip_bad:
                    raise
                record, skipped = None, skipped + 1
            if record is not None:
                records.offsets.append(offset)
                records.numbers.append(number)
                names.update(dict.fromkeys(record))
            offset += len(raw)
    return Rows(str(path), records, tuple(names), {}, records.numbers, skipped)


def _parse_line(raw: bytes, where: str, offset: int) -> dict | None:
    """Parse one line of JSON; return None if it is blank. offset: byte where the line starts."""
    if not (text := _decode(raw, where, offset).strip()):
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(
            f"{where}: malformed JSON ({_json_reason(e, text)}); expected one JSON object per line"
        ) from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: the row is {type(record).__name__}; expected a JSON object")
    return record


def _decode(raw: bytes, where: str | Path, offset: int = 0) -> str:
    """Decode UTF-8 bytes read at byte `offset` of a file; drop a byte order mark at offset 0."""
    mark = 3 if offset == 0 and raw.startswith(b"\xef\xbb\xbf") else 0
    try:
        return raw[mark:].decode("utf-8")
    except UnicodeDecodeError as e:
        at = mark + e.start
        raise UserError(
            f"{where}: not UTF-8 at byte {offset + at} (0x{raw[at]:02x}); convert it to UTF-8"
        ) from None


def _json_reason(error: Exception, text: str) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return "nested too deeply" if isinstance(error, RecursionError) else str(error)
    snippet = text[max(error.pos - 20, 0) : error.pos + 20]
    return f"{error.msg.removesuffix(' at')} at column {error.colno}: ...{snippet!r}..."


def _read_json(path: Path) -> Rows:
    text = _decode(path.read_bytes(), path)
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


def _read_csv(path: Path) -> Rows:
    csv.field_size_limit(sys.maxsize)
    text = _decode(path.read_bytes(), path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    records, lines = [], []
    try:
        header = _checked_header(next((row for row in reader if row), []), path)
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


def _checked_header(header: list[str], path: Path) -> list[str]:
    for separator in (";", "\t", "|"):
        if len(header) == 1 and separator in header[0]:
            raise UserError(
                f"{path}: the header is one field, {header[0]!r}; is the file separated by "
                f"{separator!r}? Save it with commas ({header[0].replace(separator, ',')})"
            )
    # pandas writes its index under an empty name, and reads that column back as "Unnamed: 0".
    if len(header) > 1 and not header[0]:
        header[0] = "Unnamed: 0"
    if len(set(header)) != len(header) or "" in header:
        raise UserError(f"{path}: header is {header}; expected distinct, non-empty names")
    return header


class _ParquetRows:
    """Rows of a parquet file; one row group (as an Arrow table) is in memory at a time."""

    def __init__(self, path: Path):
        import pyarrow.parquet

        self.path = path
        self._file: Any = pyarrow.parquet.ParquetFile(path)
        meta = self._file.metadata
        sizes = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
        self.starts = list(itertools.accumulate(sizes, initial=0))  # of each row group, and the end
        self.names = tuple(self._file.schema_arrow.names)
        self._group: tuple[int, Any] = (-1, None)  # (its number, its table)
        self._chunk: tuple[int, list[dict]] = (-1, [])  # (number of its first row, its rows)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(i)
        first, rows = self._chunk
        if not first <= i < first + len(rows):
            group = bisect.bisect_right(self.starts, i) - 1
            if self._group[0] != group:
                self._group = (group, self._read(group))
            first = i - (i - self.starts[group]) % _CHUNK
            rows = self._group[1].slice(first - self.starts[group], _CHUNK).to_pylist()
            self._chunk = (first, rows)
        return rows[i - first]

    def _read(self, group: int) -> Any:
        import pyarrow.parquet

        with _parquet(self.path, OSError):  # such as an unexpected end of the file
            self._file = self._file or pyarrow.parquet.ParquetFile(self.path)
            return self._file.read_row_group(group)

    def __getstate__(self) -> dict[str, Any]:  # a worker process opens the file itself
        return self.__dict__ | {"_file": None, "_group": (-1, None), "_chunk": (-1, [])}


@contextmanager
def _parquet(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turn `errors`, and errors of pyarrow, into a UserError that names the file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, ValueError, *errors) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"{path}: not a readable parquet file ({reason}); write it again") from None


def _read_parquet(path: Path) -> Rows:
    with _parquet(path):
        records = _ParquetRows(path)
    return Rows(str(path), records, records.names)


def _read_hub(source: str, split: str) -> Rows:
    import datasets  # seconds to import, so only here

    # Without a network, the hub client logs a page of retries before our one-line error.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        dataset: Any = datasets.load_dataset(source, split=split)
    except (OSError, ValueError) as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(
            f"{source}: neither a file nor a dataset that can be loaded with split {split!r} "
            f"({reason}); a local file ends in {_EXPECTED}"
        ) from None
    if not len(dataset):
        raise UserError(f"{source}: split {split!r} holds no rows")
    return Rows(source, dataset, tuple(dataset.column_names))


def source_digest(source: str, split: str = "train") -> str:
    """Return the SHA-256 of a file's bytes as hex, or the fingerprint of a hub dataset's split."""
    if not Path(source).is_file():
        return str(_read_hub(source, split).records._fingerprint)
    with _reading(source):
        return file_digest(Path(source))
