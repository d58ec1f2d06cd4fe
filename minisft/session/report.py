"""What a run tells: lines, a progress bar where there is a terminal, and metrics.jsonl always."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from minisft.config.train import TrainConfig
from minisft.files.disk import write_text, writing
from minisft.files.export import to_json_line
from minisft.session.loggers import loggers

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"  # answers to the eval prompts of --eval-generate


class Reporter:
    """Prints lines and step metrics; owns the open metrics.jsonl of a run."""

    def __init__(
        self,
        metrics: IO[bytes],
        total_steps: int,
        evaluations: dict[int, dict[str, Any]],
        log: Callable[[dict[str, Any]], None],
        progress: Any = None,
    ):
        self._metrics, self._directory = metrics, Path(metrics.name).parent
        self.evaluations = evaluations  # by step: its eval line, and `answers` if it has some
        self._log = log  # to the loggers of --report-to
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

    def evaluation(self, metrics: dict[str, Any], answers: list[dict[str, Any]]) -> None:
        """Append an eval line, and the answers to the eval prompts if there are some; show both."""
        if answers:
            self._answers(metrics["step"], answers)
        self._write(metrics)
        self.evaluations[metrics["step"]] = metrics | {"answers": answers}
        self.say(
            f"eval at step {metrics['step']}: eval_loss {metrics['eval_loss']:.4f}  "
            f"accuracy {metrics['eval_mean_token_accuracy']:.4f}  "
            f"entropy {metrics['eval_entropy']:.4f}"
        )

    def _answers(self, step: int, answers: list[dict[str, Any]]) -> None:
        """Append the answers to the eval prompts to samples.jsonl, a line each; show the counts."""
        with writing(self._directory / SAMPLES), open(self._directory / SAMPLES, "ab") as file:
            for answer in answers:
                file.write(to_json_line({"step": step, **answer}).encode())
        right, stopped = (sum(a[k] for a in answers) for k in ("right", "stopped"))
        self.say(
            f"answers at step {step}: {right} of {len(answers)} right, end of turn in {stopped}"
        )

    def sync(self) -> None:
        """Bring metrics.jsonl to disk: called before a checkpoint, so that it never runs ahead."""
        with writing(self._directory / METRICS):
            os.fsync(self._metrics.fileno())

    def _write(self, metrics: dict[str, Any]) -> None:
        with writing(self._directory / METRICS):
            line = to_json_line(metrics).encode()
            while line:
                line = line[self._metrics.write(line) :]
        self._log(metrics)


@contextmanager
def reporting(
    config: TrainConfig, directory: Path, total_steps: int, first_step: int, evaluated: bool = True
) -> Iterator[Reporter]:
    """A Reporter on directory/metrics.jsonl; lines after first_step, written before a kill, go.

    evaluated: whether first_step's checkpoint holds its evaluation; if not, that is made again.
    """
    path = directory / METRICS

    def keep(line: dict[str, Any]) -> bool:
        step = line["step"]
        if step == first_step and not evaluated:
            return "loss" in line  # the evaluation is made again
        return first_step > 0 and step <= first_step

    kept = {line["step"]: line for line in _keep_lines(path, keep) if "eval_loss" in line}
    for answer in _keep_lines(directory / SAMPLES, keep):
        if answer["step"] in kept:
            kept[answer["step"]].setdefault("answers", []).append(answer)
    # Unbuffered: nothing is left to fail on closing.
    with (
        open(path, "ab", buffering=0) as metrics,
        loggers(config, directory, first_step, say) as log,
    ):
        if not sys.stdout.isatty():
            yield Reporter(metrics, total_steps, kept, log)
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
            yield Reporter(metrics, total_steps, kept, log, progress)


def say(line: str) -> None:
    """Print one line now.

    Where nobody reads any more (`| head`, a closed terminal), the run goes on: metrics.jsonl has
    the numbers.
    """
    try:
        try:
            print(line, flush=True)
        except UnicodeEncodeError:  # a name that the terminal's encoding does not have
            print(line.encode("ascii", "backslashreplace").decode(), flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Drop the other lines, and what is no line of ours; the lines kept."""
    if not path.exists():
        return []
    kept, texts, damaged = [], [], 0
    with writing(path):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict) or type(value.get("step")) is not int:
            damaged += number < len(lines)  # the last may be torn by a kill
        elif keep(value):
            kept.append(value)
            texts.append(line + "\n")
    if damaged:
        say(f"warning: {damaged} lines of {path} are damaged and were left out")
    write_text(path, "".join(texts))
    return kept
