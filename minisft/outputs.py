"""The output directory of a run: who may write there, and the record of what was run."""

from __future__ import annotations

import dataclasses
import fcntl
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from minisft.checkpoint import clean_temporaries, file_digest, list_checkpoints, write_json
from minisft.config import TrainConfig, UserError
from minisft.model import Model

RUN, OUTPUT = "run.json", "train_output.json"
_PACKAGES = ("minisft", "torch", "triton", "safetensors", "tokenizers", "datasets")


@contextmanager
def output_directory(config: TrainConfig) -> Iterator[Path]:
    """The output directory, created, writable, locked against a second run, free of leftovers.

    UserError if it holds the base model, or a run and neither resuming nor overwriting was asked
    for. Nothing of an earlier run is removed here (`start_over`).
    """
    out = Path(config.output_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if Path(config.model).is_dir() and out.samefile(config.model):
            raise UserError(
                f"--output-dir {out} is the base model's own directory; choose another directory"
            )
        lock = open(out / ".lock", "a")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"--output-dir {out}: another run is writing there; wait for it or choose another "
            "directory"
        ) from None
    except OSError as e:
        raise UserError(
            f"--output-dir {out}: not writable ({e.strerror}); choose another directory"
        ) from e
    with lock:
        clean_temporaries(out)
        if not config.resume_from_checkpoint:
            _check_free(out, config.overwrite_output_dir)
        yield out


def start_over(out: Path, config: TrainConfig) -> None:
    """With --overwrite-output-dir, remove what an earlier run made: once the new one can start."""
    if config.overwrite_output_dir and not config.resume_from_checkpoint:
        for path in _products(out):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check_free(out: Path, overwrite: bool) -> None:
    products = _products(out)
    if products and not (out / RUN).exists():
        raise UserError(
            f"--output-dir {out} holds {products[-1].name} but no {RUN}, so it is no run's; choose "
            "another directory"
        )
    if products and not overwrite:
        raise UserError(
            f"--output-dir {out} holds a run already ({products[-1].name}); continue it with "
            "--resume-from-checkpoint auto, start over with --overwrite-output-dir, or take another"
        )


def _products(out: Path) -> list[Path]:
    """What a run leaves that another one must not be mixed with."""
    names = [OUTPUT, "adapter_model.safetensors", "adapter_config.json"]
    names += ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
    return [p for name in names for p in out.glob(name)] + list_checkpoints(out)


def base_digest(directory: Path) -> str:
    """SHA-256 of the base model's config.json."""
    return file_digest(directory / "config.json")


def write_run_record(
    out: Path, config: TrainConfig, model: Model, data: dict[str, Any], steps: int
) -> None:
    """run.json: the command, the resolved settings, versions, and the hash of the data."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None
    record = {
        "command": sys.argv,
        "config": plain_config(config),
        "resolved": {
            "model_directory": str(model.directory),
            "device": str(model.device),
            "dtype": str(model.compute.dtype).removeprefix("torch."),
            "total_steps": steps,
            "world_size": 1,
        },
        "versions": {"python": platform.python_version(), **versions},
        "gpu": gpu,
        **data,
        "base_digest": base_digest(model.directory),
    }
    write_json(out / RUN, record)


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def plain_config(config: TrainConfig) -> dict[str, Any]:
    return {k: plain(v) for k, v in dataclasses.asdict(config).items()}
