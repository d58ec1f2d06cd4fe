"""The rows of a run: all of them, or what a dry run reads of each source."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.batches import Batches, Collator, TokenizedDataset, collate, cut_by_tokens
from minisft.config.errors import UserError
from minisft.config.train import TrainConfig
from minisft.data.sources import load_eval, load_train
from minisft.data.token_files import data_hash
from minisft.session.report import say
from minisft.text.tokenizer import Tokenizer

SAMPLE_ROWS = 1000  # of each source
_STEPS_LOOKED_AT = 200  # for the size of their micro-batches


@dataclass(frozen=True)
class Data:
    """The tokenised rows of a run, and what identifies them."""

    train: TokenizedDataset
    eval: TokenizedDataset | None
    hash: str  # "" of a sample

    def record(self) -> dict[str, Any]:
        """What run.json says of the data."""
        return {"data": self.train.stats, "eval_data": self.eval.stats if self.eval else None}


def load_data(config: TrainConfig, tokenizer: Tokenizer, vocab_size: int, out: Path) -> Data:
    """Read, render, tokenise and (with --packing) pack the rows; UserError if none is trained."""
    given = (config, tokenizer, vocab_size)
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


def load_sample(
    config: TrainConfig, tokenizer: Tokenizer, vocab_size: int
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """The first rows to train and to evaluate on, as many as --preview shows at least.

    Raises UserError as `load_train` and `load_eval`; nothing goes to the output directory.
    """
    given = (config, tokenizer, vocab_size)
    scratch = Path(tempfile.gettempdir())
    asked = config.preview if config.preview or not config.preview_json else None  # None: all
    limit = None if asked is None else max(SAMPLE_ROWS, asked)
    train = load_train(*given, scratch=scratch, limit=limit, say=say)
    if is_sample(train) and asked is not None and len(train) < asked:
        train = load_train(*given, scratch=scratch, say=say)
    return train, load_eval(*given, scratch=scratch, limit=SAMPLE_ROWS, say=say)


def is_sample(dataset: TokenizedDataset) -> bool:
    """Whether there are rows that were not read."""
    return any(told["rows_read"] < told["rows_total"] for told in dataset.stats["sources"])


def estimated_rows(dataset: TokenizedDataset, what: str = "rows") -> list[int]:
    """Rows of each source once all of it is read; `rows_kept`: before they are packed."""
    return [
        math.ceil(told[what] * told["rows_total"] / max(1, told["rows_read"]))
        for told in dataset.stats["sources"]
    ]


def most_tokens(data: Data, batches: Batches, steps: int) -> int:
    """Tokens of the largest micro-batch of the first steps, of the rows at hand."""
    schedule = dataclasses.replace(batches.schedule, num_rows=len(data.train), shares=())
    lengths = data.train.row_lengths
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
