"""A run that stops before its first step: everything checked, nothing trained, nothing written."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

from minisft.batches import Schedule, source_shares
from minisft.config import TrainConfig
from minisft.lora import trainable_shapes
from minisft.memory import estimate
from minisft.model import open_base, resolve_device, resolve_dtype
from minisft.outputs import plain_config
from minisft.preview import describe_data, show_preview
from minisft.report import say
from minisft.sources import load_eval, load_train
from minisft.targets import split_targets
from minisft.tokenizer import load_tokenizer
from minisft.tokens import TokenizedDataset
from minisft.weights import resolve_model

SAMPLE_ROWS = 1000  # of each source


def dry_run(config: TrainConfig) -> dict[str, Any]:
    """Check settings, the headers of the weights, and a sample of the rows; print what would be.

    No weight is loaded and no GPU kernel runs. Returns the estimates: total_steps, memory_gib, and
    what the sample held. Raises UserError as the run itself would.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    directory = resolve_model(config.model, config.revision)
    cfg = open_base(directory, config).cfg
    shapes = trainable_shapes(None if config.lora is None else split_targets(config.lora), cfg)
    tokenizer = load_tokenizer(directory, chat_template=config.chat_template)
    say(f"settings {json.dumps(plain_config(config), sort_keys=True)}")
    trained = sum(math.prod(shape) for shape in shapes.values())
    total = sum(math.prod(shape) for shape in cfg.weight_shapes().values())
    total += 0 if config.full_finetuning else trained
    say(
        f"model   {config.model} ({directory}): {total:,} parameters, {trained:,} trained, "
        f"{str(dtype).removeprefix('torch.')} on {device}; every tensor's header agrees with "
        "config.json"
    )
    scratch = Path(tempfile.gettempdir())
    asked = config.preview if config.preview or not config.preview_json else None  # None: all
    limit = None if asked is None else max(SAMPLE_ROWS, asked)
    train = load_train(config, tokenizer, cfg.vocab_size, scratch=scratch, limit=limit, say=say)
    if _is_sample(train) and asked is not None and len(train) < asked:
        train = load_train(config, tokenizer, cfg.vocab_size, scratch=scratch, say=say)
    given = (config, tokenizer, cfg.vocab_size)
    evaluated = load_eval(*given, scratch=scratch, limit=SAMPLE_ROWS, say=say)
    for what, dataset in (("data", train), ("eval", evaluated)):
        if dataset is not None:
            for line in describe_data(what, dataset.stats):
                say(line)
            if _is_sample(dataset):
                of_all = sum(told["rows_total"] for told in dataset.stats["sources"])
                say(f"        (a sample of {of_all:,} rows)")
    rows = _estimated_rows(train)
    source_shares(rows, [weight for _, weight in config.sources])  # refuses what cannot be mixed
    schedule = Schedule(
        num_rows=sum(rows),
        batch_size=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        seed=config.seed,
    )
    steps = config.max_steps
    if steps < 1:
        steps = math.ceil(config.num_train_epochs * schedule.steps_per_epoch)
    about = "about " if _is_sample(train) else ""
    say(f"steps   {about}{steps:,} ({about}{schedule.steps_per_epoch:,} an epoch)")
    memory = estimate(config)
    parts = ", ".join(f"{what} {gib:.2f} GiB" for what, gib in memory.items())
    say(f"memory  about {sum(memory.values()):.2f} GiB with the longest rows: {parts}")
    show_preview(train, tokenizer, config.preview, config.preview_json, say)
    say("dry run: nothing was trained and nothing written to the output directory")
    return {
        "total_steps": steps,
        "num_rows": sum(rows),
        "memory_gib": memory,
        "data": train.stats,
        "model_directory": str(Path(directory)),
    }


def _is_sample(dataset: TokenizedDataset) -> bool:
    return any(told["rows_read"] < told["rows_total"] for told in dataset.stats["sources"])


def _estimated_rows(dataset: TokenizedDataset) -> list[int]:
    """Rows of each source once all of it is read."""
    return [
        math.ceil(told["rows"] * told["rows_total"] / max(1, told["rows_read"]))
        for told in dataset.stats["sources"]
    ]
