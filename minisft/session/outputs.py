"""The output directory of a run: checks and lock; digests and settings that are stored there."""

import dataclasses
import errno
import fcntl
import hashlib
import shlex
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from minisft.config.errors import UserError, flag
from minisft.config.train import TrainConfig
from minisft.files.checkpoint import clean_temporaries, list_checkpoints
from minisft.files.disk import check_writable, file_digest

Metrics = dict[str, Any]
RUN, OUTPUT = "run.json", "train_output.json"
# Names of files that other programs write too. An output directory that holds one of them but no
# run.json is refused, so that a run never overwrites the files of another program.
_WRITTEN = (
    "README.md", "config.json", "generation_config.json", "metrics.jsonl", "step0.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "additional_chat_templates", "merged",
)  # fmt: skip


class TrainOutput(NamedTuple):
    """Result of `train`: number of optimizer steps, mean loss over them, and final metrics."""

    global_step: int
    training_loss: float
    metrics: Metrics


@contextmanager
def output_directory(config: TrainConfig) -> Iterator[Path]:
    """Create, check and lock the output directory, remove temporary files, and yield its path.

    Raises UserError if that is the base model's directory, is not writable, is locked by a run, or
    holds foreign files, or holds a run and neither resuming nor overwriting was requested. Files of
    that run are not deleted here (see `start_over`). With config.dry_run the same checks run, but
    nothing is created, locked or removed.
    """
    out = Path(config.output_dir)
    try:
        lock = _locked(out, config)
    except BlockingIOError:
        raise UserError(
            f"--output-dir {out}: another run is writing there; "
            "wait for it or choose another directory"
        ) from None
    except OSError as e:
        raise UserError(
            f"--output-dir {out}: not writable ({e.strerror}); choose another directory"
        ) from e
    with lock:
        if not config.dry_run:
            clean_temporaries(out)
        _check_free(out, config)
        yield out


def _locked(out: Path, config: TrainConfig) -> AbstractContextManager:
    """Lock `out`; returns a context that releases the lock. A dry run tests, but does not lock."""
    if out.is_dir() and Path(config.model).is_dir() and out.samefile(config.model):
        raise UserError(
            f"--output-dir {out} is the base model's own directory; choose another directory"
        )
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory")
    if config.dry_run:
        check_writable(out)
        if (out / ".lock").exists():
            with open(out / ".lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return nullcontext()
    out.mkdir(parents=True, exist_ok=True)
    # The kernel drops the lock when the process dies, so a kill leaves no stale lock. The file
    # stays: deleting it would let two later runs lock two different files.
    lock = open(out / ".lock", "a")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def _check_free(out: Path, config: TrainConfig) -> None:
    """Raises UserError if `out` holds foreign files, or a run not to be resumed or overwritten."""
    found = products(out)
    resuming = bool(config.resume_from_checkpoint)
    ours = (out / RUN).exists() or (resuming and list_checkpoints(out))
    foreign = found or [out / name for name in _WRITTEN if (out / name).exists()]
    if foreign and not ours:
        raise UserError(
            f"--output-dir {out} holds {foreign[-1].name} but no {RUN}, so it is not the output "
            "of a run; choose another directory"
        )
    if found and not config.overwrite_output_dir and not resuming:
        raise UserError(
            f"--output-dir {out} already holds a run ({found[-1].name}); continue it with "
            "--resume-from-checkpoint auto, start over with --overwrite-output-dir, or choose "
            "another directory"
        )


def products(out: Path) -> list[Path]:
    """Returns the paths of results and checkpoints in `out`, the completion marker first."""
    # Callers delete in this order, so that no marker remains after its results are deleted.
    names = [OUTPUT, "adapter_model.safetensors", "adapter_config.json"]
    names += ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
    return [p for name in names for p in out.glob(name)] + list_checkpoints(out)


def base_digests(directory: Path) -> dict[str, str]:
    """Returns SHA-256 of a model's config.json, and of its weight files' names, sizes and samples.

    The samples of a file are 64 evenly spaced pieces of at most 64 KiB, the header included.
    """
    # Hash samples, which takes a fraction of a second for any model. They suffice, because two
    # trainings of the same architecture differ in every piece.
    weights = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        weights.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for i in range(64):
                file.seek(i * size // 64)
                weights.update(file.read(min(1 << 16, size // 64 + 1)))
    config = file_digest(directory / "config.json")
    return {"base_digest": config, "weights_digest": weights.hexdigest()}


def plain_config(config: TrainConfig) -> dict[str, Any]:
    """Returns the settings as a dict that JSON can represent: tuples become lists."""
    settings = dataclasses.asdict(config)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


def as_flags(config: TrainConfig) -> str:
    """Format the settings that differ from their defaults as command-line flags."""
    words: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(flag(field.name if value else f"no_{field.name}"))
        else:
            words += [flag(field.name), *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)
