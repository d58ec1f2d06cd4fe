"""Report the progress of a run: printed lines, metrics.jsonl, a progress bar on a terminal."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from minisft.config.train import TrainConfig
from minisft.files.disk import write_text, writing
from minisft.files.export import to_json_line
from minisft.session.loggers import loggers

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"  # answers to the eval prompts of --eval-generate


@dataclass
class Reporter:
    """Prints lines and appends to metrics.jsonl and samples.jsonl."""

    metrics: IO[bytes]  # metrics.jsonl, opened for appending
    total_steps: int
    evaluations: dict[int, dict[str, Any]]  # step -> its eval line, and `answers` if there are any
    log: Callable[[dict[str, Any]], None]  # writes a line to the loggers of --report-to
    progress: Any = None  # rich.progress.Progress with one task; None without a terminal

    def step(self, metrics: dict[str, Any]) -> None:
        """Append a line of step metrics to metrics.jsonl, and print it."""
        self._write(metrics)
        text = (
            f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}  "
            f"grad_norm {metrics['grad_norm']:.3f}  {metrics['tokens_per_second']:,.0f} tok/s  "
            f"peak {metrics['peak_memory_gib']:.2f} GiB"
        )
        if self.progress is None:
            say(f"step {metrics['step']}/{self.total_steps}  {text}")
        else:
            (task,) = self.progress.task_ids
            self.progress.update(task, completed=metrics["step"], description=text)

    def evaluation(self, metrics: dict[str, Any], answers: list[dict[str, Any]]) -> None:
        """Append an eval line to metrics.jsonl and `answers` to samples.jsonl, and print both."""
        step, path = metrics["step"], Path(self.metrics.name).with_name(SAMPLES)
        # Write answers first. A kill may leave them without their eval line; resuming drops them.
        if answers:
            with writing(path), open(path, "ab") as file:
                for answer in answers:
                    file.write(to_json_line({"step": step, **answer}).encode())
            right, ended = (sum(a[key] for a in answers) for key in ("right", "stopped"))
            say(f"answers at step {step}: {right} of {len(answers)} right, end of turn in {ended}")
        self._write(metrics)
        self.evaluations[step] = metrics | {"answers": answers}
        say(
            f"eval at step {step}: eval_loss {metrics['eval_loss']:.4f}  "
            f"accuracy {metrics['eval_mean_token_accuracy']:.4f}  "
            f"entropy {metrics['eval_entropy']:.4f}"
        )

    def sync(self) -> None:
        """Sync metrics.jsonl to disk, so that a later checkpoint is never ahead of the file."""
        with writing(Path(self.metrics.name)):
            os.fsync(self.metrics.fileno())

    def _write(self, metrics: dict[str, Any]) -> None:
        with writing(Path(self.metrics.name)):
            line = to_json_line(metrics).encode()
            # Loop, because an unbuffered write may write only part of the line.
            while line:
                line = line[self.metrics.write(line) :]
        self.log(metrics)


@contextmanager
def reporting(
    config: TrainConfig, out: Path, total_steps: int, first_step: int, evaluated: bool = True
) -> Iterator[Reporter]:
    """Yield a Reporter that continues out/metrics.jsonl after first_step.

    Deletes lines of later steps, which a killed run may have left. evaluated: False if the
    evaluation due at first_step still has to be run; then its line, if any, is deleted too.
    """
    path = out / METRICS

    def keep(line: dict[str, Any]) -> bool:
        complete = evaluated or line["step"] < first_step or "loss" in line
        return complete and first_step > 0 and line["step"] <= first_step

    kept = {line["step"]: line for line in _keep_lines(path, keep) if "eval_loss" in line}
    for answer in _keep_lines(out / SAMPLES, keep):
        if answer["step"] in kept:
            kept[answer["step"]].setdefault("answers", []).append(answer)
    # Open metrics.jsonl unbuffered: closing writes nothing, so it cannot fail on a full disk.
    with open(path, "ab", buffering=0) as metrics, loggers(config, out, first_step, say) as log:
        if not sys.stdout.isatty():
            yield Reporter(metrics, total_steps, kept, log)
            return
        from rich import progress as rich

        # While the Progress is active, rich prints stdout above the progress bar.
        columns = rich.BarColumn(), rich.MofNCompleteColumn(), "{task.description}"
        with rich.Progress(*columns, rich.TimeRemainingColumn()) as progress:
            progress.add_task("", total=total_steps)
            yield Reporter(metrics, total_steps, kept, log, progress)


def say(line: str) -> None:
    """Print one line and flush. If stdout is closed (`| head`), the run continues silently."""
    try:
        try:
            print(line, flush=True)
        # A file name may contain characters that the terminal's encoding cannot represent.
        except UnicodeEncodeError:
            print(line.encode("ascii", "backslashreplace").decode(), flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Rewrite a JSONL file with the lines that `keep` accepts, and return them parsed."""
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
