"""Eval loss and greedy answers, before and after training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from minisft.batches import IGNORED, MicroBatch, Schedule, cut_by_tokens, make_micro_batch
from minisft.checkpoint import write_json
from minisft.config import TrainConfig, UserError, load_json
from minisft.data import TokenizedDataset
from minisft.generate import Sampling, generate, stop_ids
from minisft.model import Model
from minisft.report import Reporter
from minisft.step import State, mean_loss
from minisft.tokenizer import Tokenizer, decode

STEP0 = "step0.json"  # eval loss and answers before training


def evaluate(model: Model, state: State, dataset: TokenizedDataset, config: TrainConfig) -> float:
    """Mean loss per trained token over a dataset; no logits are kept, nothing is dropped out."""
    batches = eval_batches(
        dataset, config.per_device_train_batch_size * config.max_length, model.device
    )
    return mean_loss(state.trainable.views, model.frozen, batches, model.compute)[0]


def eval_batches(
    dataset: TokenizedDataset, max_tokens: int, device: torch.device
) -> Iterator[MicroBatch]:
    """All rows in order, side by side, at most max_tokens at a time."""
    lengths = dataset.document_offsets[dataset.row_offsets].diff().tolist()
    for rows in cut_by_tokens(list(range(len(dataset))), lengths, max_tokens):
        yield make_micro_batch(dataset, rows, device)


def evaluate_before(
    config: TrainConfig,
    model: Model,
    dataset: TokenizedDataset | None,
    state: State,
    out: Path,
    report: Reporter,
) -> dict[str, Any]:
    """Eval loss and answers of the untrained model; a resumed run reads what it then kept."""
    if dataset is None:
        return {}
    kept = out / STEP0
    if state.step > 0:
        before = load_json(kept) if kept.exists() else {}
        if not isinstance(before, dict):
            raise UserError(
                f"{kept}: expected a JSON object, found {type(before).__name__}; remove it"
            )
        return before
    loss = evaluate(model, state, dataset, config)
    report.evaluation({"step": state.step, "epoch": 0.0, "eval_loss": loss})
    before: dict[str, Any] = {"eval_loss": loss}
    if config.eval_generate:
        before["answers"] = answer(model, state, dataset, config.eval_generate)
    write_json(kept, before)
    return before


def evaluate_during(
    config: TrainConfig,
    model: Model,
    dataset: TokenizedDataset | None,
    state: State,
    schedule: Schedule,
    total_steps: int,
    report: Reporter,
) -> None:
    """Eval loss where --eval-strategy asks for one after this step (the last has its own).

    Called again after resuming, for the evaluation that a signal or a kill broke off.
    """
    if dataset is None or state.step == total_steps or config.eval_strategy == "no":
        return
    if report.has_evaluation(state.step):
        return
    every = config.eval_steps or config.logging_steps
    if config.eval_strategy == "epoch":
        every = schedule.steps_per_epoch
    if state.step % every == 0:
        loss = evaluate(model, state, dataset, config)
        epoch = schedule.epoch_after(state.step - 1)
        report.evaluation({"step": state.step, "epoch": epoch, "eval_loss": loss})


def evaluate_after(
    config: TrainConfig,
    model: Model,
    dataset: TokenizedDataset | None,
    state: State,
    epoch: float,
    report: Reporter,
) -> dict[str, Any]:
    """Eval loss and answers once training is done."""
    if dataset is None:
        return {}
    loss = evaluate(model, state, dataset, config)
    report.evaluation({"step": state.step, "epoch": epoch, "eval_loss": loss})
    after: dict[str, Any] = {"eval_loss": loss}
    if config.eval_generate:
        after["answers"] = answer(model, state, dataset, config.eval_generate)
    return after


def answer(
    model: Model, state: State, dataset: TokenizedDataset, count: int
) -> list[dict[str, Any]]:
    """Greedy answers to the first `count` eval prompts, beside what was expected.

    The prompt of a row is its tokens up to the first trained label, the expected answer the rest.
    """
    prompts, expected = [], []
    for row in range(min(count, len(dataset))):
        start, stop = dataset.document_offsets[dataset.row_offsets[row : row + 2]].tolist()
        ids = dataset.input_ids[start:stop].tolist()
        first = int((dataset.labels[start:stop] != IGNORED).nonzero()[0])
        if first == 0:
            raise UserError(
                "--eval-generate needs eval rows with a prompt and a completion; these rows are "
                "trained from their first token"
            )
        prompts.append(ids[:first])
        expected.append(ids[first:])
    stops = stop_ids(model.tokenizer, model.cfg)
    texts = generate(
        state.trainable.views,
        model.frozen,
        prompts,
        model.compute,
        max_new_tokens=2 * max(map(len, expected)) + 2,
        stop_ids=stops,
        sampling=Sampling(),
        device=model.device,
    )

    def text(ids: list[int]) -> str:
        return decode(model.tokenizer, ids, skip_special_tokens=True).strip()

    return [
        {
            "prompt": question(p, model.tokenizer),
            "expected": text(e),
            "answer": text(a),
            "right": text(a) == text(e),
            "stopped": a[-1] in stops,
        }
        for p, e, a in zip(prompts, expected, texts, strict=True)
    ]


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
