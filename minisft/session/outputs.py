"""The output directory of a run: who may write there, and the record of what was run."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from minisft.config.errors import UserError, flag
from minisft.config.train import TrainConfig
from minisft.files.checkpoint import clean_temporaries, list_checkpoints
from minisft.files.disk import check_writable, file_digest

RUN, OUTPUT = "run.json", "train_output.json"


# Files with names that others use too: a directory that holds one and no run is left alone.
_WRITTEN = (
    "README.md", "config.json", "generation_config.json", "metrics.jsonl", "step0.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "additional_chat_templates", "merged",
)  # fmt: skip


_PIECE = 1 << 16  # bytes


class TrainOutput(NamedTuple):
    """What `train` returns: steps done, mean loss over them, and the run's closing numbers."""

    global_step: int
    training_loss: float
    metrics: dict[str, Any]


@contextmanager
def output_directory(config: TrainConfig) -> Iterator[Path]:
    """The output directory, created, writable, locked against a second run, free of leftovers.

    UserError if it holds the base model, somebody else's files, or a run and neither resuming nor
    overwriting was asked for. Nothing of an earlier run is removed here (`start_over`). With
    config.dry_run the same is refused, and nothing created, locked or removed.
    """
    out = Path(config.output_dir)
    if config.dry_run:
        with _refusals(out):
            _check_place(out, config)
            check_writable(out)
            _check_unlocked(out)
        _check_free(out, config)
        yield out
        return
    with _refusals(out):
        _check_place(out, config)
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "a")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with lock:
        clean_temporaries(out)
        _check_free(out, config)
        yield out


@contextmanager
def _refusals(out: Path) -> Iterator[None]:
    try:
        yield
    except BlockingIOError:
        raise UserError(
            f"--output-dir {out}: another run is writing there; wait for it or choose another "
            "directory"
        ) from None
    except OSError as e:
        raise UserError(
            f"--output-dir {out}: not writable ({e.strerror}); choose another directory"
        ) from e


def _check_place(out: Path, config: TrainConfig) -> None:
    """Raises UserError for the base model's directory, OSError for a file."""
    if out.is_dir() and Path(config.model).is_dir() and out.samefile(config.model):
        raise UserError(
            f"--output-dir {out} is the base model's own directory; choose another directory"
        )
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))


def _check_unlocked(out: Path) -> None:
    """Raises BlockingIOError where a run holds the lock."""
    if (out / ".lock").exists():
        with open(out / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _check_free(out: Path, config: TrainConfig) -> None:
    """Refuse a directory with files that are not a run's, or with a run that nobody mentioned."""
    found = products(out)
    resuming = bool(config.resume_from_checkpoint)
    ours = (out / RUN).exists() or (resuming and list_checkpoints(out))
    foreign = found or [out / name for name in _WRITTEN if (out / name).exists()]
    if foreign and not ours:
        raise UserError(
            f"--output-dir {out} holds {foreign[-1].name} but no {RUN}, so it is no run's; choose "
            "another directory"
        )
    if found and not config.overwrite_output_dir and not resuming:
        raise UserError(
            f"--output-dir {out} holds a run already ({found[-1].name}); continue it with "
            "--resume-from-checkpoint auto, start over with --overwrite-output-dir, or take another"
        )


def products(out: Path) -> list[Path]:
    """What a run leaves that another one must not be mixed with; the mark of completion first."""
    names = [OUTPUT, "adapter_model.safetensors", "adapter_config.json"]
    names += ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
    return [p for name in names for p in out.glob(name)] + list_checkpoints(out)


def base_digests(directory: Path) -> dict[str, str]:
    """SHA-256 of the base model's config.json, and one of samples of its weights.

    Of each weight file: its name, its size and 64 pieces of 64 KiB evenly spread, the header first;
    a fraction of a second for any model. Another training of the same shape differs everywhere.
    """
    weights = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        weights.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for i in range(64):
                file.seek(i * size // 64)
                weights.update(file.read(min(_PIECE, size // 64 + 1)))
    config = file_digest(directory / "config.json")
    return {"base_digest": config, "weights_digest": weights.hexdigest()}


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def plain_config(config: TrainConfig) -> dict[str, Any]:
    return {k: plain(v) for k, v in dataclasses.asdict(config).items()}


def as_flags(config: TrainConfig) -> str:
    """The settings that are not the defaults, as one would write them on the command line."""
    words: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        name = flag(field.name)
        if isinstance(value, bool):
            words.append(name if value else f"--no-{name[2:]}")
        else:
            words += [name, *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)
