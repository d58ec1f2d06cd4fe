"""A whole run, from settings to exported result: `train(config)` is its table of contents."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from minisft.batches import Batches, BatchFn, Collator, RowSchedule, source_shares
from minisft.config.errors import UserError, flag
from minisft.config.lora import LoraConfig
from minisft.config.train import TrainConfig
from minisft.data.load import Data, check_rows, collated, estimated_rows, load_data, most_tokens
from minisft.explicit import Choice, choose
from minisft.files.checkpoint import load_trained_, rotate, save_checkpoint
from minisft.files.device import memory_gib, peak_memory_gib, resolve_device
from minisft.files.disk import existing, write_json
from minisft.files.export import (
    describe_config,
    export_adapter,
    export_model,
    trained_file,
    write_trained,
)
from minisft.files.load import Base, base_4bit, load_base
from minisft.loop import check_changed, steps_, trace
from minisft.lora import Flat
from minisft.session.describe import describe, summarise, without_effect
from minisft.session.evaluate import (
    check_evaluation,
    evaluate_after,
    evaluate_before,
    evaluate_during,
    most_eval_tokens,
    stops_early,
)
from minisft.session.loggers import require_loggers
from minisft.session.memory import Needs, estimate, in_words, out_of_memory, resident_gib
from minisft.session.merge import merge
from minisft.session.outputs import (
    OUTPUT,
    TrainOutput,
    base_digests,
    output_directory,
    plain_config,
    run_record,
    start_over,
)
from minisft.session.report import Reporter, reporting, say
from minisft.session.resume import finished, resume_, saved_initial_lora
from minisft.session.signals import Preempted, stop_signals
from minisft.session.torch_switches import flash_attention
from minisft.step import State
from minisft.variants.pissa import is_pair


def train(config: TrainConfig, batch_fn: BatchFn | None = None) -> TrainOutput:
    """Fine-tune as `config` says and write everything to config.output_dir.

    batch_fn: a data collator (`minisft.batches.BatchFn`) for the rows of every micro-batch.
    Raises UserError for what the user can mend, TrainingStopped when a guard ends training,
    Preempted after SIGTERM or SIGINT once a checkpoint is written. A run that is complete already
    changes nothing and returns its result. With dry_run all goes as it would up to the first
    write, but weights have sizes alone and the rows are a sample; the metrics are estimates.
    """
    check_required(config)
    where = "before its first step: the same command starts again"
    with (
        stop_signals(where) as stop,
        output_directory(config) as out,
        out_of_memory(config) as needs,
        deterministic(config.deterministic),
        flash_attention(config.attn_implementation, resolve_device(config.device)),
    ):
        if (done := finished(out, config)) is not None:
            return done
        model, state = load_base(config, saved_initial_lora(out, config))
        collator = None if batch_fn is None else Collator(batch_fn, model.cfg.vocab_size)
        data = collated(load_data(config, model, out), config, collator)
        stop.raise_if_asked()
        choice = choose_pass(config, model, state, data)
        batches, total_steps = plan_steps(config, data, model.device, collator, choice)
        largest = most_tokens(data, batches, total_steps), most_eval_tokens(data.eval, config)
        needs.update(estimate(model, state, choice, *largest))
        facts = {"data_hash": data.hash, **base_digests(model.directory)}
        evaluated = resume_(state, out, config, model, facts, total_steps)
        check_evaluation(config, data.eval, state, out)
        check_space(out, state.trainable, model.lora)
        describe(config, model, data, state, batches, total_steps)
        say(f"pass    {choice.description}")
        for name, why in without_effect(config, choice, state.trainable, data):
            say(f"warning: {flag(name)} {getattr(config, name)} has no effect: {why}")
        if config.dry_run:
            return end_of_dry_run(model, data, batches, total_steps, needs)
        start_over(out, config, run_record(config, model, facts | data.record(), total_steps))
        with reporting(config, out, total_steps, state.step, evaluated) as report:
            before = evaluate_before(config, model, data.eval, state, out, report)
            if state.step:  # an evaluation that was broken off is made up for
                best = evaluate_during(
                    config, model, data.eval, state, batches.schedule, total_steps, report
                )
                if best and not (out / f"checkpoint-{state.step}").exists():  # another's, resumed
                    save(out, state, config, model, facts, report)
            started, first, tokens = time.perf_counter(), state.step, state.num_tokens
            memory = memory_gib(model.device)
            untrained = trace(state)
            todo = state.step if stops_early(state, config) else total_steps
            with stop.held():
                for result in steps_(state, model, batches, config, todo, report, choice):
                    best = False
                    if not stop.name:
                        with stop.breakable():
                            best = evaluate_during(
                                config,
                                model,
                                data.eval,
                                state,
                                batches.schedule,
                                total_steps,
                                report,
                            )
                    end = stops_early(state, config) or state.step == total_steps
                    if stop.name or save_due(config, state, batches.schedule, best, end):
                        save(out, state, config, model, facts, report)
                    if stop.name and not end:
                        raise Preempted(
                            f"{stop.name}: stopped after step {state.step}, loss "
                            f"{result.loss:.4f}; {_go_on(state.step)}"
                        )
                    if end:
                        break
            check_changed(untrained, state, first, config, state.step)
            seconds = time.perf_counter() - started
            epoch = batches.schedule.epoch_after(state.step - 1)
            kept = "no checkpoint is kept (--save-strategy no)"
            kept = kept if config.save_strategy == "no" else _go_on(state.step)
            stop.where = f"after the last step; {kept}"
            step = take_best_(state, out, config, model, total_steps, report)
            after = evaluate_after(config, model, data.eval, state, step, batches.schedule, report)
        keeps = config.keeps_best
        metrics = closing_metrics(state, epoch, first, seconds, before, after, keeps)
        metrics |= {
            "train_tokens_per_second": (state.num_tokens - tokens) / seconds,
            "memory_before_gib": memory,
            "memory_after_gib": memory_gib(model.device),
            "peak_memory_gib": peak_memory_gib(model.device),
        }
        export(out, config, model, data, state, metrics)
        if config.save_merged:
            model = dataclasses.replace(model, frozen={})  # room for the merged one
            save_merged(out, model.device)
        elif (out / "merged").exists():
            say(f"warning: {out / 'merged'} is of an earlier state; --save-merged makes it anew")
        with stop.held():
            return finish(out, state, metrics, config, model)


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """With --deterministic, torch takes no algorithm whose bits may differ between two runs.

    cuBLAS reads its variable when the process first uses the GPU: a setting of the user's stays.
    """
    if not on:  # (even setting it to False loads torch's compiler, which writes to /tmp)
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check_space(out: Path, trained: Flat, lora: LoraConfig | None) -> None:
    """UserError if the disk has no room for one checkpoint and the result."""
    # float32: the tensors, two moments, and the tensors once more
    need = 4 * 4 * trained.buffer.numel()
    if lora and lora.splits_weights:  # and, twice, what A and B started from
        need += 4 * 2 * sum(math.prod(s) for n, s in trained.shapes.items() if is_pair(n))
    free = shutil.disk_usage(existing(out)).free
    if free < need:
        raise UserError(
            f"--output-dir {out} has {free / 2**30:.2f} GiB free; one checkpoint and the result "
            f"need {need / 2**30:.2f} GiB: make room or choose another directory"
        )


def _go_on(step: int) -> str:
    return f"checkpoint-{step} is complete: continue with --resume-from-checkpoint auto"


# --------------------------------------------------------------------------------- before the loop


def check_required(config: TrainConfig) -> None:
    """The two settings that have no default."""
    if not config.model:
        raise UserError(
            "--model is missing: give a directory or a hub id (no flags at all run the demo)"
        )
    if not config.dataset:
        raise UserError(
            "--dataset is missing: give a .jsonl, .json, .csv or .parquet file, or a hub id"
        )
    require_loggers(config)


def plan_steps(
    config: TrainConfig,
    data: Data,
    device: torch.device,
    collator: Collator | None,
    choice: Choice,
) -> tuple[Batches, int]:
    """Which rows each step sees, and how many steps there are."""
    rows = [told["rows"] for told in data.train.stats["sources"]]
    rows = estimated_rows(data.train) if config.dry_run else rows
    schedule = RowSchedule(
        num_rows=sum(rows),
        batch_size=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        seed=config.seed,
        shares=source_shares(rows, [weight for _, weight in config.sources]),
    )
    batches = Batches(
        data.train,
        schedule,
        max_tokens=choice.tokens,
        device=torch.device("cpu") if choice.explicit else device,
        ahead=device.type == "cuda" and collator is None,
        dropout=config.lora_dropout > 0 or config.neftune_noise_alpha > 0,
        collator=collator,
    )
    epochs = math.ceil(config.num_train_epochs * schedule.steps_per_epoch)
    return batches, config.max_steps if config.max_steps > 0 else epochs


def choose_pass(config: TrainConfig, model: Base, state: State, data: Data) -> Choice:
    """How gradients are computed, and how many tokens at a time."""
    check_rows(config, data)
    longest = int(data.train.row_lengths.max())
    to_load = sum(resident_gib(model, state).values()) * 2**30 if config.dry_run else 0
    return choose(
        config, state.trainable, model.frozen, model.compute, longest, model.device, int(to_load)
    )


def end_of_dry_run(
    model: Base, data: Data, batches: Batches, steps: int, needs: Needs
) -> TrainOutput:
    """The last lines of a dry run, and its estimates: total_steps, num_rows, memory_gib."""
    if model.device.type == "cpu":  # what the process takes as it is counts there
        needs = {"this process as it is": memory_gib(model.device), **needs}
    say(f"memory  about {sum(needs.values()):.2f} GiB: {in_words(needs)}")
    if model.device.type == "cpu":
        say("        (freed blocks stay with the process, which may grow to nearly twice that)")
    say("dry run: nothing was trained and nothing written to the output directory")
    metrics = {
        "total_steps": steps,
        "num_rows": batches.schedule.num_rows,
        "memory_gib": needs,
        "data": data.train.stats,
        "model_directory": str(model.directory),
    }
    return TrainOutput(0, math.nan, metrics)


def save(
    out: Path,
    state: State,
    config: TrainConfig,
    model: Base,
    facts: dict[str, Any],
    report: Reporter,
) -> None:
    """One complete checkpoint, then rotation."""
    report.sync()

    def write_model(directory: Path) -> None:
        write_trained(
            directory, state.trainable, model.lora, model.cfg, config.base_name, config.revision,
            base_4bit(config, model), model.start,
        )  # fmt: skip

    then = {"config": plain_config(config), "evaluated": state.step in report.evaluations}
    save_checkpoint(out, state, write_model, {**then, **facts})
    rotate(out, config.save_total_limit, state.best_step)


def save_due(
    config: TrainConfig, state: State, schedule: RowSchedule, best: bool, end: bool
) -> bool:
    """Whether --save-strategy asks for a checkpoint after this step, the best or the last one."""
    if config.save_strategy == "no":
        return False
    every = schedule.steps_per_epoch if config.save_strategy == "epoch" else config.save_steps
    periodic = config.save_strategy != "best" and state.step % every == 0
    return end or periodic or (best and config.keeps_best)


# ---------------------------------------------------------------------------------- after the loop


def take_best_(
    state: State, out: Path, config: TrainConfig, model: Base, total_steps: int, report: Reporter
) -> int:
    """What the evaluations decided: with --load-best-model-at-end, the best one's weights.

    The step after which the weights were as they are now.
    """
    name, value = config.best_metric[0], state.best_value
    if state.step < total_steps:
        report.say(
            f"stopped early after step {state.step}: {state.evaluations_since_best} evaluations "
            f"in a row were no better than step {state.best_step}'s {name} {value:.4f}{_by(config)}"
        )
    if config.load_best_model_at_end and state.best_step not in (0, state.step):
        best = out / f"checkpoint-{state.best_step}"
        load_trained_(best, state, *trained_file(model.lora), model.start)
        report.say(f"best: step {state.best_step}, {name} {value:.4f}; its weights are the result")
        return state.best_step
    return state.step


def _by(config: TrainConfig) -> str:
    least = config.early_stopping_threshold
    return f", or by no more than {least:g}" if least else ""


def closing_metrics(
    state: State, epoch: float, first: int, seconds: float, before: dict, after: dict,
    keeps_best: bool,
) -> dict[str, Any]:  # fmt: skip
    """The numbers of train_output.json; times are those of this process's steps."""
    steps = state.step - first
    metrics: dict[str, Any] = {
        "train_runtime": seconds,
        "train_steps_per_second": steps / seconds if seconds else 0.0,
        "train_loss": state.total_loss / max(1, state.step),
        "num_tokens": state.num_tokens,
        "epoch": epoch,
    }
    if "eval_loss" in after:
        metrics |= {"eval_loss_before": before.get("eval_loss"), "eval_loss": after["eval_loss"]}
        metrics |= {k: after[k] for k in ("eval_mean_token_accuracy", "eval_entropy")}
    if state.best_step and keeps_best:
        names = ("best_step", "best_value", "evaluations_since_best")
        metrics |= {name: getattr(state, name) for name in names}
    asked = [[a["prompt"] for a in x.get("answers", [])] for x in (before, after)]
    if asked[0] and asked[0] == asked[1]:
        metrics |= {
            "answers": len(after["answers"]),
            "right_before": sum(a["right"] for a in before["answers"]),
            "right_after": sum(a["right"] for a in after["answers"]),
            "samples": [
                {
                    **{k: a[k] for k in ("prompt", "expected")},
                    "before": b["answer"],
                    "after": a["answer"],
                }
                for b, a in zip(before["answers"], after["answers"], strict=True)
            ],
        }
    return metrics


def export(
    out: Path, config: TrainConfig, model: Base, data: Data, state: State, metrics: dict[str, Any]
) -> None:
    """The final adapter (or model) with tokenizer and card, at the top of the output directory."""
    if model.lora is None:
        export_model(
            out, state.trainable, model.directory, model.cfg, model.tokenizer, model.compute.dtype
        )
        return
    facts = {
        "data_hash": data.hash,
        "steps": state.step,
        "losses": {k: v for k, v in metrics.items() if "loss" in k},
        "config": describe_config(plain_config(config)),
    }
    export_adapter(
        out,
        state.trainable,
        model.lora,
        model.cfg,
        model.tokenizer,
        config.base_name,
        config.revision,
        base_4bit(config, model),
        model.start,
        facts,
    )


def save_merged(out: Path, device: torch.device) -> None:
    """The adapter of `out` merged into its base, in out/merged."""
    shutil.rmtree(out / "merged", ignore_errors=True)
    say(f"{out / 'merged'}: {merge(out, out / 'merged', device=str(device))}")


def finish(
    out: Path, state: State, metrics: dict[str, Any], config: TrainConfig, model: Base
) -> TrainOutput:
    """train_output.json, written last: it marks the run as complete."""
    result = TrainOutput(state.step, metrics["train_loss"], metrics)
    write_json(out / OUTPUT, result._asdict())
    summarise(out, result, config, model)
    return result
