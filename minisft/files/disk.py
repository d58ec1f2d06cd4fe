"""Write files atomically and durably, and read JSON files with one-line errors."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from minisft.config.errors import UserError

MAX_JSON_BYTES = 100_000_000  # the shard index of the largest models takes a few MB


def load_json(path: Path) -> Any:
    """Read one JSON file. Raises UserError naming the file, and the line of malformed JSON."""
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise UserError(f"{path}: {size} bytes; expected at most {MAX_JSON_BYTES} of JSON")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is this the right directory?") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 at byte {e.start}") from None
    except json.JSONDecodeError as e:
        reason = f"malformed JSON ({e.msg.removesuffix(' at')}); fix it"
        raise UserError(f"{path}:{e.lineno}: {reason}, or copy or download it again") from None
    # Valid JSON can still fail to parse: numbers of more than 4,300 digits, or deep nesting.
    except (ValueError, RecursionError) as e:
        if isinstance(e, UserError):
            raise
        reason = "nested too deeply" if isinstance(e, RecursionError) else e
        raise UserError(f"{path}: malformed JSON ({reason}); copy or download it again") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None


def load_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object. Raises UserError naming the file otherwise."""
    value = load_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def check_writable(directory: Path) -> None:
    """Raise OSError unless a file can be created in `directory` or its closest existing parent."""
    with TemporaryFile(dir=existing(directory)):
        pass


def existing(path: Path) -> Path:
    """Return `path` if it exists, else its closest parent that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def refuse_existing(out: Path) -> None:
    """Raise UserError if `out` exists and is not an empty directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--output-dir {out} exists already; choose a new directory")


@contextmanager
def naming(source: Path) -> Iterator[None]:
    """Prefix the message of a UserError with `source`, the file or directory that it is about."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{source}: {e}") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError, such as a full or read-only disk, into a UserError that names `path`."""
    try:
        yield
    except OSError as e:
        reason = f"{e.strerror or e}; check the path and free space"
        raise UserError(f"{path}: cannot be written ({reason})") from e


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; on success, rename the file written there to `path`.

    A reader finds the old file or the complete new file, even after a crash or a power cut. On
    failure the temporary file is removed and `path` is unchanged. Raises UserError naming `path` if
    it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            yield temporary
            # Sync before the rename: a file system may reorder the two, and after a power cut the
            # final name would be an empty file.
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)  # a rename is durable once its directory is
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary directory next to `out`; rename it to `out` on success.

    On failure the temporary directory is removed. Raises UserError if a file cannot be written, or
    if `out` exists and is not empty, before or after the files are written.
    """
    refuse_existing(out)
    final = Path(os.path.abspath(out))  # `out` may be "." or end in "..": then it has no name
    temporary = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        with writing(out):
            temporary.mkdir(parents=True)
            yield temporary
            refuse_existing(out)
            os.replace(temporary, final)
            sync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically. Raises UserError if it cannot be written."""
    with atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically. Raises UserError if the file cannot be written."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content as hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file or a directory to disk (fsync)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
