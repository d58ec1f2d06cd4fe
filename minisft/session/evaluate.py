"""Eval metrics and greedy answers before, during and after training; which evaluation is best."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from minisft.batches import (
    IGNORED,
    MicroBatch,
    TokenizedDataset,
    cut_by_tokens,
    make_micro_batch,
    trained_per_row,
)
from minisft.config.errors import UserError
from minisft.config.train import EVAL_METRICS, TrainConfig
from minisft.data.token_files import data_hash
from minisft.files.disk import load_json, write_json
from minisft.files.load import Base
from minisft.loss import evaluation
from minisft.session.context import Run
from minisft.session.generate import Sampling, generate, stop_ids
from minisft.step import State
from minisft.text.encoding import decode
from minisft.text.tokenizer import Tokenizer

STEP0 = "step0.json"  # eval loss and answers before training


def evaluate(
    base: Base, state: State, dataset: TokenizedDataset, config: TrainConfig
) -> dict[str, float]:
    """Loss, mean token accuracy and entropy, each a mean over the trained tokens of a dataset.

    Trainer's eval_loss is a mean over batches weighted by their rows; this one weighs every token
    alike, so the batch size does not change it.
    """
    started = time.perf_counter()
    batches = eval_batches(dataset, eval_tokens(config), base.device)
    found = evaluation(state.trainable.views, base.frozen, batches, base.compute)
    seconds = time.perf_counter() - started
    return {
        "eval_loss": found.loss,
        "eval_mean_token_accuracy": found.accuracy,
        "eval_entropy": found.entropy,
        "eval_num_loss_tokens": found.count,
        "eval_runtime": seconds,
        "eval_samples_per_second": len(dataset) / seconds,
    }


def eval_batches(
    dataset: TokenizedDataset, max_tokens: int, device: torch.device
) -> Iterator[MicroBatch]:
    """All rows in order, side by side, at most max_tokens at a time."""
    for rows in _cuts(dataset, max_tokens):
        yield make_micro_batch(dataset, rows, device)


def eval_tokens(config: TrainConfig) -> int:
    """At a time; more than some thousand gain no speed."""
    rows = config.per_device_eval_batch_size or config.per_device_train_batch_size
    return min(rows * config.max_length, 8192)


def most_eval_tokens(dataset: TokenizedDataset | None, config: TrainConfig) -> int:
    """Tokens of the largest batch of an evaluation; 0 without eval rows."""
    if dataset is None:
        return 0
    lengths = dataset.row_lengths
    return max(int(lengths[rows].sum()) for rows in _cuts(dataset, eval_tokens(config)))


def _cuts(dataset: TokenizedDataset, max_tokens: int) -> list[list[int]]:
    return cut_by_tokens(list(range(len(dataset))), dataset.row_lengths.tolist(), max_tokens)


def evaluate_now(run: Run, step: int, epoch: float) -> dict[str, Any]:
    """Evaluate the trained tensors, which are those after `step`; report and return the metrics.

    With --eval-generate also `answers`, the greedy answers to the eval prompts.
    """
    assert run.data.eval is not None
    metrics: dict[str, Any] = dict(evaluate(run.base, run.state, run.data.eval, run.config))
    answers = answer(run, run.config.eval_generate) if run.config.eval_generate else []
    run.report.evaluation({"step": step, "epoch": epoch, **metrics}, answers)
    return metrics | ({"answers": answers} if answers else {})


def evaluate_before(run: Run) -> dict[str, Any]:
    """Metrics and answers of the untrained model; a resumed run reads those of its first start."""
    if run.data.eval is None:
        return {}
    rows = data_hash(run.data.eval)
    if run.state.step > 0:
        before = _read_before(run.out / STEP0)
        if before.get("rows", rows) == rows:
            return before
        run.report.say(
            f"warning: {STEP0} is of other eval rows: no comparison with the untrained model"
        )
        return {}
    before = evaluate_now(run, 0, 0.0)
    write_json(run.out / STEP0, before | {"rows": rows})
    return before


def _read_before(file: Path) -> dict[str, Any]:
    before = load_json(file) if file.exists() else {}
    if not isinstance(before, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(before).__name__}; remove it")
    return before


def check_evaluation(run: Run) -> None:
    """Raises UserError for what would stop the first evaluation, before anything is written."""
    dataset = run.data.eval
    if dataset is not None and run.config.eval_generate:
        eval_prompts(dataset, run.config.eval_generate)
    if dataset is not None and run.state.step > 0:
        _read_before(run.out / STEP0)


def evaluate_if_due(run: Run) -> bool:
    """Evaluate if --eval-strategy asks for it after this step; True if it is the best so far.

    The last step is evaluated after the loop, and here only if it may be the best. Called again
    after resuming, for an evaluation that a signal or a kill interrupted.
    """
    config, state, schedule = run.config, run.state, run.schedule
    done = state.step in run.report.evaluations
    if run.data.eval is None or config.eval_strategy == "no" or done:
        return False
    every = config.eval_steps or config.logging_steps
    if config.eval_strategy == "epoch":
        every = schedule.steps_per_epoch
    if (state.step == run.total_steps and not config.keeps_best) or state.step % every:
        return False
    metrics = evaluate_now(run, state.step, schedule.epoch_after(state.step - 1))
    return note_evaluation_(state, metrics, config)


def evaluate_missed(run: Run) -> bool:
    """After resuming, make the evaluation that was interrupted.

    Returns whether it is the best so far and its checkpoint is still to be saved: the checkpoint
    may lie in another directory, if it was resumed from there.
    """
    if not run.state.step or not evaluate_if_due(run):
        return False
    return not (run.out / f"checkpoint-{run.state.step}").exists()


def note_evaluation_(state: State, metrics: dict[str, Any], config: TrainConfig) -> bool:
    """Count an evaluation as the best so far (True) or not; for early stopping too.

    Better is strictly better than the best. Early stopping asks for more than its threshold.
    """
    name, greater = config.best_metric
    value, best = metrics[name], state.best_value
    gain = math.inf if best is None else (value - best if greater else best - value)
    gain = -math.inf if math.isnan(value) else gain
    better = gain > config.early_stopping_threshold
    state.evaluations_since_best = 0 if better else state.evaluations_since_best + 1
    if gain > 0:
        state.best_value, state.best_step = value, state.step
    return gain > 0


def stops_early(state: State, config: TrainConfig) -> bool:
    """Whether --early-stopping-patience is at its end."""
    return 0 < config.early_stopping_patience <= state.evaluations_since_best


def evaluate_after(run: Run, step: int) -> dict[str, Any]:
    """Metrics and answers of what is exported, the weights as they were after `step`.

    An evaluation of that step is not repeated, unless it was on other rows.
    """
    dataset = run.data.eval
    if dataset is None:
        return {}
    known = run.report.evaluations.get(step, {})
    numbers = (known.get(f"eval_{name}") for name in EVAL_METRICS)
    answered = len(known.get("answers", [])) == min(run.config.eval_generate, len(dataset))
    same_rows = known.get("eval_num_loss_tokens") == int(trained_per_row(dataset).sum())
    if same_rows and answered and all(isinstance(number, float) for number in numbers):
        return known
    return evaluate_now(run, step, run.schedule.epoch_after(step - 1))


def answer(run: Run, count: int) -> list[dict[str, Any]]:
    """Greedy answers to the first `count` eval prompts, beside the expected ones."""
    assert run.data.eval is not None
    base, tokenizer = run.base, run.tokenizer
    prompts, expected = eval_prompts(run.data.eval, count)
    stops = stop_ids(tokenizer, base.cfg)
    texts = generate(
        run.state.trainable.views,
        base.frozen,
        prompts,
        base.compute,
        max_new_tokens=2 * max(map(len, expected)) + 2,
        stop_ids=stops,
        sampling=Sampling(),
        device=base.device,
    )

    def text(ids: list[int]) -> str:
        return decode(tokenizer, ids, skip_special_tokens=True).strip()

    return [
        {
            "prompt": question(p, tokenizer),
            "expected": text(e),
            "answer": text(a),
            "right": text(a) == text(e),
            "stopped": a[-1] in stops,
        }
        for p, e, a in zip(prompts, expected, texts, strict=True)
    ]


def eval_prompts(dataset: TokenizedDataset, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, expected answers) of the first `count` rows, as token ids.

    The prompt of a row is its tokens up to the first trained label, the expected answer those from
    there that are trained without a gap: of a chat of several turns, the first one's.
    UserError for a row without a prompt.
    """
    prompts, expected = [], []
    for row in range(min(count, len(dataset))):
        start, stop = dataset.document_offsets[dataset.row_offsets[row : row + 2]].tolist()
        ids = dataset.input_ids[start:stop].tolist()
        trained = (dataset.labels[start:stop] != IGNORED).tolist()
        first = trained.index(True)
        end = trained.index(False, first) if False in trained[first:] else len(ids)
        if first == 0:
            raise UserError(
                "--eval-generate needs eval rows with a prompt and a completion; these rows are "
                "trained from their first token"
            )
        prompts.append(ids[:first])
        expected.append(ids[first:end])
    return prompts, expected


def question(ids: list[int], tokenizer: Tokenizer) -> str:
    """What a reader would call the prompt: its longest stretch of text between special tokens."""
    special = {i for i, t in tokenizer.backend.get_added_tokens_decoder().items() if t.special}
    stretches: list[list[int]] = [[]]
    for i in ids:
        if i in special:
            stretches.append([])
        else:
            stretches[-1].append(i)
    longest = max(stretches, key=len)
    return decode(tokenizer, longest, skip_special_tokens=True).strip()
