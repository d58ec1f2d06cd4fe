"""Token arrays of a dataset: in memory, or in files that are mapped and kept from run to run.

A cache entry is a directory named by the hash of everything that shapes its arrays. It appears
under that name only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from minisft.batches import TokenizedDataset
from minisft.config.errors import UserError
from minisft.files.disk import check_writable

IGNORED = -100  # label of a token that is not trained


_ARRAYS = {  # in the order of TokenizedDataset's fields
    "input_ids": np.dtype("<i4"),
    "labels": np.dtype("<i4"),
    "document_offsets": np.dtype("<i8"),
    "row_offsets": np.dtype("<i8"),
}


_DIGESTS, _TARGETS = "digests", "row_targets"


_META = "meta.json"


HELD_BYTES = 64 * 2**20  # of tokens and labels in memory, before they go to files


def data_hash(dataset: TokenizedDataset) -> str:
    """sha256 over the token arrays and their offsets as hex; equal if and only if the data is."""
    if dataset.hash is not None:
        return dataset.hash
    digests = {}
    for name in _ARRAYS:
        values = getattr(dataset, name).numpy()
        digests[name] = hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
    return _combined(digests)


def _combined(digests: dict[str, str]) -> str:
    return hashlib.sha256("".join(f"{n} {digests[n]}\n" for n in _ARRAYS).encode()).hexdigest()


class TokenWriter:
    """Takes rows of documents in order; `finish` gives the TokenizedDataset.

    scratch: a directory. Beyond HELD_BYTES tokens go to files there as they come and are mapped
    afterwards, so that only 8 bytes a row and a document stay in memory; the files have no name by
    then. entry: a path that does not exist yet, where the files are kept instead.
    """

    def __init__(self, scratch: Path | None = None, entry: Path | None = None):
        self._entry = entry
        self._partial: Path | None = None
        if entry is not None:
            self._partial = entry.with_name(f".{entry.name}.{os.getpid()}.tmp")
        elif scratch is not None:
            self._partial = scratch / f".rows.{os.getpid()}.{id(self)}.tmp"
        self._document_offsets, self._row_offsets = array("q", [0]), array("q", [0])
        self._digests, self._row_targets = array("q"), array("q")
        self._blocks: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": []}
        self._held = 0  # bytes in blocks
        self._files: dict[str, IO[bytes]] = {}
        self._sums = {name: hashlib.sha256() for name in _ARRAYS}
        self.num_tokens = self.num_trained = 0
        self.max_token_id = -1

    @property
    def num_rows(self) -> int:
        return len(self._row_offsets) - 1

    def add(self, documents: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """One row: (ids, labels) of its documents, int32 both."""
        before = self.num_trained
        for ids, labels in documents:
            trained = labels != IGNORED
            # The first token of a document has nothing before it, so it is never a target.
            self.num_trained += int(trained[1:].sum())
            self.num_tokens += len(ids)
            if len(ids):
                self.max_token_id = max(self.max_token_id, int(ids.max()))
            self._document_offsets.append(self.num_tokens)
            for name, values in (("input_ids", ids), ("labels", labels)):
                self._blocks[name].append(np.ascontiguousarray(values, dtype=_ARRAYS[name]))
                self._held += values.nbytes
        self._row_offsets.append(len(self._document_offsets) - 1)
        self._row_targets.append(self.num_trained - before)
        if self._held > HELD_BYTES and self._partial is not None:
            self._flush(self._partial)

    def _flush(self, partial: Path) -> None:
        with _writing(partial):
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
        """Count a document that was read: its hash tells duplicates, in this dataset and others."""
        digest = hashlib.blake2b(ids.data, digest_size=8).digest()
        self._digests.append(int.from_bytes(digest, "little", signed=True))

    def num_duplicates(self) -> int:
        """How many of the documents seen equal an earlier one."""
        return len(self._digests) - len(np.unique(np.frombuffer(self._digests, dtype=np.int64)))

    def finish(self, stats: dict[str, Any]) -> TokenizedDataset:
        """The dataset; `stats` is kept with it."""
        stats = stats | {
            "num_tokens": self.num_tokens,
            "num_trained_tokens": self.num_trained,
            "max_token_id": self.max_token_id,
        }
        offsets = {
            "document_offsets": np.array(self._document_offsets, dtype=_ARRAYS["document_offsets"]),
            "row_offsets": np.array(self._row_offsets, dtype=_ARRAYS["row_offsets"]),
        }
        digests = np.array(self._digests, dtype=np.int64)
        row_targets = np.array(self._row_targets, dtype=np.int64)
        if self._entry is None and not self._files:
            joined = {
                name: np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.int32)
                for name, blocks in self._blocks.items()
            }
            tensors = {n: torch.from_numpy(values) for n, values in (joined | offsets).items()}
            return _dataset(tensors, stats, digests, row_targets)
        assert self._partial is not None
        self._flush(self._partial)
        with _writing(self._partial):
            for file in self._files.values():
                file.close()
            for name, values in offsets.items():
                self._sums[name].update(values.data)
                values.tofile(self._partial / name)
            digests.tofile(self._partial / _DIGESTS)
            row_targets.tofile(self._partial / _TARGETS)
            sums = {name: s.hexdigest() for name, s in self._sums.items()}
            (self._partial / _META).write_text(json.dumps({"stats": stats, "sha256": sums}))
            if self._entry is None:
                dataset = _map(self._partial)
                shutil.rmtree(self._partial)  # the mapping holds on to the files
                return replace(dataset, entry=None)
            shutil.rmtree(self._entry, ignore_errors=True)
            os.replace(self._partial, self._entry)
            return _map(self._entry)

    def abandon(self) -> None:
        """Remove what was written; for rows that turned out to be at fault."""
        for file in self._files.values():
            file.close()
        if self._partial is not None:
            shutil.rmtree(self._partial, ignore_errors=True)


def check_cache(directory: Path) -> None:
    """UserError where --dataset-cache-dir cannot be written: before rows are tokenised for it."""
    with _writing(directory / "rows"):
        check_writable(directory)


class _writing:
    """Turns an OSError into one line that names the cache."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, OSError):
            raise UserError(
                f"{self.path.parent}: the tokenised rows cannot be written there "
                f"({error.strerror or error}); make room, or name another place with "
                "--dataset-cache-dir"
            ) from None


def load_tokens(entry: Path) -> TokenizedDataset | None:
    """A complete and undamaged cache entry, its tokens mapped; None if there is none."""
    try:
        sums = json.loads((entry / _META).read_text(encoding="utf-8"))["sha256"]
        for name in _ARRAYS:
            digest = hashlib.sha256()
            with open(entry / name, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            if digest.hexdigest() != sums[name]:
                return None
        return _map(entry)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _map(entry: Path) -> TokenizedDataset:
    meta = json.loads((entry / _META).read_text(encoding="utf-8"))
    tensors = {name: _mapped(entry / name, dtype) for name, dtype in _ARRAYS.items()}
    digests, row_targets = (np.fromfile(entry / n, dtype=np.int64) for n in (_DIGESTS, _TARGETS))
    return replace(
        _dataset(tensors, meta["stats"], digests, row_targets),
        hash=_combined(meta["sha256"]),
        entry=entry,
    )


def _dataset(
    tensors: dict[str, Tensor], stats: dict[str, Any], digests: np.ndarray, row_targets: np.ndarray
) -> TokenizedDataset:
    return TokenizedDataset(
        tensors["input_ids"],
        tensors["labels"],
        tensors["document_offsets"],
        tensors["row_offsets"],
        stats,
        torch.from_numpy(digests),
        torch.from_numpy(row_targets),
    )


def _mapped(path: Path, dtype: np.dtype) -> Tensor:
    if not path.stat().st_size:
        return torch.from_numpy(np.zeros(0, dtype=dtype))
    with open(path, "rb") as file:
        # A private mapping: torch wants memory that it may write, and the file never changes.
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.from_numpy(np.frombuffer(content, dtype=dtype))
