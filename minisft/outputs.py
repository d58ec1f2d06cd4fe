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

    UserError if it already holds a run and neither resuming nor overwriting was asked for.
    """
    out = Path(config.output_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "a")  # noqa: SIM115
    except OSError as e:
        raise UserError(
            f"--output-dir {out}: not writable ({e.strerror}); choose another directory"
        ) from e
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"--output-dir {out}: another run is writing there; wait for it or choose "
                "another directory"
            ) from None
        clean_temporaries(out)
        if not config.resume_from_checkpoint:
            _refuse_or_clear(out, config.overwrite_output_dir)
        yield out


def _refuse_or_clear(out: Path, overwrite: bool) -> None:
    products = [
        p
        for p in (out / OUTPUT, out / "adapter_model.safetensors", out / "model.safetensors")
        if p.exists()
    ]
    products += list_checkpoints(out)
    if products and not overwrite:
        raise UserError(
            f"--output-dir {out} holds a run already ({products[-1].name}); continue it with "
            "--resume-from-checkpoint auto, start over with --overwrite-output-dir, or take another"
        )
    for path in products:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


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
