"""`train(config)` runs a fine-tuning from the settings to the exported result, phase by phase."""

import time
from collections.abc import Iterator

import torch

from minisft.batches import Ahead, Batches, RowSchedule, source_shares
from minisft.config.train import TrainConfig
from minisft.data.collator import BatchFn, Collator
from minisft.data.load import Data, check_rows, collated, estimated_rows, load_data
from minisft.explicit import choose
from minisft.files.device import memory_gib
from minisft.files.load import Base, find_base, load_base
from minisft.lora import param_groups
from minisft.schedules import lr_factor
from minisft.session.context import Numbers, Run, session
from minisft.session.describe import announce, end_of_dry_run, note_memory_needs
from minisft.session.evaluate import evaluate_after, evaluate_before, evaluate_if_due, stops_early
from minisft.session.finish import finish, take_best_
from minisft.session.guards import TrainingStopped, check_changed, check_run, reason_to_stop, trace
from minisft.session.memory import resident_gib
from minisft.session.outputs import TrainOutput, base_digests
from minisft.session.record import go_on, log_step_, save, save_due, start_over
from minisft.session.report import reporting, say
from minisft.session.resume import finished_before, resume_, saved_initial_lora
from minisft.session.signals import Preempted
from minisft.step import ExecutionPlan, State, StepResult, train_step_
from minisft.text.tokenizer import load_tokenizer


def train(config: TrainConfig, batch_fn: BatchFn | None = None) -> TrainOutput:
    """Fine-tune a model as configured, write all outputs to config.output_dir, return the result.

    batch_fn: a data collator (`minisft.data.collator.BatchFn`) for the rows of every micro-batch.
    Raises UserError for errors that the user can fix, TrainingStopped if a guard ends training,
    Preempted after SIGTERM or SIGINT once a checkpoint is written. If config.output_dir holds this
    run, completed, its result is returned and nothing is written. With dry_run, weights have shapes
    but no values, a sample of the rows is read, nothing is written, and the metrics are estimates.
    """
    with session(config) as (out, stop, needs):
        if (done := finished_before(out, config)) is not None:
            return done
        directory = find_base(config)
        tokenizer = load_tokenizer(directory, chat_template=config.chat_template)
        base, state = load_base(config, saved_initial_lora(out, config), directory)
        collator = None if batch_fn is None else Collator(batch_fn, base.cfg.vocab_size)
        data = load_data(config, tokenizer, base.cfg.vocab_size, out, say)
        data = collated(data, config, collator)
        # A library may have caught the exception that a signal raised: raise it again.
        stop.raise_if_asked()
        plan = make_plan(config, base, state, data)
        batches = make_batches(config, data, base, plan, collator)
        facts = {"data_hash": data.hash, **base_digests(base.directory)}
        run = Run(config, out, stop, needs, tokenizer, base, state, data, plan, batches, facts)
        # From here run.base is the only reference, so that `finish` can free the frozen weights.
        del base
        note_memory_needs(run)
        resume_(run)
        check_run(run)
        announce(run)
        if config.dry_run:
            return end_of_dry_run(run)
        start_over(run)
        with reporting(config, out, run.total_steps, state.step, run.evaluated) as run.report:
            before = evaluate_before(run)
            # If a signal or a kill interrupted the evaluation of the resumed step, evaluate now. A
            # run resumed from another directory has no checkpoint of that step: save one.
            if evaluate_if_due(run) and not (out / f"checkpoint-{state.step}").exists():
                save(run)
            numbers = train_(run)
            exported_step = take_best_(run)
            after = evaluate_after(run, exported_step)
        return finish(run, numbers, before, after)


def make_plan(config: TrainConfig, base: Base, state: State, data: Data) -> ExecutionPlan:
    """Choose how gradients are computed and the micro-batch size. Raises UserError as `choose`."""
    check_rows(config, data)
    longest = int(data.train.row_lengths.max())
    # A dry run has not loaded the weights: subtract their size from the free memory.
    to_load = sum(resident_gib(base, state).values()) * 2**30 if config.dry_run else 0
    choice = choose(
        config, state.trainable, base.frozen, base.compute, longest, base.device, int(to_load)
    )
    return ExecutionPlan(base.compute, choice)


def make_batches(
    config: TrainConfig, data: Data, base: Base, plan: ExecutionPlan, collator: Collator | None
) -> Batches:
    """Return the Batches that build the tensors of each step, in the order set by config.seed."""
    assert plan.choice is not None
    rows = [source["rows"] for source in data.train.stats["sources"]]
    rows = estimated_rows(data.train) if config.dry_run else rows
    schedule = RowSchedule(
        num_rows=sum(rows),
        batch_size=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        seed=config.seed,
        shares=source_shares(rows, [weight for _, weight in config.sources]),
    )
    return Batches(
        data.train,
        schedule,
        max_tokens=plan.choice.tokens,
        # The hand-written pass pads batches on the CPU and copies them into CUDA graph inputs.
        device=torch.device("cpu") if plan.choice.explicit else base.device,
        # A user's collator may not be safe to call from another thread.
        ahead=base.device.type == "cuda" and collator is None,
        dropout=config.lora_dropout > 0 or config.neftune_noise_alpha > 0,
        collate=collator,
    )


def train_(run: Run) -> Numbers:
    """Train to the last step, evaluating and saving when due. Raises Preempted, TrainingStopped."""
    state, stop = run.state, run.stop
    started, first, tokens = time.perf_counter(), state.step, state.num_tokens
    memory, untrained = memory_gib(run.base.device), trace(state)
    # Defer signals until the end of the current step, so that no step is lost.
    with stop.held():
        for result in steps_(run):
            best = False
            if not stop.name:
                with stop.breakable():
                    best = evaluate_if_due(run)
            end = state.step == run.total_steps or stops_early(state, run.config)
            if stop.name or save_due(run, best, end):
                save(run)
            if stop.name and not end:
                raise Preempted(
                    f"{stop.name}: stopped after step {state.step}, loss {result.loss:.4f}; "
                    f"{go_on(state.step)}"
                )
    check_changed(run, first, untrained)
    seconds = time.perf_counter() - started
    kept = run.config.save_strategy != "no"
    saved = go_on(state.step) if kept else "no checkpoint is kept (--save-strategy no)"
    stop.where = f"after the last step; {saved}"
    return Numbers(state.step - first, state.num_tokens - tokens, seconds, memory)


def steps_(run: Run) -> Iterator[StepResult]:
    """Train from state.step to the last step; yield after each step, log every logging_steps."""
    state, base, config = run.state, run.base, run.config
    plan = run.plan.prepared(state.trainable, base.frozen)
    groups = param_groups(state.trainable.shapes, config)
    last = run.total_steps
    ahead = Ahead(run.batches, state.step, last)
    # Check before the first step too: a resumed run may already have met the stopping criterion.
    while state.step < last and not stops_early(state, config):
        started = time.perf_counter()
        batch = ahead.batch(state.step)
        factor = lr_factor(state.step, last, config)
        result = train_step_(state, base.frozen, batch, plan, groups, config, factor)
        reason = reason_to_stop(run, result, batch.rows)
        seconds = time.perf_counter() - started
        state.unlogged.append((result.loss, batch.num_tokens, batch.num_loss_tokens, seconds))
        if state.step % config.logging_steps == 0 or state.step == last or reason:
            log_step_(run, result.grad_norm, batch.epoch, groups, factor)
        if reason:
            raise TrainingStopped(reason)
        yield result
