"""run.json, the record of what was run; written before the first step."""

from __future__ import annotations

import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from minisft.files.disk import atomically, write_json, writing
from minisft.session.context import Run
from minisft.session.outputs import OUTPUT, RUN, plain_config, products

# What only one kind of run leaves: another would not overwrite it.
_LEFT = (
    "README.md", "config.json", "generation_config.json", "samples.jsonl", "Modelfile",
    "runs", "wandb", "merged",
)  # fmt: skip


_PACKAGES = ("minisft", "torch", "triton", "safetensors", "tokenizers", "datasets")


def start_over(run: Run) -> None:
    """Write run.json; delete the previous run's completion marker: this run has not finished.

    With --overwrite-output-dir everything that the previous run made is deleted too.

    The new record is on the disk before anything is removed, and gets its name after.
    """
    out = run.out
    with atomically(out / RUN) as new:
        write_json(new, run_record(run))
        with writing(out):
            (out / OUTPUT).unlink(missing_ok=True)
            if run.config.overwrite_output_dir:
                left = [out / name for name in _LEFT if (out / name).exists()]
                for path in products(out) + (left if (out / RUN).exists() else []):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def run_record(run: Run) -> dict[str, Any]:
    """The content of run.json: command, resolved settings, versions, and the hash of the data."""
    base = run.base
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    gpu = torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else None
    return {
        "command": sys.argv,
        "config": plain_config(run.config),
        "resolved": {
            "model_directory": str(base.directory),
            "device": str(base.device),
            "dtype": str(base.compute.dtype).removeprefix("torch."),
            "load_seconds": round(base.load_seconds, 3),
            "load_peak_memory_gib": round(base.load_peak_gib, 3),
            "total_steps": run.total_steps,
            "world_size": 1,
        },
        "versions": {"python": platform.python_version(), **versions},
        "gpu": gpu,
        **run.facts,
        "data": run.data.train.stats,
        "eval_data": run.data.eval.stats if run.data.eval else None,
    }
