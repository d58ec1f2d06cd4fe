"""`Run`, the object shared by all stages of a run, and `session`, the context manager around it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from minisft.batches import Batches
from minisft.config.errors import UserError
from minisft.config.train import TrainConfig
from minisft.data.load import Data
from minisft.files.device import resolve_device
from minisft.files.load import Base
from minisft.session.loggers import require_loggers
from minisft.session.memory import Needs, out_of_memory
from minisft.session.outputs import output_directory
from minisft.session.report import Reporter
from minisft.session.signals import Stop, stop_signals
from minisft.session.torch_switches import deterministic, flash_attention
from minisft.step import ExecutionPlan, State
from minisft.text.tokenizer import Tokenizer


@dataclass
class Run:
    """All that a training run needs: settings, base model, state, data, plan, output directory."""

    config: TrainConfig
    out: Path  # the output directory
    stop: Stop
    needs: Needs  # the memory estimate; empty until the run is planned
    tokenizer: Tokenizer
    base: Base
    state: State
    data: Data
    plan: ExecutionPlan
    batches: Batches
    facts: dict[str, Any]  # hashes of the data and of the base, stored in every checkpoint
    evaluated: bool = True  # False: the evaluation due at the resumed step still has to be run
    # `report` is set right before the first step, when metrics.jsonl is opened.
    report: Reporter = field(init=False, repr=False)

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps in the run, including steps done before resuming."""
        epochs = math.ceil(self.config.num_train_epochs * self.batches.schedule.steps_per_epoch)
        return self.config.max_steps if self.config.max_steps > 0 else epochs


class Numbers(NamedTuple):
    """Measurements of the training loop, over the steps done by this process."""

    steps: int
    tokens: int
    seconds: float
    memory_before_gib: float


@contextmanager
def session(config: TrainConfig) -> Iterator[tuple[Path, Stop, Needs]]:
    """Lock the output directory, handle signals and memory errors, set torch's switches.

    Yields (output directory, Stop, Needs). Raises UserError without --model, --dataset or a logger.
    """
    if not config.model:
        raise UserError(
            "--model is missing: give a directory or a hub id (no flags at all run the demo)"
        )
    if not config.dataset:
        raise UserError(
            "--dataset is missing: give a .jsonl, .json, .csv or .parquet file, or a hub id"
        )
    require_loggers(config)
    where = "before its first step: run the same command to start again"
    with (
        stop_signals(where) as stop,
        output_directory(config) as out,
        out_of_memory(config) as needs,
        deterministic(config.deterministic),
        flash_attention(config.attn_implementation, resolve_device(config.device)),
    ):
        yield out, stop, needs
