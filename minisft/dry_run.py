"""What a dry run reads of the rows: a sample of each source, and what it tells of the whole."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from minisft.config import TrainConfig
from minisft.report import say
from minisft.sources import load_eval, load_train
from minisft.tokenizer import Tokenizer
from minisft.tokens import TokenizedDataset

SAMPLE_ROWS = 1000  # of each source


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
