"""The datasets of a run: all rows, or in a dry run a sample of each source."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.batches import Batches, TokenizedDataset, cut_by_tokens
from minisft.config.errors import UserError
from minisft.config.train import TrainConfig
from minisft.data.collator import Collator
from minisft.data.sources import load_eval, load_train
from minisft.data.token_files import data_hash
from minisft.text.tokenizer import Tokenizer

SAMPLE_ROWS = 1000  # that a dry run reads of each source
_SAMPLE_STEPS = 200  # whose micro-batches are measured for the memory estimate


@dataclass(frozen=True)
class Data:
    """The tokenised datasets of a run, and the hash that identifies the training rows."""

    train: TokenizedDataset
    eval: TokenizedDataset | None
    hash: str  # "" of a sample

    def record(self) -> dict[str, Any]:
        """What run.json holds about the data."""
        return {"data": self.train.stats, "eval_data": self.eval.stats if self.eval else None}


def load_data(
    config: TrainConfig,
    tokenizer: Tokenizer,
    vocab_size: int,
    out: Path,
    say: Callable[[str], None],
) -> Data:
    """Read, render, tokenise and (with --packing) pack the rows of a run.

    vocab_size: rows of the embedding. out: directory for tokens that do not fit in memory; a dry
    run uses a temporary one. say: prints a line. Raises UserError if nothing is left to train.
    """
    given = (config, tokenizer, vocab_size)
    if config.dry_run:
        scratch = Path(tempfile.gettempdir())
        asked = config.preview if config.preview or not config.preview_json else None  # None: all
        limit = None if asked is None else max(SAMPLE_ROWS, asked)
        train_set = load_train(*given, scratch=scratch, limit=limit, say=say)
        # Packing makes fewer rows than it reads, and some may be dropped: then read all of them.
        if is_sample(train_set) and asked is not None and len(train_set) < asked:
            train_set = load_train(*given, scratch=scratch, say=say)
        eval_set = load_eval(*given, scratch=scratch, limit=SAMPLE_ROWS, say=say)
        if is_sample(train_set):
            return Data(train_set, eval_set, hash="")
    else:
        train_set = load_train(*given, scratch=out, say=say)
        eval_set = load_eval(*given, scratch=out, say=say)
    hash = data_hash(train_set)
    weights = [weight for _, weight in config.sources]
    # Weights change the order of the rows and nothing in the arrays, but a checkpoint of other
    # weights must not be resumed.
    if any(weights):
        hash = hashlib.sha256(f"{hash} {weights}".encode()).hexdigest()
    return Data(train_set, eval_set, hash)


def collated(data: Data, config: TrainConfig, collator: Collator | None) -> Data:
    """Return the data with its eval rows collated; training rows are collated step by step."""
    if collator is None:
        return data
    if config.packing:
        raise UserError("batch_fn takes rows as they are read; drop --packing")
    if data.eval is None:
        return data
    size = config.per_device_eval_batch_size or config.per_device_train_batch_size
    rows = list(range(len(data.eval)))
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    return dataclasses.replace(data, eval=collator(data.eval, batches))


def is_sample(dataset: TokenizedDataset) -> bool:
    """Return True if some rows of its sources were not read."""
    return any(source["rows_read"] < source["rows_total"] for source in dataset.stats["sources"])


def estimated_rows(dataset: TokenizedDataset, what: str = "rows") -> list[int]:
    """Estimate the rows of each source once all of it is read, from the share that is kept so far.

    what: "rows" of the result, or "rows_kept", before they are packed.
    """
    return [
        math.ceil(source[what] * source["rows_total"] / max(1, source["rows_read"]))
        for source in dataset.stats["sources"]
    ]


def most_tokens(data: Data, batches: Batches, steps: int) -> int:
    """Return the tokens of the largest micro-batch among the first steps, of the rows read."""
    schedule = dataclasses.replace(batches.schedule, num_rows=len(data.train), shares=())
    most = 0
    for step in range(min(steps, schedule.steps_per_epoch, _SAMPLE_STEPS)):
        rows = [row for batch in schedule.rows(step) for row in batch]
        lengths = data.train.row_lengths[rows].tolist()
        # The lengths stand for the rows: only their sums are wanted.
        cuts = cut_by_tokens(lengths, lengths, batches.max_tokens)
        most = max(most, *map(sum, cuts))
    return most


def check_rows(config: TrainConfig, data: Data) -> None:
    """Raise UserError if there are fewer rows, before packing, than one batch takes."""
    rows = data.train.stats["rows_kept"]
    if config.dry_run:
        rows = sum(estimated_rows(data.train, "rows_kept"))
    if rows < config.per_device_train_batch_size:
        raise UserError(
            f"{', '.join(config.dataset)}: {rows} rows do not fill one batch of "
            f"--per-device-train-batch-size {config.per_device_train_batch_size}; lower it, or "
            "give more rows"
        )
