"""A whole run, from settings to exported result: `train(config)` is its table of contents."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minisft.adapter import adapter_config_dict, read_adapter_config
from minisft.attention import flash_attention
from minisft.batches import (
    Batches,
    BatchFn,
    Collator,
    Schedule,
    collate,
    cut_by_tokens,
    source_shares,
)
from minisft.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint_,
    load_trained_,
    read_facts,
    rotate,
    save_checkpoint,
    set_aside_newer,
    write_json,
)
from minisft.config import LoraConfig, TrainConfig, UserError, existing, flag, load_json
from minisft.dry_run import estimated_rows, is_sample, load_sample
from minisft.evaluate import (
    check_evaluation,
    evaluate_after,
    evaluate_before,
    evaluate_during,
    stops_early,
)
from minisft.export import (
    describe_config,
    export_adapter,
    export_model,
    trained_file,
    write_trained,
)
from minisft.loggers import require_loggers
from minisft.loop import check_changed, steps_, trace
from minisft.lora import EMBEDDING_WEIGHTS, Flat
from minisft.memory import Needs, estimate, in_words, kept, out_of_memory
from minisft.merge import merge
from minisft.model import Model, load_model, memory_gib, peak_memory_gib, resolve_device
from minisft.nn import NF4Weight
from minisft.outputs import (
    OUTPUT,
    RUN,
    as_flags,
    base_digests,
    output_directory,
    plain,
    plain_config,
    run_record,
    start_over,
)
from minisft.planning import Choice, choose
from minisft.preempt import Preempted, stop_signals
from minisft.preview import describe_data, show_preview
from minisft.report import Reporter, reporting, say
from minisft.residual import is_pair, plain_lora, read_start
from minisft.serving import commands, vllm_problems
from minisft.sources import load_eval, load_train, num_shared
from minisft.step import State
from minisft.targets import adapter_shapes, split_targets
from minisft.tokens import TokenizedDataset, data_hash

# A checkpoint made under other values of these is not a checkpoint of this run.
_FIXED_ON_RESUME = (
    "dtype", "load_in_4bit", "max_length", "lora_r", "lora_alpha", "lora_dropout", "use_rslora",
    "target_modules", "modules_to_save", "full_finetuning", "optim", "packing", "packing_strategy",
    "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
    "loss_type", "label_smoothing", "neftune_noise_alpha", "use_dora", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "exclude_modules", "init_lora_weights",
    "trainable_token_indices", "lora_embeddings",
)  # fmt: skip


_STEPS_LOOKED_AT = 200  # for the size of their micro-batches


class TrainOutput(NamedTuple):
    """What `train` returns: steps done, mean loss over them, and the run's closing numbers."""

    global_step: int
    training_loss: float
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Data:
    """The tokenised rows of a run, and what identifies them."""

    train: TokenizedDataset
    eval: TokenizedDataset | None
    hash: str  # "" of a sample

    def record(self) -> dict[str, Any]:
        """What run.json says of the data."""
        return {"data": self.train.stats, "eval_data": self.eval.stats if self.eval else None}


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
        model, state = load_model(config, kept_start(out, config))
        collator = None if batch_fn is None else Collator(batch_fn, model.cfg.vocab_size)
        data = collated(load_data(config, model, out), config, collator)
        stop.raise_if_asked()
        choice = choose_pass(config, model, state, data)
        batches, total_steps = plan_steps(config, data, model.device, collator, choice)
        needs.update(estimate(model, state, choice, most_tokens(data, batches, total_steps)))
        facts = {"data_hash": data.hash, **base_digests(model.directory)}
        evaluated = resume_(state, out, config, model, facts, total_steps)
        check_evaluation(config, data.eval, state, out)
        check_space(out, state.trainable, model.lora)
        describe(config, model, data, state, batches, total_steps)
        say(f"pass    {choice.said}")
        for name, why in without_effect(config, choice, state.trainable, data):
            say(f"warning: {flag(name)} {getattr(config, name)} has no effect: {why}")
        if config.dry_run:
            return end_of_dry_run(model, data, batches, total_steps, needs)
        start_over(out, config, run_record(config, model, facts | data.record(), total_steps))
        with reporting(config, out, total_steps, state.step, evaluated) as report:
            before = evaluate_before(config, model, data.eval, state, out, report)
            if state.step:  # an evaluation that was broken off is made up for
                evaluate_during(
                    config, model, data.eval, state, batches.schedule, total_steps, report
                )
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
            take_best_(state, out, config, model, total_steps, report)
            after = evaluate_after(config, model, data.eval, state, epoch, report)
        metrics = closing_metrics(state, epoch, first, seconds, before, after)
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


def finished(out: Path, config: TrainConfig) -> TrainOutput | None:
    """The result of a complete run that is being resumed, or None.

    Settings that a checkpoint fixes are compared first: with others, resuming is refused later on.
    """
    result = out / ("model.safetensors" if config.full_finetuning else "adapter_model.safetensors")
    shards = out / "model.safetensors.index.json"
    which = config.resume_from_checkpoint
    if not which or not (out / OUTPUT).exists():
        return None
    if which != "auto" and not Path(which).is_dir():
        return None  # refused by name later on
    if not result.exists() and not (config.full_finetuning and shards.exists()):
        return None
    names = (*_FIXED_ON_RESUME, "model", "dataset", "load_best_model_at_end")
    try:
        raw, then = load_json(out / OUTPUT), load_json(out / RUN)["config"]
        output = TrainOutput(raw["global_step"], raw["training_loss"], raw["metrics"])
        steps, epoch = int(output.global_step), float(output.metrics["epoch"])
        patience = config.early_stopping_patience
        early = 0 < patience <= output.metrics.get("evaluations_since_best", 0)
        changed = any(then.get(name, False) != plain(getattr(config, name)) for name in names)
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as e:
        say(f"{out / OUTPUT} or {RUN} is damaged ({e!r}): made again from the checkpoint")
        return None
    complete = epoch >= config.num_train_epochs
    if config.max_steps > 0:
        complete = steps == config.max_steps  # more of them: refused later on
    if changed or not (complete or early):
        return None
    ignored = ("resume_from_checkpoint", "overwrite_output_dir", "preview", "max_steps")
    now = {name: plain(getattr(config, name, was)) for name, was in then.items()}
    differ = [name for name in then if now[name] != then[name] and name not in ignored]
    last = [path.resolve() for path in list_checkpoints(out)[-1:]]
    if differ and which != "auto" and [Path(which).resolve()] != last:
        return None  # from an earlier state, the run would end otherwise
    say(f"{out}: complete already ({steps} steps); nothing to do")
    for name in differ:
        say(
            f"warning: {flag(name)} is {now[name]!r} now and was {then[name]!r}: it changes "
            "nothing. For a run with it, give a new --output-dir"
        )
    return output


def load_data(config: TrainConfig, model: Model, out: Path) -> Data:
    """Read, render, tokenise and (with --packing) pack the rows; UserError if none is trained."""
    given = (config, model.tokenizer, model.cfg.vocab_size)
    if config.dry_run:
        train_set, eval_set = load_sample(*given)
        if is_sample(train_set):
            return Data(train_set, eval_set, hash="")
    else:
        train_set = load_train(*given, scratch=out, say=say)
        eval_set = load_eval(*given, scratch=out, say=say)
    weights = [weight for _, weight in config.sources]
    hash = data_hash(train_set)
    if any(weights):  # they decide the order of the rows
        hash = hashlib.sha256(f"{hash} {weights}".encode()).hexdigest()
    return Data(train_set, eval_set, hash)


def collated(data: Data, config: TrainConfig, collator: Collator | None) -> Data:
    """With a collator, the eval rows as it makes them; the training rows go through it by step."""
    if collator is None:
        return data
    if config.packing:
        raise UserError("batch_fn takes rows as they are read; drop --packing")
    if data.eval is None:
        return data
    rows = list(range(len(data.eval)))
    size = config.eval_batch_size
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    return dataclasses.replace(data, eval=collate(data.eval, batches, collator))


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
    schedule = Schedule(
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


def most_tokens(data: Data, batches: Batches, steps: int) -> int:
    """Tokens of the largest micro-batch of the first steps, of the rows at hand."""
    schedule = dataclasses.replace(batches.schedule, num_rows=len(data.train), shares=())
    lengths = data.train.document_offsets[data.train.row_offsets].diff()
    most = 0
    for step in range(min(steps, schedule.steps_per_epoch, _STEPS_LOOKED_AT)):
        rows = [row for batch in schedule.rows(step) for row in batch]
        sizes = lengths[rows].tolist()
        for cut in cut_by_tokens(list(range(len(rows))), sizes, batches.max_tokens):
            most = max(most, sum(sizes[i] for i in cut))
    return most


def check_rows(config: TrainConfig, data: Data) -> None:
    """UserError where there are fewer rows, before packing, than one batch takes."""
    rows = data.train.stats.get("rows_kept", len(data.train))
    if config.dry_run:
        rows = sum(estimated_rows(data.train, "rows_kept"))
    if rows < config.per_device_train_batch_size:
        raise UserError(
            f"{', '.join(config.dataset)}: {rows} rows do not fill one batch of "
            f"--per-device-train-batch-size {config.per_device_train_batch_size}; lower it, or "
            "give more rows"
        )


def choose_pass(config: TrainConfig, model: Model, state: State, data: Data) -> Choice:
    """How gradients are computed, and how many tokens at a time."""
    check_rows(config, data)
    offsets = data.train.document_offsets[data.train.row_offsets]
    longest = int(offsets.diff().max())
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    to_load = sum(kept(model, state).values()) * 2**30 if config.dry_run else 0
    return choose(
        config, state.trainable, model.frozen, model.compute, longest, rows * longest,
        model.device, int(to_load),
    )  # fmt: skip


def kept_start(out: Path, config: TrainConfig) -> dict[str, Tensor]:
    """What the adapter of the run that is resumed started from, if it is a part of the base.

    Kept, not computed again: another machine's decomposition differs in its last bits.
    """
    if not (config.lora and config.lora.splits_weights):
        return {}
    file, prefix = trained_file(config.lora)
    which = config.resume_from_checkpoint
    path = find_checkpoint(out, which, lambda line: None) if which else None
    if path and (path / file).exists():
        return read_start(path / file, prefix)
    if config.init_lora_weights == "pissa":
        say("start   all singular values of every adapted weight; pissa_niter_4 is far quicker")
    return {}


def resume_(
    state: State,
    out: Path,
    config: TrainConfig,
    model: Model,
    facts: dict[str, Any],
    total_steps: int,
) -> bool:
    """Continue from the checkpoint that was asked for, if there is one; refuse another run's.

    Whether it was saved with its step's evaluation in it, where there was one to make.
    """
    if not config.resume_from_checkpoint:
        return True
    path = find_checkpoint(out, config.resume_from_checkpoint, say)
    if path is None:
        say(f"{out} holds no complete checkpoint: starting from step 0")
        return True
    file, prefix = trained_file(model.lora)
    if not (path / file).exists():
        raise UserError(
            f"{path}: no {file}; was it made with{'' if model.lora else 'out'} --full-finetuning?"
        )
    then = read_facts(path)
    if problems := _resume_problems(then, config, model, facts):
        raise UserError(
            f"{path} was made with other settings: {'; '.join(problems)}. "
            "Use the same, or a new --output-dir"
        )
    load_checkpoint_(path, state, file, prefix, model.start)
    if state.step > total_steps:
        raise UserError(
            f"{path} is beyond the end of this run, which has {total_steps} steps; raise "
            "--max-steps or --num-train-epochs, or resume from an older checkpoint"
        )
    say(f"resuming from {path} at step {state.step}")
    if config.dry_run:
        return True
    if names := set_aside_newer(out, state.step):
        say(f"{', '.join(names)}: beyond step {state.step}, renamed to abandoned-checkpoint-N")
    # A kill may have come between a save and its rotation.
    rotate(out, config.save_total_limit, state.best_step)
    for name, value in then["config"].items():
        now = plain(getattr(config, name, value))
        if now != value and name not in ("resume_from_checkpoint", "overwrite_output_dir"):
            say(f"{flag(name)} is {now!r} now; the checkpoint was made with {value!r}")
    return bool(then.get("evaluated", True))


def _resume_problems(
    then: dict[str, Any], config: TrainConfig, model: Model, facts: dict[str, Any]
) -> list[str]:
    """What tells a checkpoint from one of this run, a difference each."""
    settings = {"load_in_4bit": False} | then["config"]  # as before there was the flag
    found = []
    for name in _FIXED_ON_RESUME:
        if name not in settings:
            continue
        was, now = settings[name], plain(getattr(config, name))
        if was != now and not (name == "target_modules" and _same_targets(was, config, model)):
            found.append(f"{flag(name)} was {was!r}, now {now!r}")
    if facts["data_hash"] and then["data_hash"] != facts["data_hash"]:
        found.append("the training rows differ (their hash has changed)")
    if then["base_digest"] != facts["base_digest"]:
        found.append("the base model's config.json differs")
    if then["weights_digest"] != facts["weights_digest"]:
        found.append("the base model's weights differ")
    return found


def _same_targets(was: Any, config: TrainConfig, model: Model) -> bool:
    """Whether two spellings (`all-linear`, the seven names) mean the same modules."""
    if model.lora is None or config.lora is None or not isinstance(was, list):
        return False
    try:
        before = dataclasses.replace(config.lora, target_modules=tuple(was))
        return adapter_shapes(split_targets(before), model.cfg) == (
            adapter_shapes(model.lora, model.cfg)
        )
    except UserError:
        return False


def describe(
    config: TrainConfig, model: Model, data: Data, state: State, batches: Batches, steps: int
) -> None:
    """The few lines a reader wants before the first step."""
    cfg = model.cfg
    trained, frozen = state.trainable.buffer.numel(), sum(count(w) for w in model.frozen.values())
    share = trained / (trained + frozen)
    say(
        f"model   {config.model}: {cfg.num_hidden_layers} layers, hidden {cfg.hidden_size}, "
        f"{trained + frozen:,} parameters, {trained:,} trained ({share:.2%}), "
        f"{str(model.compute.dtype).removeprefix('torch.')} on {model.device}"
    )
    packed = [w for w in model.frozen.values() if isinstance(w, NF4Weight)]
    if packed:
        kinds = "/".join(sorted({w.quant_type for w in packed}))
        mib = sum(w.nbytes() for w in packed) / 2**20
        say(
            f"        {len(packed)} frozen linears in 4 bits ({kinds}), {mib:,.1f} MiB "
            "(--no-load-in-4bit keeps them in full)"
        )
    elif config.full_finetuning:
        say("        every weight is trained, in float32: --load-in-4bit is off")
    if config.dry_run:
        say(f"        {model.directory}: every tensor's header agrees with config.json; not loaded")
    else:
        say(f"        loaded in {model.load_seconds:.1f} s, peak {model.load_peak_gib:.2f} GiB")
    for name in ("config.json", "tokenizer_config.json"):
        raw = load_json(path) if (path := model.directory / name).exists() else {}
        if isinstance(raw, dict) and raw.get("auto_map"):
            say(f"warning: {name} has an auto_map; no code that comes with a model is run")
    if model.lora and model.lora.modules_to_save:
        names = ", ".join(model.lora.modules_to_save)
        tied = " (tied: one matrix)" if cfg.tie_word_embeddings else ""
        say(f"        trained copies beside the adapter: {names}{tied}")
    for what, dataset in (("data", data.train), ("eval", data.eval)):
        if dataset is not None:
            for line in describe_data(what, dataset.stats):
                say(line)
            if config.dry_run and is_sample(dataset):
                of_all = sum(told["rows_total"] for told in dataset.stats["sources"])
                say(f"        (a sample of {of_all:,} rows)")
    if data.eval is not None and (shared := num_shared(data.train, data.eval)):
        say(f"warning: {shared:,} of {len(data.eval):,} eval rows are among the training rows")
    for told, (size, drawn) in zip(
        data.train.stats["sources"], batches.schedule.shares, strict=False
    ):
        say(f"        {told['source']}: {drawn:,} rows an epoch, of {size:,}")
    show_preview(data.train, model.tokenizer, config.preview, config.preview_json, say)
    if model.lora:
        described = adapter_config_dict(
            plain_lora(model.lora), cfg, config.base_name, tied=cfg.tie_word_embeddings,
            revision=None,
        )  # fmt: skip
        for problem in vllm_problems(described):
            say(f"warning: vLLM will not take this adapter as it is ({problem}); merge it first")
    schedule = batches.schedule
    about = "about " if config.dry_run and is_sample(data.train) else ""
    say(
        f"steps   {about}{steps} ({about}{schedule.steps_per_epoch} an epoch), "
        f"{schedule.batch_size} x {schedule.accumulation} rows each, "
        f"learning rate {config.learning_rate:g} {config.lr_scheduler_type}, "
        f"output {config.output_dir}"
    )
    say(f"settings {as_flags(config)}")
    if schedule.num_rows < schedule.batch_size * schedule.accumulation:
        say(f"warning: {schedule.num_rows} rows do not fill one step; every step is shorter")


def without_effect(
    config: TrainConfig, choice: Choice, trainable: Flat, data: Data
) -> Iterator[tuple[str, str]]:
    """(name, why) of each setting that was given and that this run makes no use of.

    What the settings alone tell is refused (`TrainConfig`), unless Trainer takes the pair.
    """
    idle = []
    if not choice.peak_bytes:
        why = f"only the explicit pass on a GPU is planned by it, and this is {choice.said}"
        idle += [("micro_batch_tokens", why), ("max_memory_gib", why)]
    unread = {"sgd": ("adam_beta1", "adam_beta2", "adam_epsilon"), "lion_8bit": ("adam_epsilon",)}
    unread["adafactor"] = unread["sgd"]
    idle += [(name, f"--optim {config.optim} has none") for name in unread.get(config.optim, ())]
    if not any(name in trainable.views for name in EMBEDDING_WEIGHTS):
        idle.append(("embedding_learning_rate", "no embedding and no head is trained in full"))
    if config.max_steps > 0:
        idle.append(("num_train_epochs", f"--max-steps {config.max_steps} is given"))
    if config.save_strategy == "no":
        idle.append(("save_total_limit", "--save-strategy no writes no checkpoints"))
    if config.report_to == ("trackio",):
        idle.append(("logging_dir", "trackio has its own"))
    sources = data.train.stats["sources"] + (data.eval.stats["sources"] if data.eval else [])
    if all(told["format"] != "text" for told in sources):
        idle.append(("dataset_text_field", "no rows are of the format text"))
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return ((name, why) for name, why in idle if getattr(config, name) != defaults[name])


def end_of_dry_run(
    model: Model, data: Data, batches: Batches, steps: int, needs: Needs
) -> TrainOutput:
    """The last lines of a dry run, and its estimates: total_steps, num_rows, memory_gib."""
    if model.device.type == "cpu":  # what the process takes as it is counts there
        needs = {"this process as it is": memory_gib(model.device), **needs}
    say(f"memory  about {sum(needs.values()):.2f} GiB: {in_words(needs)}")
    say("dry run: nothing was trained and nothing written to the output directory")
    metrics = {
        "total_steps": steps,
        "num_rows": batches.schedule.num_rows,
        "memory_gib": needs,
        "data": data.train.stats,
        "model_directory": str(model.directory),
    }
    return TrainOutput(0, math.nan, metrics)


def count(weight: Tensor | NF4Weight) -> int:
    """How many numbers a weight has."""
    return math.prod(weight.shape)


def save(
    out: Path,
    state: State,
    config: TrainConfig,
    model: Model,
    facts: dict[str, Any],
    report: Reporter,
) -> None:
    """One complete checkpoint, then rotation."""
    report.sync()

    def write_model(directory: Path) -> None:
        write_trained(
            directory, state.trainable, model.lora, model.cfg, config.base_name, config.revision,
            config.serves_in_4bit, model.start,
        )  # fmt: skip

    then = {"config": plain_config(config), "evaluated": report.has_evaluation(state.step)}
    save_checkpoint(out, state, write_model, {**then, **facts})
    rotate(out, config.save_total_limit, state.best_step)


def save_due(config: TrainConfig, state: State, schedule: Schedule, best: bool, end: bool) -> bool:
    """Whether --save-strategy asks for a checkpoint after this step, the best or the last one."""
    if config.save_strategy == "no":
        return False
    every = schedule.steps_per_epoch if config.save_strategy == "epoch" else config.save_steps
    periodic = config.save_strategy != "best" and state.step % every == 0
    return end or periodic or (best and config.keeps_best)


# ---------------------------------------------------------------------------------- after the loop


def take_best_(
    state: State, out: Path, config: TrainConfig, model: Model, total_steps: int, report: Reporter
) -> None:
    """What the evaluations decided: with --load-best-model-at-end, the best one's weights."""
    name, value = config.best_metric[0], state.best_value
    if state.step < total_steps:
        report.say(
            f"stopped early after step {state.step}: {state.evaluations_since_best} evaluations "
            f"in a row were no better than step {state.best_step}'s {name} {value:.4f}"
        )
    if config.load_best_model_at_end and state.best_step not in (0, state.step):
        best = out / f"checkpoint-{state.best_step}"
        load_trained_(best, state, *trained_file(model.lora), model.start)
        report.say(f"best: step {state.best_step}, {name} {value:.4f}; its weights are the result")


def closing_metrics(
    state: State, epoch: float, first: int, seconds: float, before: dict, after: dict
) -> dict[str, Any]:
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
    if state.best_step:
        names = ("best_step", "best_value", "evaluations_since_best")
        metrics |= {name: getattr(state, name) for name in names}
    if "answers" in after and "answers" in before:
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
    out: Path, config: TrainConfig, model: Model, data: Data, state: State, metrics: dict[str, Any]
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
        config.serves_in_4bit,
        model.start,
        facts,
    )


def save_merged(out: Path, device: torch.device) -> None:
    """The adapter of `out` merged into its base, in out/merged."""
    shutil.rmtree(out / "merged", ignore_errors=True)
    say(f"{out / 'merged'}: {merge(out, out / 'merged', device=str(device))}")


def finish(
    out: Path, state: State, metrics: dict[str, Any], config: TrainConfig, model: Model
) -> TrainOutput:
    """train_output.json, written last: it marks the run as complete."""
    loss = metrics["train_loss"]
    result = {
        "global_step": state.step,
        "training_loss": loss,
        "metrics": metrics,
    }
    write_json(out / OUTPUT, result)
    for sample in metrics.get("samples", [])[:5]:
        prompt, before, after = (shorten(sample[k]) for k in ("prompt", "before", "after"))
        say(f"  {prompt}\n    before: {before}\n    after:  {after}")
    if "right_after" in metrics:
        say(
            f"right answers: {metrics['right_before']} of {metrics['answers']} before, "
            f"{metrics['right_after']} after"
        )
    if metrics.get("eval_loss_before") is not None:
        say(
            f"eval loss: {metrics['eval_loss_before']:.4f} before, {metrics['eval_loss']:.4f} after"
        )
    total = ""
    if model.device.type == "cuda":
        gib = torch.cuda.get_device_properties(model.device).total_memory / 2**30
        total = f" of {gib:.2f} GiB"
    say(
        f"memory  {metrics['memory_before_gib']:.2f} GiB allocated before training, "
        f"{metrics['memory_after_gib']:.2f} after, peak {metrics['peak_memory_gib']:.2f}{total}"
    )
    say(
        f"time    {metrics['train_runtime']:.1f} s, "
        f"{metrics['train_steps_per_second']:.2f} steps/s, "
        f"{metrics['train_tokens_per_second']:,.0f} tokens/s"
    )
    say(f"done: {state.step} steps, mean loss {loss:.4f}; saved to {out}")
    if config.lora and config.lora.splits_weights:
        where = " in 4 bits; load it on the base in 16 bits, which is nearest"
        say(
            "the adapter file holds the change from the base, at twice the rank; it was trained "
            f"beside the rest of each weight{where if config.load_in_4bit else ''}"
        )
    adapter = None if config.full_finetuning else read_adapter_config(out)
    dtype = str(model.compute.dtype).removeprefix("torch.")
    stored_so = "quantization_config" in load_json(model.directory / "config.json")
    quantized = config.serves_in_4bit and not stored_so
    for line in commands(out, config.base_name, adapter, dtype if quantized else None):
        say(line)
    return TrainOutput(state.step, loss, metrics)


def shorten(text: str, width: int = 90) -> str:
    """One quoted line of at most `width` characters."""
    return repr(text if len(text) <= width else text[: width - 1] + "…")
