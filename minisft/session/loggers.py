"""Loggers of --report-to: TensorBoard, Weights & Biases, Trackio.

Each logger receives every line of metrics.jsonl under Trainer's names (train/loss, eval/loss). If
a logger fails, a single warning is printed and training continues without that logger.
"""

import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from minisft.config.errors import UserError
from minisft.config.train import TrainConfig
from minisft.session.outputs import plain_config


class Logger(NamedTuple):
    """An open logger: write(metrics, step) logs named numbers; close() flushes and closes."""

    name: str
    write: Callable[[dict[str, float], int], None]
    close: Callable[[], None]


def require_loggers(config: TrainConfig) -> None:
    """Raises UserError if the package of a --report-to logger is not installed."""
    for name in config.report_to:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"--report-to {name}: the package is not installed; pip install {name}, or drop "
                "the flag: metrics.jsonl has the numbers"
            )


@contextmanager
def loggers(
    config: TrainConfig, out: Path, first_step: int, warn: Callable[[str], None]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open the loggers of --report-to; yield log(line), which logs one parsed metrics line."""
    opened: list[Logger] = []
    for name in config.report_to:
        with _only_warning(warn, name, "cannot be opened"):
            opened.append(_OPEN[name](config, out, first_step))

    def log(line: dict[str, Any]) -> None:
        metrics, working = named(line), []
        for logger in opened:
            with _only_warning(warn, logger.name, "has stopped logging"):
                logger.write(metrics, line["step"])
                working.append(logger)
        opened[:] = working

    try:
        yield log
    finally:
        for logger in opened:
            with _only_warning(warn, logger.name, "was not closed cleanly"):
                logger.close()


@contextmanager
def _only_warning(warn: Callable[[str], None], name: str, what: str) -> Iterator[None]:
    """Turn any exception in the `with` block into a warning about the logger `name`."""
    try:
        yield
    # Catch everything: errors of third-party code, network or disk must not end training.
    except Exception as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        warn(f"warning: --report-to {name} {what} ({reason}); metrics.jsonl has the numbers")


def named(line: dict[str, Any]) -> dict[str, float]:
    """Returns the finite numbers of a metrics line under Trainer's names."""
    return {
        f"eval/{k.removeprefix('eval_')}" if k.startswith("eval_") else f"train/{k}": v
        for k, v in line.items()
        if k != "step" and isinstance(v, (int, float)) and math.isfinite(v)
    }


def _open_tensorboard(config: TrainConfig, out: Path, first_step: int) -> Logger:
    from torch.utils.tensorboard import SummaryWriter

    directory = Path(config.logging_dir or out / "runs") / (config.run_name or out.resolve().name)
    # purge_step hides steps that an earlier process logged after the resumed checkpoint.
    writer = SummaryWriter(str(directory), purge_step=first_step + 1 if first_step else None)
    writer.add_text("config", "\n".join(f"    {k}: {v}" for k, v in vars(config).items()))

    def write(metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return Logger("tensorboard", write, writer.close)


def _open_tracker(name: str, config: TrainConfig, out: Path, first_step: int) -> Logger:
    # Trackio copies the Python interface of W&B, so this code serves both.
    package, more = importlib.import_module(name), {}
    if name == "wandb":
        directory = Path(config.logging_dir or out)
        directory.mkdir(parents=True, exist_ok=True)
        more = {"dir": str(directory), "settings": package.Settings(silent=True)}
    run = package.init(
        project=os.environ.get(f"{name.upper()}_PROJECT", "minisft"),
        name=config.run_name or out.resolve().name,
        config=plain_config(config),
        **more,
    )
    return Logger(name, lambda metrics, step: run.log(metrics, step=step), run.finish)


_OPEN = {
    "tensorboard": _open_tensorboard,
    "wandb": partial(_open_tracker, "wandb"),
    "trackio": partial(_open_tracker, "trackio"),
}
