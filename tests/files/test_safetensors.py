"""Safetensors files: what a header may say, and that a write is whole or not there."""

from __future__ import annotations

import json
import os
import random
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from minisft.config.errors import UserError
from minisft.files import safetensors as safetensors_io
from minisft.files.safetensors import TensorInfo, iter_tensors, read_header, save_file

TENSORS = {
    "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "a": torch.arange(5, dtype=torch.float32),
    "scalar": torch.tensor(7.0),
    "empty": torch.zeros(0, 3),
}


def put(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.safetensors"
    safetensors.torch.save_file(TENSORS, path, metadata={"format": "pt", "k": "v"})
    return path


def test_header_places_every_tensor(good: Path) -> None:
    header, blob = read_header(good), good.read_bytes()
    assert header.metadata == {"format": "pt", "k": "v"}
    assert header.tensors.keys() == TENSORS.keys()
    for name, info in header.tensors.items():
        assert isinstance(info, TensorInfo)
        assert (info.dtype, info.shape) == (TENSORS[name].dtype, tuple(TENSORS[name].shape))
        stored = blob[info.start : info.stop]
        assert stored == bytes(TENSORS[name].reshape(-1).view(torch.uint8).tolist())


def test_tensors_stream_in_the_order_asked_for(good: Path) -> None:
    got = list(iter_tensors(good, ["a", "b"]))
    assert [name for name, _ in got] == ["a", "b"]
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in got)
    assert {name for name, _ in iter_tensors(good)} == TENSORS.keys()


def test_a_name_that_is_not_there_is_refused(good: Path) -> None:
    with pytest.raises(UserError, match=r"good\.safetensors: holds no tensor 'c'"):
        list(iter_tensors(good, ["a", "c"]))


def test_every_truncation_is_refused(good: Path, tmp_path: Path) -> None:
    blob, path = good.read_bytes(), tmp_path / "cut.safetensors"
    for size in range(len(blob)):
        path.write_bytes(blob[:size])
        with pytest.raises(UserError, match=r"cut\.safetensors: .*truncated"):
            read_header(path)


def test_never_laxer_than_the_library(good: Path, tmp_path: Path) -> None:
    blob, path, rng = good.read_bytes(), tmp_path / "flipped.safetensors", random.Random(0)
    header_bytes = 8 + int.from_bytes(blob[:8], "little")
    refused = 0
    for _ in range(400):
        flipped = bytearray(blob)
        flipped[rng.randrange(header_bytes)] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            with safe_open(path, framework="pt"):
                library_takes_it = True
        except SafetensorError:
            library_takes_it = False
        try:
            read_header(path)
            assert library_takes_it, bytes(flipped)
        except UserError:
            refused += 1
    assert refused > 300


ENTRY = json.dumps(entry()).encode()
# The patterns are the library's words (safetensors 0.8), but for the last three cases: it accepts
# those headers.
BAD_HEADERS = {
    "lying length": (b"", "header too large"),
    "no JSON": (b"{nope", "invalid JSON in header"),
    "not UTF-8": (b'{"\xff": 1}', "invalid UTF-8 in header"),
    "a list": ([], "invalid type: sequence"),
    "too deep": (b"[" * 100_000, "invalid type: sequence"),
    "entry a number": ({"a": 3}, "invalid type: integer `3`, expected struct TensorInfo"),
    "entry a list": ({"a": ["dtype", "shape", "data_offsets"]}, "unknown variant `dtype`"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, "missing field `shape`"),
    "unknown dtype": ({"a": entry("F13")}, "unknown variant `F13`"),
    "dtype no string": ({"a": entry(["F32"])}, "invalid type: sequence, expected string"),
    "negative shape": ({"a": entry(shape=[-2])}, "integer `-2`, expected usize"),
    "shape no integer": ({"a": entry(shape=[2.0])}, r"floating point `2\.0`, expected usize"),
    "shape boolean": ({"a": entry(shape=[2, True])}, "boolean `true`, expected usize"),
    "three offsets": ({"a": entry(offsets=[0, 8, 9])}, "invalid length 3, expected 2 elements"),
    "backwards": ({"a": entry(offsets=[8, 0])}, "invalid offset for tensor `a`"),
    "size unlike shape": ({"a": entry(shape=[3])}, "invalid shape, data type, or offset"),
    "huge shape": ({"a": entry(shape=[2**62, 2**62])}, "overflow computing buffer size"),
    "gap": ({"a": entry(), "b": entry(offsets=[12, 20])}, "invalid offset for tensor `b`"),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, "invalid offset for tensor `b`"),
    "past the end": ({"a": entry(), "b": entry(offsets=[8, 16])}, "file not fully covered"),
    "bytes left over": ({}, "file not fully covered"),
    "metadata no map": ({"__metadata__": 3, "a": entry()}, "integer `3`, expected a map"),
    "metadata no strings": ({"__metadata__": {"k": 3}, "a": entry()}, "expected a string"),
    "key twice": (b'{"a": %b, "a": %b}' % (ENTRY, ENTRY), "a key appears twice"),
    "unsupported dtype": (
        {"a": entry("F8_E8M0", shape=[8])},
        "'F8_E8M0'; expected one of F64",
    ),
    "deep unknown field": (
        b'{"a": %b, "x": %b}' % (ENTRY[:-1] + b', "y": ' + b"[" * 9999 + b"]" * 9999 + b"}", ENTRY),
        "recursion",
    ),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_malformed_header_is_refused(case: str, tmp_path: Path) -> None:
    header, message = BAD_HEADERS[case]
    path = put(tmp_path / "bad.safetensors", header, bytes(8))
    if case == "lying length":
        path.write_bytes((2**63).to_bytes(8, "little") + bytes(8))
    with pytest.raises(UserError, match=rf"bad\.safetensors: .*({message})") as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


def test_header_length_is_capped(tmp_path: Path) -> None:
    """At 100 MB, so that a hostile file cannot fill the memory; the file is sparse."""
    path = tmp_path / "long.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little"))
    os.truncate(path, 8 + 100_000_001)
    with pytest.raises(UserError, match="header too large"):
        read_header(path)


@pytest.mark.parametrize("name", ["missing.safetensors", ""])
def test_no_file_and_a_directory_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_header(tmp_path / name)


def test_save_writes_what_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
    assert read_header(path).metadata == {"format": "pt"}
    assert os.listdir(tmp_path) == ["new.safetensors"]


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    metadata = {f"key{i}": str(i) for i in range(8)}
    save_file(TENSORS, tmp_path / "a", metadata)
    save_file(dict(reversed(TENSORS.items())), tmp_path / "b", dict(reversed(metadata.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_dtype_and_layout_is_written(tmp_path: Path) -> None:
    buffer = torch.arange(35)  # an odd number, so that bytes put first would shift the rest
    tensors = {str(dtype): buffer.to(dtype) for dtype in safetensors_io.DTYPES.values()}
    tensors |= {"view": buffer[3:7], "transposed": buffer.view(5, 7).t(), "same": buffer}
    save_file(tensors, tmp_path / "all", {})
    loaded = safetensors.torch.load_file(tmp_path / "all")
    assert loaded.keys() == tensors.keys()
    placed = read_header(tmp_path / "all").tensors
    for name, tensor in tensors.items():
        assert placed[name].start % tensor.dtype.itemsize == 0
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].double(), tensor.double())


def test_saved_files_have_ordinary_permissions(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        save_file(TENSORS, tmp_path / "new.safetensors", {})
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "new.safetensors").stat().st_mode) == 0o640


def test_a_failed_write_leaves_the_old_file(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = good.read_bytes()

    def disk_full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(UserError, match=r"good\.safetensors: cannot be written .*No space left"):
        save_file({"a": torch.ones(3)}, good, {})
    assert good.read_bytes() == old
    assert os.listdir(good.parent) == [good.name]


def test_bytes_are_synced_before_the_rename(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("sync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    save_file({"a": torch.ones(3)}, good, {})
    assert events == ["sync", "rename", "sync"]


def test_a_file_that_the_library_refuses_is_named(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*args: object, **kwargs: object) -> None:
        raise SafetensorError("incomplete metadata")

    monkeypatch.setattr(safetensors_io, "safe_open", refusing)
    with pytest.raises(UserError, match=r"good\.safetensors: .*\(incomplete metadata\)"):
        list(iter_tensors(good))


def test_no_such_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        save_file({"a": torch.ones(3)}, tmp_path / "nowhere" / "x.safetensors", {})
