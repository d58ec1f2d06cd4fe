"""Write the records of a run: run.json before the first step, metrics lines, checkpoints."""

import platform
import shutil
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from minisft.files.checkpoint import rotate, save_checkpoint
from minisft.files.device import peak_memory_gib
from minisft.files.disk import atomically, write_json, writing
from minisft.files.export import write_trained
from minisft.lora import ParamGroup
from minisft.session.context import Run
from minisft.session.outputs import OUTPUT, RUN, plain_config, products

# Files that only some kinds of run write; a later run of another kind would leave them stale.
_LEFT = (
    "README.md", "config.json", "generation_config.json", "samples.jsonl", "Modelfile",
    "runs", "wandb", "merged",
)  # fmt: skip


_PACKAGES = ("minisft", "torch", "triton", "safetensors", "tokenizers", "datasets")


def start_over(run: Run) -> None:
    """Write run.json; delete a previous run's completion marker, or all of it to overwrite it."""
    out = run.out
    # Write the new run.json before deleting anything: if the disk is full, the previous run stays
    # intact. Rename it last: until then the old run.json marks the directory as that of a run.
    with atomically(out / RUN) as new:
        write_json(new, _run_record(run))
        with writing(out):
            (out / OUTPUT).unlink(missing_ok=True)
            if run.config.overwrite_output_dir:
                left = [out / name for name in _LEFT if (out / name).exists()]
                for path in products(out) + (left if (out / RUN).exists() else []):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _run_record(run: Run) -> dict[str, Any]:
    base = run.base
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
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
        "gpu": torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else None,
        **run.facts,
        "data": run.data.train.stats,
        "eval_data": run.data.eval.stats if run.data.eval else None,
    }


def log_step_(run: Run, norm: float, epoch: float, groups: list[ParamGroup], factor: float) -> None:
    """Log one metrics line: means over the steps since the last line, and this step's grad norm.

    groups: parameter groups with their peak learning rates; each named group gets a field, such as
    learning_rate_embeddings. factor: the schedule's factor, which scales all learning rates.
    """
    state = run.state
    losses, tokens, targets, seconds = zip(*state.unlogged, strict=True)
    metrics = {
        "step": state.step,
        "epoch": epoch,
        "loss": sum(losses) / len(losses),
        "grad_norm": norm,
        "learning_rate": run.config.learning_rate * factor,
        **{f"learning_rate_{g.name}": g.learning_rate * factor for g in groups if g.name},
        "num_tokens": state.num_tokens,
        "num_loss_tokens": sum(targets),
        "tokens_per_second": sum(tokens) / sum(seconds),
        "step_time_s": sum(seconds) / len(seconds),
        "peak_memory_gib": peak_memory_gib(run.base.device),
    }
    run.report.step(metrics)
    state.unlogged = []


def save(run: Run) -> None:
    """Write a checkpoint, then delete older checkpoints in excess of --save-total-limit."""
    # Sync first, so that metrics.jsonl contains every step of the checkpoint after a crash.
    run.report.sync()
    config, state = run.config, run.state
    evaluated = state.step in run.report.evaluations
    facts = {"config": plain_config(config), "evaluated": evaluated, **run.facts}
    write = partial(write_trained, trainable=state.trainable, base=run.base, config=config)
    save_checkpoint(run.out, state, write, facts)
    rotate(run.out, config.save_total_limit, state.best_step)


def save_due(run: Run, best: bool, end: bool) -> bool:
    """Returns True if a checkpoint is due. best: at a new best evaluation; end: after training."""
    config, step = run.config, run.state.step
    every = {"epoch": run.batches.schedule.steps_per_epoch, "steps": config.save_steps}
    # The strategies "no" and "best" are not in `every`: they have no periodic checkpoints.
    periodic = config.save_strategy in every and step % every[config.save_strategy] == 0
    return config.save_strategy != "no" and (end or periodic or (best and config.keeps_best))


def go_on(step: int) -> str:
    """Returns a message that tells the user how to continue from the checkpoint of a step."""
    return f"checkpoint-{step} is complete: continue with --resume-from-checkpoint auto"
