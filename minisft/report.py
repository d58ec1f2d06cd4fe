"""What a run tells: lines, a progress bar where there is a terminal, and metrics.jsonl always."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from minisft.checkpoint import writing
from minisft.export import to_json_line

METRICS = "metrics.jsonl"


class Reporter:
    """Prints lines and step metrics; owns the open metrics.jsonl of a run."""

    def __init__(self, metrics: IO[bytes], total_steps: int, progress: Any = None):
        self._metrics, self._path = metrics, Path(metrics.name)
        self._total = total_steps
        self._progress = progress
        self._task = progress.add_task("", total=total_steps) if progress else None

    def say(self, line: str) -> None:
        """One line for the reader, above the progress bar if there is one."""
        say(line) if self._progress is None else self._progress.console.print(line, highlight=False)

    def step(self, metrics: dict[str, Any]) -> None:
        """Append a metrics line, and show it."""
        self._write(metrics)
        text = (
            f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}  "
            f"grad_norm {metrics['grad_norm']:.3f}  {metrics['tokens_per_second']:,.0f} tok/s  "
            f"peak {metrics['peak_memory_gib']:.2f} GiB"
        )
        if self._progress is None:
            say(f"step {metrics['step']}/{self._total}  {text}")
        else:
            self._progress.update(self._task, completed=metrics["step"], description=text)

    def evaluation(self, metrics: dict[str, Any]) -> None:
        """Append an eval line, and show it."""
        self._write(metrics)
        self.say(f"eval at step {metrics['step']}: eval_loss {metrics['eval_loss']:.4f}")

    def sync(self) -> None:
        """Bring metrics.jsonl to disk: called before a checkpoint, so that it never runs ahead."""
        with writing(self._path):
            os.fsync(self._metrics.fileno())

    def _write(self, metrics: dict[str, Any]) -> None:
        with writing(self._path):
            line = to_json_line(metrics).encode()
            while line:
                line = line[self._metrics.write(line) :]


@contextmanager
def reporting(directory: Path, total_steps: int, first_step: int) -> Iterator[Reporter]:
    """A Reporter on directory/metrics.jsonl; lines beyond first_step, from before a kill, go."""
    path = directory / METRICS

    def keep(line: dict[str, Any]) -> bool:
        step = line.get("step", 0)
        if step == first_step == total_steps:
            return "loss" in line  # the closing evaluation is made again
        return first_step > 0 and step <= first_step

    _keep_lines(path, keep)
    with open(path, "ab", buffering=0) as metrics:  # unbuffered: nothing is left to fail on closing
        if not sys.stdout.isatty():
            yield Reporter(metrics, total_steps)
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns) as progress:
            yield Reporter(metrics, total_steps, progress)


def say(line: str) -> None:
    """Print one line now."""
    print(line, flush=True)


def _keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue  # the torn last line of a killed run
        if keep(value):
            kept.append(line + "\n")
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)
