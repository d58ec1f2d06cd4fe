"""Checks of a run before it writes anything: required settings, evaluation, disk space."""

from __future__ import annotations

import math
import shutil

from minisft.config.errors import UserError
from minisft.config.train import TrainConfig
from minisft.data.load import most_tokens
from minisft.files.disk import existing
from minisft.session.context import Run
from minisft.session.evaluate import check_evaluation, most_eval_tokens
from minisft.session.loggers import require_loggers
from minisft.session.memory import estimate
from minisft.variants.pissa import is_pair


def check_required(config: TrainConfig) -> None:
    """Raises UserError if --model, --dataset or the package of a --report-to logger is missing."""
    if not config.model:
        raise UserError(
            "--model is missing: give a directory or a hub id (no flags at all run the demo)"
        )
    if not config.dataset:
        raise UserError(
            "--dataset is missing: give a .jsonl, .json, .csv or .parquet file, or a hub id"
        )
    require_loggers(config)


def check_run(run: Run) -> None:
    """Raises UserError for problems that would otherwise stop the run hours later."""
    check_evaluation(run)
    check_space(run)


def note_memory_needs(run: Run) -> None:
    """Estimate the run's memory, for the dry run and for out-of-memory messages."""
    tokens = most_tokens(run.data, run.batches, run.total_steps)
    evaluated = most_eval_tokens(run.data.eval, run.config)
    run.place.needs.update(estimate(run.base, run.state, run.plan, tokens, evaluated))


def check_space(run: Run) -> None:
    """Raises UserError if the disk has too little space for one checkpoint and the result."""
    trained, lora = run.state.trainable, run.base.lora
    # float32: the tensors and two moments in the checkpoint, the tensors again in the result.
    need = 4 * 4 * trained.buffer.numel()
    # PiSSA and OLoRA also store the initial A and B, in the checkpoint and in the result.
    if lora and lora.splits_weights:
        need += 4 * 2 * sum(math.prod(s) for n, s in trained.shapes.items() if is_pair(n))
    free = shutil.disk_usage(existing(run.out)).free
    if free < need:
        raise UserError(
            f"--output-dir {run.out} has {free / 2**30:.2f} GiB free; one checkpoint and the "
            f"result need {need / 2**30:.2f} GiB: free some space or choose another directory"
        )
