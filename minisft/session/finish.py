"""Finish a run: load the best weights, export, write train_output.json, print the summary."""

import dataclasses
import shutil
from pathlib import Path

from minisft.files.checkpoint import load_trained_
from minisft.files.device import memory_gib, peak_memory_gib
from minisft.files.disk import write_json, write_text
from minisft.files.export import (
    model_card,
    save_shards,
    trained_file,
    write_files,
    write_model_files,
    write_trained,
)
from minisft.files.load import base_4bit
from minisft.session.context import Numbers, Run
from minisft.session.describe import summarise
from minisft.session.merge import merge
from minisft.session.outputs import OUTPUT, Metrics, TrainOutput, plain_config
from minisft.session.report import say
from minisft.session.serving import serving_files


def take_best_(run: Run) -> int:
    """Load the best weights if --load-best-model-at-end is set; returns the step of the weights."""
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
    """Export, merge if --save-merged is set, write train_output.json, print the summary.

    before, after: evaluations of the untrained and of the exported weights; {} without eval data.
    """
    metrics = closing_metrics(run, numbers, before, after)
    export(run, metrics)
    merged = run.out / "merged"
    if run.config.save_merged:
        # Free the frozen weights before merging, which loads the base model again.
        run.base = dataclasses.replace(run.base, frozen={})
        shutil.rmtree(merged, ignore_errors=True)
        say(f"{merged}: {merge(run.out, merged, device=str(run.base.device))}")
    elif merged.exists():
        say(f"warning: {merged} is from an earlier state of the run; --save-merged rewrites it")
    result = TrainOutput(run.state.step, metrics["train_loss"], metrics)
    with run.stop.held():
        # Write train_output.json last: it marks the run as complete.
        write_json(run.out / OUTPUT, result._asdict())
        summarise(run, result)
    return result


def closing_metrics(run: Run, numbers: Numbers, before: Metrics, after: Metrics) -> Metrics:
    """Returns the metrics for train_output.json; times and rates cover this process only."""
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
    """Compare answers before and after training: counts and samples; {} if the prompts differ."""
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
    """Write the final adapter with a model card, or the full model, and the tokenizer files."""
    base, config, trainable = run.base, run.config, run.state.trainable
    if base.lora is None:
        dtype, files = base.compute.dtype, serving_files("FROM .", run.tokenizer, base.cfg)
        save_shards(run.out, trainable.views.items(), dtype)
        write_model_files(run.out, base.directory, base.cfg, dtype, files)
        return
    source = f"FROM {Path(config.base_name).as_posix()}\nADAPTER ."
    write_files(run.out, serving_files(source, run.tokenizer, base.cfg))
    facts = {
        "data_hash": run.data.hash,
        "steps": run.state.step,
        "losses": {k: v for k, v in metrics.items() if "loss" in k},
        "config": {k: v for k, v in plain_config(config).items() if v not in ("", None, [])},
    }
    write_text(run.out / "README.md", model_card(config.base_name, facts, base_4bit(config, base)))
    write_trained(run.out, trainable, base, config)
