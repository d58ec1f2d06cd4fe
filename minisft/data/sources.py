"""The sources of a run to token arrays: read, checked against the model, tokenised or cached."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from minisft.batches import TokenizedDataset
from minisft.config.errors import UserError
from minisft.config.train import TrainConfig
from minisft.data.readers import Rows, read_rows, source_digest
from minisft.data.settings import Settings
from minisft.data.token_files import TokenWriter, check_cache, load_tokens
from minisft.data.tokenize import tokenize
from minisft.text.tokenizer import Tokenizer


def data_settings(config: TrainConfig, packing: bool) -> Settings:
    """Return the part of a run's settings that shapes the token arrays."""
    return Settings(
        format=None if config.dataset_format == "auto" else config.dataset_format,
        text_field=config.dataset_text_field,
        max_length=config.max_length,
        overlong=config.overlong,
        packing=config.packing_strategy if packing else None,
        completion_only_loss=config.completion_only_loss,
        assistant_only_loss=config.assistant_only_loss,
        instruction_part=config.instruction_part,
        response_part=config.response_part,
        skip_bad=config.skip_bad,
    )


def load_train(
    config: TrainConfig,
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    scratch: Path,
    limit: int | None = None,
    say: Callable[[str], None],
) -> TokenizedDataset:
    """Return all sources of --dataset as one TokenizedDataset, concatenated.

    scratch: a directory for tokens that do not fit in memory. limit: rows to read of each source.
    With --dataset-cache-dir, arrays that an earlier run made from the same input are loaded.
    vocab_size: rows of the embedding. say: prints a line. Raises UserError naming the source, and
    the malformed row.
    """
    names = [name for name, _ in config.sources]
    _check_vocabulary(tokenizer, vocab_size, names)
    settings = data_settings(config, config.packing)
    dataset = _load(names, config, tokenizer, settings, scratch, limit, say)
    for source in dataset.stats["sources"]:
        if not source["rows"]:
            raise UserError(
                f"{source['source']}: keeps none of its {source['rows_read']} rows; leave it out"
            )
    return _checked(dataset, vocab_size)


def load_eval(
    config: TrainConfig,
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    scratch: Path,
    limit: int | None = None,
    say: Callable[[str], None],
) -> TokenizedDataset | None:
    """Return the rows of --eval-dataset, not packed; None without one. Else as `load_train`."""
    if not config.eval_dataset:
        return None
    settings = data_settings(config, packing=False)
    dataset = _load([config.eval_dataset], config, tokenizer, settings, scratch, limit, say)
    return _checked(dataset, vocab_size)


def _load(
    names: list[str],
    config: TrainConfig,
    tokenizer: Tokenizer,
    settings: Settings,
    scratch: Path,
    limit: int | None,
    say: Callable[[str], None],
) -> TokenizedDataset:
    entry, cache = None, Path(config.dataset_cache_dir)
    if config.dataset_cache_dir:
        check_cache(cache)
    # A sample (limit) is never cached: its key would be that of all rows.
    if config.dataset_cache_dir and limit is None:
        entry = cache / cache_key(names, config, tokenizer, settings)
        if (found := load_tokens(entry)) is not None:
            say(f"tokenised rows of {', '.join(names)}: from {entry}")
            return found
    rows = [
        read_rows(
            name,
            split=config.dataset_split,
            columns=config.column_map,
            # Several sources, and eval rows, may have our column names already.
            columns_optional=len(names) > 1 or name == config.eval_dataset,
            skip_bad=config.skip_bad,
        )
        for name in names
    ]
    _check_renames(rows, config)
    writer = TokenWriter(scratch, entry)
    procs = config.dataset_num_proc
    return tokenize(rows, tokenizer, settings, writer=writer, num_proc=procs, limit=limit)


def _check_renames(sources: list[Rows], config: TrainConfig) -> None:
    """Raise UserError if none of several sources has the column of a rename."""
    for ours, theirs in config.column_map.items():
        if len(sources) > 1 and not any(ours in rows.renames for rows in sources):
            raise UserError(
                f"--columns {ours}={theirs}: none of {', '.join(r.source for r in sources)} has a "
                f"column {theirs!r}"
            )


def _check_vocabulary(tokenizer: Tokenizer, vocab_size: int, names: list[str]) -> None:
    """Raise UserError if the tokenizer has ids beyond the embedding, used by these rows or not."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    token, last = max(vocabulary.items(), key=lambda entry: entry[1], default=("", -1))
    if last >= vocab_size:
        raise UserError(
            f"{', '.join(names)}: the tokenizer's token {token!r} has id {last}, which does not "
            f"exist in the model, whose embedding has {vocab_size} rows; use the model's own "
            "tokenizer"
        )


def _checked(dataset: TokenizedDataset, vocab_size: int) -> TokenizedDataset:
    # Rows of token ids bypass the tokenizer. On a GPU such an id ends in a device assert.
    highest = dataset.stats["max_token_id"]
    if highest >= vocab_size:
        names = ", ".join(source["source"] for source in dataset.stats["sources"])
        raise UserError(
            f"{names}: token id {highest} does not exist in the model, whose embedding has "
            f"{vocab_size} rows; use the model's own tokenizer"
        )
    return dataset


def cache_key(
    names: list[str], config: TrainConfig, tokenizer: Tokenizer, settings: Settings
) -> str:
    """Return the SHA-256 (hex) of everything that shapes the token arrays, our code included."""
    code = hashlib.sha256()
    for room in ("text", "data"):
        files = (Path(__file__).parents[1] / room).rglob("*")
        for file in sorted(f for f in files if f.suffix in (".py", ".jinja")):
            code.update(file.read_bytes())
    templates = sorted(tokenizer.chat_templates.items())
    facts: dict[str, Any] = {
        "sources": [[source_digest(name, config.dataset_split), name] for name in names],
        "columns": sorted(config.column_map.items()),
        "settings": dataclasses.asdict(settings),
        "tokenizer": {n: hashlib.sha256(c).hexdigest() for n, c in tokenizer.files.items()},
        "special_tokens": tokenizer.special_tokens,
        "chat_templates": templates,
        "code": code.hexdigest(),
        "versions": {name: version(name) for name in ("tokenizers", "jinja2")},
    }
    if any("strftime_now" in text for _, text in templates):
        facts["day"] = str(datetime.date.today())  # the template writes it into the rows
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def num_shared(train: TokenizedDataset, other: TokenizedDataset) -> int:
    """Return how many documents of `other` are among the training documents, token for token."""
    if train.digests is None or other.digests is None:
        return 0
    return int(np.isin(other.digests.numpy(), train.digests.numpy()).sum())
