"""Token arrays of a dataset, in memory or in memory-mapped files, which may be a cache entry.

A cache entry is a directory named by the hash of everything that affects its arrays. It is renamed
to that name only when it is complete.
"""

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from minisft.batches import IGNORED, TokenizedDataset
from minisft.config.errors import UserError
from minisft.files.disk import file_digest

# Dtypes of the arrays, each stored in a file named like its field of TokenizedDataset.
_TOKENS = {"input_ids": np.dtype("<i4"), "labels": np.dtype("<i4")}
_HASHED = {**_TOKENS, "document_offsets": np.dtype("<i8"), "row_offsets": np.dtype("<i8")}
_ARRAYS = {**_HASHED, "digests": np.dtype("<i8"), "row_targets": np.dtype("<i8")}
_META = "meta.json"

HELD_BYTES = 64 * 2**20  # of tokens and labels in memory, before they go to files


def data_hash(dataset: TokenizedDataset) -> str:
    """Return the SHA-256 (hex) of the token arrays and offsets: equal data has equal hashes."""
    if dataset.hash is not None:
        return dataset.hash
    arrays = {name: np.ascontiguousarray(getattr(dataset, name).numpy()) for name in _HASHED}
    return _combined({name: hashlib.sha256(a.data).hexdigest() for name, a in arrays.items()})


def _combined(sums: dict[str, str]) -> str:
    return hashlib.sha256("".join(f"{n} {sums[n]}\n" for n in _HASHED).encode()).hexdigest()


class TokenWriter:
    """Collects the rows of a dataset in order; `finish` returns them as a TokenizedDataset.

    scratch: a directory. Beyond HELD_BYTES, tokens are written to files there, so memory holds only
    a few integers per row and document; `finish` maps the files and unlinks them. entry: path of a
    new cache entry, where the files remain instead. Without scratch and entry, everything stays in
    memory.
    """

    def __init__(self, scratch: Path | None = None, entry: Path | None = None):
        self._entry = entry
        home = scratch if entry is None else entry.parent
        # The process id avoids name clashes between runs that share a cache or scratch directory.
        name = f".{entry.name if entry else 'rows'}.{os.getpid()}.{id(self)}.tmp"
        self._partial = None if home is None else home / name
        # An array takes 8 bytes per number; a list of Python integers takes 36.
        self._document_offsets, self._row_offsets = array("q", [0]), array("q", [0])
        self._digests, self._row_targets = array("q"), array("q")
        self._blocks: dict[str, list[np.ndarray]] = {name: [] for name in _TOKENS}
        self._held = 0  # bytes in blocks
        self._files: dict[str, IO[bytes]] = {}
        self._sums = {name: hashlib.sha256() for name in _HASHED}
        self.num_tokens = self.num_trained = 0
        self.max_token_id = -1

    @property
    def num_rows(self) -> int:
        """The number of rows added so far."""
        return len(self._row_offsets) - 1

    def add(self, documents: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Add one row, given (ids, labels), both int32, of its documents. May write to disk."""
        before = self.num_trained
        for ids, labels in documents:
            # The first token of a document has no context, so it is never a target.
            self.num_trained += int((labels[1:] != IGNORED).sum())
            self.num_tokens += len(ids)
            self.max_token_id = max(self.max_token_id, int(ids.max(initial=-1)))
            self._document_offsets.append(self.num_tokens)
            for (name, dtype), values in zip(_TOKENS.items(), (ids, labels), strict=True):
                self._blocks[name].append(np.ascontiguousarray(values, dtype=dtype))
                self._held += values.nbytes
        self._row_offsets.append(len(self._document_offsets) - 1)
        self._row_targets.append(self.num_trained - before)
        if self._held > HELD_BYTES and self._partial is not None:
            self._flush(self._partial)

    def _flush(self, partial: Path) -> None:
        with writing_tokens(partial.parent):
            if not self._files:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                self._files = {n: open(partial / n, "wb") for n in self._blocks}  # noqa: SIM115
            for name, blocks in self._blocks.items():
                for values in blocks:
                    self._files[name].write(values.data)
                    self._sums[name].update(values.data)
                blocks.clear()
        self._held = 0

    def seen(self, ids: np.ndarray) -> None:
        """Record the hash of a document, to find duplicates in this dataset and in others."""
        digest = hashlib.blake2b(ids.data, digest_size=8).digest()
        self._digests.append(int.from_bytes(digest, "little", signed=True))

    def num_duplicates(self) -> int:
        """Return how many of the documents passed to `seen` equal an earlier one."""
        return len(self._digests) - len(np.unique(np.frombuffer(self._digests, dtype=np.int64)))

    def finish(self, stats: dict[str, Any]) -> TokenizedDataset:
        """Return the dataset, with `stats` and the numbers of tokens as its statistics."""
        stats = stats | {
            "num_tokens": self.num_tokens,
            "num_trained_tokens": self.num_trained,
            "max_token_id": self.max_token_id,
        }
        small = {
            name: np.array(getattr(self, f"_{name}"), dtype=dtype)
            for name, dtype in _ARRAYS.items()
            if name not in _TOKENS
        }
        if self._entry is None and not self._files:
            arrays = {
                name: np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.int32)
                for name, blocks in self._blocks.items()
            }
            tensors: dict[str, Any] = {n: torch.from_numpy(a) for n, a in (arrays | small).items()}
            return TokenizedDataset(stats=stats, **tensors)
        assert self._partial is not None
        self._flush(self._partial)
        with writing_tokens(self._partial.parent):
            for file in self._files.values():
                file.close()
            for name, values in small.items():
                values.tofile(self._partial / name)
                if name in _HASHED:
                    self._sums[name].update(values.data)
            sums = {name: s.hexdigest() for name, s in self._sums.items()}
            (self._partial / _META).write_text(json.dumps({"stats": stats, "sha256": sums}))
            if self._entry is None:
                dataset = _map(self._partial)
                # The mappings keep the deleted files' data until the process ends or is killed.
                shutil.rmtree(self._partial)
                return replace(dataset, entry=None)
            shutil.rmtree(self._entry, ignore_errors=True)
            os.replace(self._partial, self._entry)
            return _map(self._entry)

    def abandon(self) -> None:
        """Delete the files written so far; called after an error."""
        for file in self._files.values():
            file.close()
        if self._partial is not None:
            shutil.rmtree(self._partial, ignore_errors=True)


@contextmanager
def writing_tokens(directory: Path) -> Iterator[None]:
    """Turn an OSError into a UserError that names the directory and --dataset-cache-dir."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"{directory}: the tokenised rows cannot be written there ({e.strerror or e}); free "
            "some space, or choose another directory with --dataset-cache-dir"
        ) from None


def load_tokens(entry: Path) -> TokenizedDataset | None:
    """Memory-map a cache entry; return None if it is missing, incomplete or damaged."""
    try:
        sums = json.loads((entry / _META).read_text(encoding="utf-8"))["sha256"]
        if any(file_digest(entry / name) != sums[name] for name in _HASHED):
            return None
        return _map(entry)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _map(entry: Path) -> TokenizedDataset:
    meta = json.loads((entry / _META).read_text(encoding="utf-8"))
    tensors: dict[str, Any] = {}
    for name, dtype in _ARRAYS.items():
        empty = not (entry / name).stat().st_size  # mmap refuses empty files
        # A private (copy-on-write) mapping: torch requires writable memory.
        array = np.zeros(0, dtype) if empty else np.memmap(entry / name, dtype, mode="c")
        tensors[name] = torch.from_numpy(array)
    hash = _combined(meta["sha256"])
    return TokenizedDataset(stats=meta["stats"], hash=hash, entry=entry, **tensors)
