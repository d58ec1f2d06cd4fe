"""Load the datasets of a run: read and tokenise them, or take them from a cache; check token ids.

A dry run reads only a sample of each source.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from minisft.batches import Batches, TokenizedDataset, cut_by_tokens
from minisft.config.errors import UserError
from minisft.config.train import TrainConfig
from minisft.data.collator import Collator
from minisft.data.readers import read_rows, source_digest
from minisft.data.settings import Settings
from minisft.data.token_files import TokenWriter, data_hash, load_tokens, writing_tokens
from minisft.data.tokenize import tokenize
from minisft.files.disk import check_writable
from minisft.text.tokenizer import Tokenizer

SAMPLE_ROWS = 1000  # that a dry run reads of each source
_SAMPLE_STEPS = 200  # whose micro-batches are measured for the memory estimate


@dataclass(frozen=True)
class Data:
    """The tokenised datasets of a run, and the hash that identifies the training rows."""

    train: TokenizedDataset
    eval: TokenizedDataset | None
    hash: str  # "" of a sample


def load_data(
    config: TrainConfig,
    tokenizer: Tokenizer,
    vocab_size: int,
    out: Path,
    say: Callable[[str], None],
) -> Data:
    """Read, render, tokenise and (with --packing) pack the rows of a run.

    vocab_size: rows of the embedding. out: directory for tokens that do not fit in memory; a dry
    run uses a temporary directory. say: prints a line. Raises UserError if no token is trained.
    """
    _check_vocabulary(config, tokenizer, vocab_size)
    scratch = Path(tempfile.gettempdir()) if config.dry_run else out
    load = functools.partial(load_rows, config, tokenizer, vocab_size, scratch=scratch, say=say)
    # --preview-json without --preview writes all rows to the file, so it needs more than a sample.
    sampled = config.dry_run and (config.preview or not config.preview_json)
    train_set = load(limit=max(SAMPLE_ROWS, config.preview) if sampled else None)
    # Packing merges rows and malformed rows may be dropped: if too few are left, read all rows.
    if is_sample(train_set) and len(train_set) < config.preview:
        train_set = load()
    eval_set = None
    if config.eval_dataset:
        eval_set = load(limit=SAMPLE_ROWS if config.dry_run else None, for_eval=True)
    if is_sample(train_set):
        return Data(train_set, eval_set, hash="")
    hash = data_hash(train_set)
    weights = [weight for _, weight in config.sources]
    # Source weights change only the order of the rows, not the arrays. They are hashed so that a
    # checkpoint from a run with other weights cannot be resumed.
    if any(weights):
        hash = hashlib.sha256(f"{hash} {weights}".encode()).hexdigest()
    return Data(train_set, eval_set, hash)


def _check_vocabulary(config: TrainConfig, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise UserError if any tokenizer id exceeds the embedding, even if no row uses that id."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    token, last = max(vocabulary.items(), key=lambda entry: entry[1], default=("", -1))
    if last >= vocab_size:
        raise UserError(
            f"{', '.join(name for name, _ in config.sources)}: the tokenizer's token {token!r} has "
            f"id {last}, which does not exist in the model, whose embedding has {vocab_size} rows; "
            "use the model's own tokenizer"
        )


def load_rows(
    config: TrainConfig,
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    scratch: Path,
    limit: int | None = None,
    say: Callable[[str], None],
    for_eval: bool = False,
) -> TokenizedDataset:
    """Tokenise all sources of --dataset and return them concatenated in one TokenizedDataset.

    for_eval: use --eval-dataset instead, without packing. scratch: a directory for tokens that do
    not fit in memory. limit: number of rows to read from each source. With --dataset-cache-dir,
    arrays that an earlier run cached for the same input are loaded. vocab_size: rows of the
    embedding. say: prints a line. Raises UserError naming the source, and the malformed row.
    """
    names = [config.eval_dataset] if for_eval else [name for name, _ in config.sources]
    settings = data_settings(config, config.packing and not for_eval)
    dataset = _load(names, config, tokenizer, settings, scratch, limit, say)
    for source in dataset.stats["sources"]:
        if not source["rows"]:
            raise UserError(
                f"{source['source']}: keeps none of its {source['rows_read']} rows; leave it out"
            )
    # A dataset of token ids bypasses the tokenizer; on a GPU, an id too large is a device assert.
    highest = dataset.stats["max_token_id"]
    if highest >= vocab_size:
        raise UserError(
            f"{', '.join(names)}: token id {highest} does not exist in the model, whose embedding "
            f"has {vocab_size} rows; use the model's own tokenizer"
        )
    return dataset


def _load(
    names: list[str],
    config: TrainConfig,
    tokenizer: Tokenizer,
    settings: Settings,
    scratch: Path,
    limit: int | None,
    say: Callable[[str], None],
) -> TokenizedDataset:
    entry = None
    if config.dataset_cache_dir:
        cache = Path(config.dataset_cache_dir)
        with writing_tokens(cache):
            check_writable(cache)
        # Do not cache a sample (limit): the cache key does not include the limit.
        entry = cache / cache_key(names, config, tokenizer, settings) if limit is None else None
    if entry is not None and (found := load_tokens(entry)) is not None:
        say(f"tokenised rows of {', '.join(names)}: from {entry}")
        return found
    sources = [
        read_rows(
            name,
            split=config.dataset_split,
            columns=config.column_map,
            # With several sources or an eval set, some may already use our column names.
            columns_optional=len(names) > 1 or name == config.eval_dataset,
            skip_bad=config.skip_bad,
        )
        for name in names
    ]
    for ours, theirs in config.column_map.items():
        if len(sources) > 1 and not any(ours in rows.renames for rows in sources):
            raise UserError(
                f"--columns {ours}={theirs}: none of {', '.join(names)} has a column {theirs!r}"
            )
    procs, writer = config.dataset_num_proc, TokenWriter(scratch, entry)
    return tokenize(sources, tokenizer, settings, writer=writer, num_proc=procs, limit=limit)


def data_settings(config: TrainConfig, packing: bool) -> Settings:
    """Return the settings of a run that affect the token arrays."""
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


def cache_key(
    names: list[str], config: TrainConfig, tokenizer: Tokenizer, settings: Settings
) -> str:
    """Return the SHA-256 (hex) of everything that affects the token arrays, including our code."""
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


def collated(data: Data, config: TrainConfig, collator: Collator | None) -> Data:
    """Apply batch_fn to the eval rows and return the data; training rows are collated per step."""
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
    """Return True if some rows of the dataset's sources were not read (a dry run's sample)."""
    return any(source["rows_read"] < source["rows_total"] for source in dataset.stats["sources"])


def estimated_rows(dataset: TokenizedDataset, what: str = "rows") -> list[int]:
    """Estimate the number of rows of each source if all of it were read, by scaling up the sample.

    what: "rows" counts rows of the result; "rows_kept" counts rows before packing.
    """
    return [
        math.ceil(source[what] * source["rows_total"] / max(1, source["rows_read"]))
        for source in dataset.stats["sources"]
    ]


def most_tokens(data: Data, batches: Batches, steps: int) -> int:
    """Return the tokens of the largest micro-batch in the first `steps` steps on the rows read."""
    schedule = dataclasses.replace(batches.schedule, num_rows=len(data.train), shares=())
    most = 0
    for step in range(min(steps, schedule.steps_per_epoch, _SAMPLE_STEPS)):
        rows = [row for batch in schedule.rows(step) for row in batch]
        lengths = data.train.row_lengths[rows].tolist()
        # Pass the lengths in place of the rows: only the sum of each micro-batch is needed.
        cuts = cut_by_tokens(lengths, lengths, batches.max_tokens)
        most = max(most, *map(sum, cuts))
    return most


def check_rows(config: TrainConfig, data: Data) -> None:
    """Raise UserError if the dataset has fewer rows, before packing, than one batch."""
    rows = sum(estimated_rows(data.train, "rows_kept"))
    if rows < config.per_device_train_batch_size:
        raise UserError(
            f"{', '.join(config.dataset)}: {rows} rows do not fill one batch of "
            f"--per-device-train-batch-size {config.per_device_train_batch_size}; lower it, or "
            "give more rows"
        )


def num_shared(train: TokenizedDataset, other: TokenizedDataset) -> int:
    """Return how many documents of `other` have the same tokens as some training document."""
    if train.digests is None or other.digests is None:
        return 0
    return int(np.isin(other.digests.numpy(), train.digests.numpy()).sum())
