"""Rows in memory to a TokenizedDataset, for tests of what rows become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minisft.batches import TokenizedDataset
from minisft.data.readers import Rows
from minisft.data.settings import Settings
from minisft.data.tokenize import tokenize
from minisft.text.encoding import encode_batch
from minisft.text.tokenizer import Tokenizer


def named_rows(records: Sequence[dict], source: str) -> Rows:
    """Dicts in memory as Rows; their columns are the union over all of them."""
    return Rows(source, records, tuple(dict.fromkeys(name for r in records for name in r)))


def tokenize_rows(
    rows: Rows | Sequence[dict], tokenizer: Tokenizer, *, source: str = "rows", **settings: Any
) -> TokenizedDataset:
    """`tokenize` for one source; a list of dicts is named by `source` in messages."""
    rows = rows if isinstance(rows, Rows) else named_rows(rows, source)
    return tokenize([rows], tokenizer, Settings(**settings))


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool
) -> list[list[int]]:
    """The ids of each text, encoded without spans."""
    given = [(text, None) for text in texts]
    return [ids for ids, _ in encode_batch(tokenizer, given, add_special_tokens=add_special_tokens)]
