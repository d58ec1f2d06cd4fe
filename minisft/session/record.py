"""What a run writes: run.json, metrics lines, checkpoints, and at its end the result."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from minisft.files.checkpoint import load_trained_, rotate, save_checkpoint
from minisft.files.device import memory_gib, peak_memory_gib
from minisft.files.disk import atomically, write_json, writing
from minisft.files.export import export_adapter, export_model, trained_file, write_trained
from minisft.lora import ParamGroup
from minisft.session.context import Numbers, Run
from minisft.session.describe import summarise
from minisft.session.merge import merge
from minisft.session.outputs import OUTPUT, RUN, Metrics, TrainOutput, plain_config, products
from minisft.session.report import say
from minisft.session.serving import serving_files

# Files that only some kinds of run write; a later run of another kind would leave them stale.
_LEFT = (
    "README.md", "config.json", "generation_config.json", "samples.jsonl", "Modelfile",
    "runs", "wandb", "merged",
)  # fmt: skip
_PACKAGES = ("minisft", "torch", "triton", "safetensors", "tokenizers", "datasets")


def start_over(run: Run) -> None:
    """Write run.json, delete a previous run's completion marker; all of it if it is overwritten."""
    out = run.out
    # Written before anything is deleted: a full disk stops here, with the previous run intact.
    # Renamed last: until then the old run.json marks the directory as a run's.
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

    groups: with their peak learning rates; those with one of their own get a field each, such as
    learning_rate_embeddings. factor: the schedule's, on all of them.
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
    """Write one complete checkpoint, then remove those beyond --save-total-limit."""
    # metrics.jsonl must not lack a step that a checkpoint holds.
    run.report.sync()
    config, state = run.config, run.state
    evaluated = state.step in run.report.evaluations
    facts = {"config": plain_config(config), "evaluated": evaluated, **run.facts}
    write = partial(write_trained, trainable=state.trainable, base=run.base, config=config)
    save_checkpoint(run.out, state, write, facts)
    rotate(run.out, config.save_total_limit, state.best_step)


def save_due(run: Run, best: bool, end: bool) -> bool:
    """Whether --save-strategy asks for a checkpoint now, at a new `best` or at the `end`."""
    config, step = run.config, run.state.step
    every = {"epoch": run.batches.schedule.steps_per_epoch, "steps": config.save_steps}
    # With "no" and "best" no step is due by its number.
    periodic = config.save_strategy in every and step % every[config.save_strategy] == 0
    return config.save_strategy != "no" and (end or periodic or (best and config.keeps_best))


def go_on(step: int) -> str:
    """How to continue from the checkpoint of a step, as a message."""
    return f"checkpoint-{step} is complete: continue with --resume-from-checkpoint auto"


def take_best_(run: Run) -> int:
    """With --load-best-model-at-end load the best weights; returns the step of those in place."""
    config, state = run.config, run.state
    name, value = config.best_metric[0], state.best_value
    if state.step < run.total_steps:
        least = config.early_stopping_threshold
        say(
            f"stopped early after step {state.step}: {state.evaluations_since_best} evaluations in "
            f"a row were no better than step {state.best_step}'s {name} {value:.4f}"
            + (f", or by no more than {least:g}" if least else "")
        )
    if config.load_best_model_at_end and state.best_step not in (0, state.step):
        best = run.out / f"checkpoint-{state.best_step}"
        load_trained_(best, state, *trained_file(run.base.lora), run.base.initial_lora)
        say(f"best: step {state.best_step}, {name} {value:.4f}; exporting its weights")
        return state.best_step
    return state.step


def finish(run: Run, numbers: Numbers, before: Metrics, after: Metrics) -> TrainOutput:
    """Export, merge with --save-merged, write train_output.json, print the summary.

    before, after: evaluations of the untrained and of the exported weights, {} if there is none.
    """
    metrics = closing_metrics(run, numbers, before, after)
    export(run, metrics)
    merged = run.out / "merged"
    if run.config.save_merged:
        # Free the frozen weights: merging loads the base a second time.
        run.base = dataclasses.replace(run.base, frozen={})
        shutil.rmtree(merged, ignore_errors=True)
        say(f"{merged}: {merge(run.out, merged, device=str(run.base.device))}")
    elif merged.exists():
        say(f"warning: {merged} is from an earlier state of the run; --save-merged rewrites it")
    result = TrainOutput(run.state.step, metrics["train_loss"], metrics)
    with run.stop.held():
        # Written last: this file marks the run as complete.
        write_json(run.out / OUTPUT, result._asdict())
        summarise(run, result)
    return result


def closing_metrics(run: Run, numbers: Numbers, before: Metrics, after: Metrics) -> Metrics:
    """The metrics of train_output.json. Times and rates cover the steps of this process only."""
    state, device, seconds = run.state, run.base.device, numbers.seconds
    metrics: Metrics = {
        "train_runtime": seconds,
        "train_steps_per_second": numbers.steps / seconds if seconds else 0.0,
        "train_loss": state.total_loss / max(1, state.step),
        "num_tokens": state.num_tokens,
        "epoch": run.batches.schedule.epoch_after(state.step - 1),
    }
    if "eval_loss" in after:
        metrics |= {"eval_loss_before": before.get("eval_loss"), "eval_loss": after["eval_loss"]}
        metrics |= {k: after[k] for k in ("eval_mean_token_accuracy", "eval_entropy")}
    if state.best_step and run.config.keeps_best:
        names = ("best_step", "best_value", "evaluations_since_best")
        metrics |= {name: getattr(state, name) for name in names}
    metrics |= _answers(before.get("answers", []), after.get("answers", []))
    return metrics | {
        "train_tokens_per_second": numbers.tokens / seconds,
        "memory_before_gib": numbers.memory_before_gib,
        "memory_after_gib": memory_gib(device),
        "peak_memory_gib": peak_memory_gib(device),
    }


def _answers(before: list[Metrics], after: list[Metrics]) -> Metrics:
    """Counts and samples of --eval-generate; {} if the two evaluations had different prompts."""
    if not before or [a["prompt"] for a in before] != [a["prompt"] for a in after]:
        return {}
    return {
        "answers": len(after),
        "right_before": sum(a["right"] for a in before),
        "right_after": sum(a["right"] for a in after),
        "samples": [
            {"prompt": a["prompt"], "expected": a["expected"]}
            | {"before": b["answer"], "after": a["answer"]}
            for b, a in zip(before, after, strict=True)
        ],
    }


def export(run: Run, metrics: Metrics) -> None:
    """Write the final adapter (or model) with tokenizer files and model card to the output."""
    base, config, trainable = run.base, run.config, run.state.trainable
    if base.lora is None:
        export_model(run.out, trainable, base, serving_files("FROM .", run.tokenizer, base.cfg))
        return
    source = f"FROM {Path(config.base_name).as_posix()}\nADAPTER ."
    card = {
        "data_hash": run.data.hash,
        "steps": run.state.step,
        "losses": {k: v for k, v in metrics.items() if "loss" in k},
        "config": {k: v for k, v in plain_config(config).items() if v not in ("", None, [])},
    }
    files = serving_files(source, run.tokenizer, base.cfg)
    export_adapter(run.out, trainable, base, config, files, card)
