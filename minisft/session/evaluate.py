"""Evaluation before, during and after training: metrics, greedy answers, choice of best step."""

import math
import time
from collections.abc import Iterator
from itertools import groupby
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
from minisft.loss import evaluation
from minisft.session.context import Run
from minisft.session.generate import InferenceModel, generate, stop_ids
from minisft.session.report import say
from minisft.step import State
from minisft.text.encoding import decode
from minisft.text.tokenizer import Tokenizer

STEP0 = "step0.json"  # metrics and answers before training, for a resumed run to compare with


def evaluate(run: Run, dataset: TokenizedDataset) -> dict[str, float]:
    """Returns mean loss, accuracy and entropy over a dataset's trained tokens, their count, times.

    Every token has the same weight, so the numbers do not depend on the batch size. (Trainer's
    eval_loss does, because it averages the means of batches.)
    """
    base, started = run.base, time.perf_counter()
    batches = eval_batches(dataset, eval_tokens(run.config), base.device)
    found = evaluation(run.state.trainable.views, base.frozen, batches, base.compute)
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
    """Yield the rows of a dataset in order, packed into batches of at most max_tokens tokens."""
    lengths = dataset.row_lengths.tolist()
    for rows in cut_by_tokens(list(range(len(dataset))), lengths, max_tokens):
        yield make_micro_batch(dataset, rows, device)


def eval_tokens(config: TrainConfig) -> int:
    """Returns the maximum number of tokens in an evaluation batch."""
    rows = config.per_device_eval_batch_size or config.per_device_train_batch_size
    # Limit to 8192: above a few thousand tokens, larger batches are not faster.
    return min(rows * config.max_length, 8192)


def most_eval_tokens(dataset: TokenizedDataset, config: TrainConfig) -> int:
    """Returns the number of tokens in the largest evaluation batch of a dataset."""
    # Pass the lengths as the rows too, so that each batch is a list of lengths to sum.
    lengths = dataset.row_lengths.tolist()
    return max(map(sum, cut_by_tokens(lengths, lengths, eval_tokens(config))))


def evaluate_now(run: Run, step: int) -> dict[str, Any]:
    """Evaluate the weights of `step`, now loaded; log and return metrics and greedy `answers`."""
    assert run.data.eval is not None
    epoch = run.batches.schedule.epoch_after(step - 1)
    metrics: dict[str, Any] = dict(evaluate(run, run.data.eval))
    answers = answer(run, run.config.eval_generate) if run.config.eval_generate else []
    run.report.evaluation({"step": step, "epoch": epoch, **metrics}, answers)
    return metrics | ({"answers": answers} if answers else {})


def evaluate_before(run: Run) -> dict[str, Any]:
    """Returns metrics and answers of the untrained model; a resumed run reads step0.json."""
    if run.data.eval is None:
        return {}
    before, rows = read_before(run), data_hash(run.data.eval)
    if run.state.step == 0:
        before = evaluate_now(run, 0)
        write_json(run.out / STEP0, before | {"rows": rows})
    elif before.get("rows", rows) != rows:
        other = f"warning: {STEP0} was computed on other eval rows"
        say(f"{other}: no comparison with the untrained model")
        return {}
    return before


def read_before(run: Run) -> dict[str, Any]:
    """Returns the content of step0.json in a resumed run, else {}; UserError if it is damaged."""
    file = run.out / STEP0
    before = load_json(file) if run.state.step and file.exists() else {}
    if not isinstance(before, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(before).__name__}; remove it")
    return before


def evaluate_if_due(run: Run) -> bool:
    """Evaluate if --eval-strategy requires it after this step; returns True for a new best."""
    config, step = run.config, run.state.step
    every = config.eval_steps or config.logging_steps
    if config.eval_strategy == "epoch":
        every = run.batches.schedule.steps_per_epoch
    # The last step is evaluated after the loop anyway; here only if it can become the best.
    due = step % every == 0 and (config.keeps_best or step < run.total_steps)
    done = step in run.report.evaluations
    if run.data.eval is None or config.eval_strategy == "no" or done or not due:
        return False
    return note_evaluation_(run.state, evaluate_now(run, step), config)


def note_evaluation_(state: State, metrics: dict[str, Any], config: TrainConfig) -> bool:
    """Update the best evaluation and the early-stopping count; returns True for a new best.

    As in Trainer, any strictly better value is a new best, but only a gain above
    config.early_stopping_threshold resets the early-stopping count.
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
    """Returns True if evaluations without improvement have reached --early-stopping-patience."""
    return 0 < config.early_stopping_patience <= state.evaluations_since_best


def evaluate_after(run: Run, step: int) -> dict[str, Any]:
    """Returns metrics and answers of the weights to be exported, which are those after `step`.

    Reuses an earlier evaluation of that step if it is complete and on the same eval rows.
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
    return evaluate_now(run, step)


def answer(run: Run, count: int) -> list[dict[str, Any]]:
    """Generate greedy answers to the first `count` eval prompts; returns a dict for each."""
    assert run.data.eval is not None
    base, tokenizer = run.base, run.tokenizer
    prompts, expected = eval_prompts(run.data.eval, count)
    stops = stop_ids(tokenizer, base.cfg)
    model = InferenceModel(run.state.trainable.views, base.frozen, base.compute, base.device)
    # Limit the length, because a model that has not learned to stop never emits a stop id.
    new_tokens = 2 * max(map(len, expected)) + 2
    answers = generate(model, prompts, max_new_tokens=new_tokens, stop_ids=stops)

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
        for p, e, a in zip(prompts, expected, answers, strict=True)
    ]


def eval_prompts(dataset: TokenizedDataset, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Returns (prompts, expected answers) of the first `count` rows, as token ids.

    A row's prompt is all tokens before its first trained token. Its expected answer is the first
    consecutive run of trained tokens (in a chat: the first trained turn). Raises UserError for a
    row that has no prompt.
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
    """Returns a prompt's longest text between special tokens, usually the user's message."""
    special = {i for i, t in tokenizer.backend.get_added_tokens_decoder().items() if t.special}
    texts = [list(g) for is_special, g in groupby(ids, special.__contains__) if not is_special]
    longest = max(texts, key=len, default=[])
    return decode(tokenizer, longest, skip_special_tokens=True).strip()
