"""Atomic writes: complete or absent, durable, and refused with one line; JSON objects."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from minisft.config.errors import UserError
from minisft.files.disk import (
    atomic_directory,
    atomically,
    load_json_object,
    naming,
    write_json,
    write_text,
)


def test_a_text_file_is_written_and_replaced(tmp_path: Path) -> None:
    for text in ("# Card", "é\n"):
        write_text(tmp_path / "README.md", text)
        assert (tmp_path / "README.md").read_bytes() == text.encode("utf-8")
    assert os.listdir(tmp_path) == ["README.md"]


def test_json_is_synced_then_renamed_then_its_directory_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[object] = []
    fsync, replace = os.fsync, os.replace

    def noting(fd: int) -> None:
        events.append(os.path.isdir(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    write_json(tmp_path / "x.json", {"a": [1]})
    assert (tmp_path / "x.json").read_text() == '{\n  "a": [\n    1\n  ]\n}\n'
    assert events == [False, "rename", True]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_half_way_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught, atomically(path) as temporary:
        temporary.write_text("half")
        raise error
    if expected is UserError:
        reason = "No space left on device; check the path and free space"
        assert str(caught.value) == f"{path}: cannot be written ({reason})"
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]


def test_a_directory_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with pytest.raises(RuntimeError), atomic_directory(out) as partial:
        (partial / "file").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path / "a") == []
    with atomic_directory(out) as partial:
        (partial / "file").write_text("whole")
        assert not out.exists()
    assert (out / "file").read_text() == "whole" and os.listdir(tmp_path / "a") == ["out"]
    with pytest.raises(UserError, match="exists already"), atomic_directory(out):
        pass


@pytest.mark.parametrize(("text", "found"), [("[1]", "list"), ("3", "int"), ("null", "NoneType")])
def test_json_that_is_not_an_object_is_refused(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_json_object(path)
    assert str(caught.value) == f"{path}: expected a JSON object, found {found}"


def test_an_error_gets_the_name_of_its_file() -> None:
    with pytest.raises(UserError, match=r"^a/b: r is 0$"), naming(Path("a/b")):
        raise UserError("r is 0")
