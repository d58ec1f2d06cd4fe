"""Safetensors files: a checked header, streamed tensors, and a write that is never half done.

The layout is 8 bytes of header length (little endian), a JSON header, then the tensor bytes.
Files come from elsewhere, so every statement of the header is held against the file before use.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minisft.config.errors import UserError
from minisft.files.disk import replace_synced

MAX_HEADER_BYTES = 100_000_000  # the cap of the safetensors library itself


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorInfo(NamedTuple):
    """One tensor as the header describes it; its bytes are file[start:stop]."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    stop: int


class Header(NamedTuple):
    """A checked safetensors header: tensors in file order, and the free metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """Read and check the header of one safetensors file; no tensor data is read.

    Returns Header(tensors: name -> TensorInfo, metadata). The header is at most 100 MB and inside
    the file, and the tensors tile the rest of the file exactly, each with as many bytes as its
    dtype and shape say.
    Raises UserError naming the file if it is missing, truncated or malformed.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if header_bytes > file_bytes - 8:
                stated = f"; its header says {header_bytes} bytes" if len(prefix) == 8 else ""
                raise _malformed(path, f"truncated, or not safetensors: {file_bytes} bytes{stated}")
            if header_bytes > MAX_HEADER_BYTES:
                raise _malformed(
                    path, f"header of {header_bytes} bytes; at most {MAX_HEADER_BYTES}"
                )
            text = file.read(header_bytes)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    raw = _parse_header(path, text)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _malformed(path, "__metadata__ is not a map of strings")
    infos = {name: _tensor_info(path, name, entry) for name, entry in raw.items()}
    _check_tiling(path, infos, file_bytes - 8 - header_bytes)
    in_order = sorted(infos.items(), key=lambda item: item[1].start)
    offset = 8 + header_bytes
    placed = {n: i._replace(start=i.start + offset, stop=i.stop + offset) for n, i in in_order}
    return Header(placed, metadata)


def iter_tensors(
    path: str | Path, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, CPU tensor) of one file, one tensor at a time, dtypes as stored.

    `names` picks and orders the tensors; None means all, in file order. A tensor may be backed by
    the mapped file: clone it to keep it past a change of the file.
    Raises UserError naming the file (`read_header`), or a name that it does not hold.
    """
    header = read_header(path)
    wanted = list(header.tensors) if names is None else list(names)
    for name in wanted:
        if name not in header.tensors:
            raise UserError(f"{path}: holds no tensor {name!r}; it has {len(header.tensors)}")
    try:
        with safe_open(path, framework="pt") as file:
            for name in wanted:
                yield name, file.get_tensor(name)
    except SafetensorError as e:
        raise _malformed(path, str(e)) from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from None


def save_file(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Write one safetensors file so that `path` holds the old content or all of the new.

    tensors: any device and dtype of DTYPES. The same tensors and metadata give the same bytes. They
    go to a temporary name in the same directory, are synced, then renamed over `path`.
    Raises UserError if the file cannot be written (disk full, no such directory); the old one
    then stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            _write(file, tensors, metadata)
        replace_synced(temporary, path)
    except OSError as e:
        reason = f"{e.strerror or e}; check the path and free space"
        raise UserError(f"{path}: cannot be written ({reason})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _write(file: IO[bytes], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    # Not the library's writer: its metadata are in random order, so that equal content gives
    # different files. Wide dtypes come first, as there, which keeps every tensor aligned.
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
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in order:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        file.write(flat.view(torch.uint8).numpy().data)


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) < len(pairs):
            raise ValueError("a key appears twice")
        return keys

    try:
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise _malformed(path, f"header is not a JSON object ({e})") from None
    if not isinstance(raw, dict):
        raise _malformed(path, f"header is not a JSON object but {type(raw).__name__}")
    return raw


def _tensor_info(path: Path, name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _malformed(path, f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(
            f"{path}: tensor {name!r} has dtype {dtype!r}, which is not read; known: "
            f"{', '.join(DTYPES)}"
        )
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _malformed(path, f"tensor {name!r} has shape {shape!r}, data_offsets {offsets!r}")
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != num_bytes:
        stated = f"{offsets[1] - offsets[0]} bytes for {dtype} {shape}"
        raise _malformed(path, f"tensor {name!r} has {stated}; expected {num_bytes}")
    return TensorInfo(DTYPES[dtype], tuple(shape), offsets[0], offsets[1])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _check_tiling(path: Path, infos: dict[str, TensorInfo], data_bytes: int) -> None:
    end = 0
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            raise _malformed(path, f"tensor {name!r} starts at byte {info.start}, expected {end}")
        end = info.stop
    if end != data_bytes:
        raise _malformed(path, f"truncated or padded: {data_bytes} data bytes, header says {end}")


def _malformed(path: str | Path, what: str) -> UserError:
    return UserError(f"{path}: {what}. The file is damaged: copy or download it again")
