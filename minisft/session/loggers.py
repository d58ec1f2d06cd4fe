"""TensorBoard, Weights & Biases and Trackio, beside metrics.jsonl, which is always written.

Each gets every metrics line under Trainer's names (train/loss, eval/loss). Whatever one of them
raises ends in a single warning, and training goes on without it.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from minisft.config.errors import UserError
from minisft.config.train import TrainConfig


class Logger(NamedTuple):
    """An open logger: write(metrics, step) takes numbers by name; close() flushes."""

    name: str
    write: Callable[[dict[str, float], int], None]
    close: Callable[[], None]


def require_loggers(config: TrainConfig) -> None:
    """UserError for a logger that is not installed: before training starts nothing is lost."""
    for name in config.report_to:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"--report-to {name}: the package is not installed; pip install {name}, or leave "
                "it out: metrics.jsonl has the numbers"
            )


@contextmanager
def loggers(
    config: TrainConfig, out: Path, first_step: int, warn: Callable[[str], None]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open what --report-to names and yield log(line), which takes a line of metrics.jsonl."""
    opened: list[Logger] = []
    for name in config.report_to:
        try:
            opened.append(_OPEN[name](config, out, first_step))
        except Exception as e:
            warn(_broken(name, "cannot be opened", e))

    def log(line: dict[str, Any]) -> None:
        metrics = named(line)
        for logger in [*opened]:
            try:
                logger.write(metrics, line["step"])
            except Exception as e:
                opened.remove(logger)
                warn(_broken(logger.name, "has stopped logging", e))

    try:
        yield log
    finally:
        for logger in opened:
            try:
                logger.close()
            except Exception as e:
                warn(_broken(logger.name, "was not closed cleanly", e))


def named(line: dict[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl as Trainer's loggers name it: train/loss, eval/loss."""
    numbers = {k: v for k, v in line.items() if isinstance(v, (int, float)) and k != "step"}
    return {
        f"eval/{k.removeprefix('eval_')}" if k.startswith("eval_") else f"train/{k}": v
        for k, v in numbers.items()
        if math.isfinite(v)
    }


def _broken(name: str, what: str, e: Exception) -> str:
    reason = (str(e).strip() or type(e).__name__).splitlines()[0]
    return f"warning: --report-to {name} {what} ({reason}); metrics.jsonl has the numbers"


def _run_name(config: TrainConfig, out: Path) -> str:
    return config.run_name or out.resolve().name


def _directory(config: TrainConfig, out: Path, default: str) -> Path:
    return Path(config.logging_dir) if config.logging_dir else out / default


def _open_tensorboard(config: TrainConfig, out: Path, first_step: int) -> Logger:
    from torch.utils.tensorboard import SummaryWriter

    directory = _directory(config, out, "runs") / _run_name(config, out)
    # Steps beyond the checkpoint that is resumed from are hidden in what was written before.
    writer = SummaryWriter(str(directory), purge_step=first_step + 1 if first_step else None)
    writer.add_text("config", "\n".join(f"    {k}: {v}" for k, v in vars(config).items()))

    def write(metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return Logger("tensorboard", write, writer.close)


def _open_wandb(config: TrainConfig, out: Path, first_step: int) -> Logger:
    import wandb

    directory = _directory(config, out, ".")
    directory.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "minisft"),
        name=_run_name(config, out),
        dir=str(directory),
        config={k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()},
        settings=wandb.Settings(silent=True),
    )
    return Logger("wandb", lambda metrics, step: run.log(metrics, step=step), run.finish)


def _open_trackio(config: TrainConfig, out: Path, first_step: int) -> Logger:
    import trackio  # pyright: ignore[reportMissingImports]  # an extra that no test needs

    run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", "minisft"),
        name=_run_name(config, out),
        config={k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()},
    )
    return Logger("trackio", lambda metrics, step: run.log(metrics, step=step), run.finish)


_OPEN = {"tensorboard": _open_tensorboard, "wandb": _open_wandb, "trackio": _open_trackio}
