"""Files that appear complete or not at all, and JSON that is read with clear errors."""

from __future__ import annotations

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

MAX_JSON_BYTES = 100_000_000  # of one JSON file: the index of the largest models has a few MB


def load_json(path: Path) -> Any:
    """Read one JSON file; UserError names the file, and the line where it is malformed."""
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise UserError(f"{path}: {size} bytes; expected at most {MAX_JSON_BYTES} of JSON")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is this the right directory?") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 at byte {e.start}") from None
    except json.JSONDecodeError as e:
        raise UserError(
            f"{path}:{e.lineno}: malformed JSON ({e.msg.removesuffix(' at')}); mend it, or copy or "
            "download it again"
        ) from None
    except (ValueError, RecursionError) as e:  # a number of thousands of digits, deep nesting
        if isinstance(e, UserError):
            raise
        reason = "nested too deeply" if isinstance(e, RecursionError) else e
        raise UserError(f"{path}: malformed JSON ({reason}); copy or download it again") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None


def check_writable(directory: Path) -> None:
    """OSError unless a file can be made there, or above where it does not exist yet.

    The file that is made has no name, and nothing of it is left.
    """
    with TemporaryFile(dir=existing(directory)):
        pass


def existing(path: Path) -> Path:
    """The path itself, or the closest one above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def replace_synced(temporary: Path, path: Path) -> None:
    """Rename a finished file over `path`, both the bytes and the rename synced to disk.

    Whoever reads `path`, at any moment, finds the old file or the new one. Raises OSError.
    """
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the OSError of a full or read-only disk into a UserError that names `path`."""
    try:
        yield
    except OSError as e:
        reason = f"{e.strerror or e}; check the path and free space"
        raise UserError(f"{path}: cannot be written ({reason})") from e


def refuse_existing(out: Path) -> None:
    """UserError if there is anything at `out` but an empty directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--output-dir {out} exists already; choose a new directory")


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """A directory beside `out` to write into; it takes that name once all is written.

    However it ends before that, nothing is left of it. UserError where something is at `out`, then
    or by the end, and for what cannot be written.
    """
    refuse_existing(out)
    place = Path(os.path.abspath(out))
    temporary = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        with writing(out):
            temporary.mkdir(parents=True)
            yield temporary
            refuse_existing(out)
            os.replace(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON under a temporary name, sync, rename: the old file or all of the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            with open(temporary, "w", encoding="utf-8") as f:
                json.dump(value, f, indent=2)
                f.write("\n")
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
