"""Read safetensors files with checked headers, and write them atomically and deterministically.

File layout: 8 bytes of header length (little endian), a JSON header, then the tensor bytes. The
safetensors library checks the header against the file; this module also refuses duplicate keys.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minisft.config.errors import UserError
from minisft.files.disk import atomically

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class TensorInfo(NamedTuple):
    """The entry of one tensor in a header; its bytes are file[start:stop]."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    stop: int


class Header(NamedTuple):
    """A checked safetensors header: tensors in file order, and the free-form metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """Read and check the header of one safetensors file; no tensor data is read.

    Returns Header(tensors: name -> TensorInfo, metadata).
    Raises UserError naming the file if it is missing, truncated or malformed: the tensors must tile
    the file exactly, each with as many bytes as its dtype and shape imply.
    """
    # open() first: for a directory, the library's message would be "no such device". Then let the
    # library validate the header, because the code after this relies on a valid one.
    with _refusing(path), open(path, "rb") as file, safe_open(path, framework="pt"):
        header_bytes = int.from_bytes(file.read(8), "little")
        text = file.read(header_bytes)
    try:
        raw = json.loads(text, object_pairs_hook=_unique)
    # RecursionError can occur because the library accepts unknown fields nested to any depth.
    except (ValueError, RecursionError) as e:
        raise _invalid(path, e) from None
    metadata = raw.pop("__metadata__", None) or {}
    tensors = {}
    for name, entry in sorted(raw.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        if dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise UserError(f"{path}: tensor {name!r} has dtype {dtype!r}; expected one of {known}")
        start, stop = (8 + header_bytes + offset for offset in entry["data_offsets"])
        tensors[name] = TensorInfo(DTYPES[dtype], shape, start, stop)
    return Header(tensors, metadata)


def iter_tensors(
    path: str | Path, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, CPU tensor) of one file, one tensor at a time, in the dtypes stored there.

    `names` selects and orders the tensors; None means all, in file order. A tensor may be a view of
    the memory-mapped file: clone it if the file may change later.
    Raises UserError if the file is invalid (see `read_header`) or lacks one of `names`.
    """
    header = read_header(path)
    wanted = list(header.tensors) if names is None else list(names)
    for name in wanted:
        if name not in header.tensors:
            raise UserError(f"{path}: holds no tensor {name!r}; it has {len(header.tensors)}")
    with _refusing(path), safe_open(path, framework="pt") as file:
        for name in wanted:
            yield name, file.get_tensor(name)


def save_file(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Write one safetensors file atomically (`disk.atomically`).

    tensors: on any device, of any dtype in DTYPES. Equal tensors and metadata give equal bytes.
    Raises UserError if the file cannot be written (disk full, no such directory).
    """
    # The library's writer is not used: it orders metadata at random, so equal content would give
    # different digests. As in the library, wide dtypes come first so that every tensor is aligned.
    names = {dtype: name for name, dtype in DTYPES.items()}
    order = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, tensor in order:
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        dtype, shape = names[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with atomically(Path(path)) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in order:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Given two tensors with one name, the library would silently discard the first.
    keys = dict(pairs)
    if len(keys) < len(pairs):
        raise ValueError("a key appears twice")
    return keys


@contextmanager
def _refusing(path: str | Path) -> Iterator[None]:
    """Turn an error of the library or the file system into a UserError that names the file."""
    try:
        yield
    except SafetensorError as e:
        raise _invalid(path, str(e).removeprefix("Error while deserializing header: ")) from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from None


def _invalid(path: str | Path, reason: object) -> UserError:
    return UserError(f"{path}: truncated, or not safetensors ({reason}); copy or download it again")
