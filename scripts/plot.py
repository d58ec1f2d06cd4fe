"""Draw the logs of one or several runs as one picture (.png, .svg or .pdf).

python scripts/plot.py outputs other-run --output plot.png
python scripts/plot.py outputs --panels loss --output loss.svg
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.config.errors import UserError
from minisft.config.flags import parse_flags, run_main
from minisft.session.report import METRICS

# Field of metrics.jsonl -> panel title.
PANELS = {
    "loss": "loss (nats per token)",
    "eval_loss": "eval loss (nats per token)",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm, before clipping",
    "tokens_per_second": "tokens per second",
    "peak_memory_gib": "peak memory (GiB)",
}


@dataclass(frozen=True)
class PlotConfig:
    """Plot loss, eval loss, learning rate, gradient norm, speed and memory of runs."""

    run: tuple[str, ...] = ()
    """Output directories of runs; `--run` may be omitted when they come first."""
    output: str = "plot.png"
    """File to write; its suffix selects the format: .png, .svg or .pdf."""
    panels: tuple[str, ...] = ()
    """Fields of metrics.jsonl to draw, such as `loss grad_norm`. Default: all six."""
    smooth: int = 1
    """Also draw the training loss averaged over this many log lines."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags, draw, and return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    runs = []
    while argv and not argv[0].startswith("-"):
        runs.append(argv.pop(0))
    argv += ["--run", *runs] if runs else []

    def run() -> None:
        config = parse_flags(PlotConfig, argv, prog="plot.py", default=PlotConfig())
        if not config.run:
            raise UserError("give one or more output directories of runs")
        if config.smooth < 1:
            raise UserError(f"--smooth is {config.smooth}; expected 1 or more")
        if unknown := set(config.panels) - set(PANELS):
            raise UserError(f"--panels is {min(unknown)!r}; expected some of {', '.join(PANELS)}")
        draw({name: read_metrics(Path(name)) for name in config.run}, config)
        print(f"saved to {config.output}")

    return run_main(run, {})


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl that are complete JSON objects with a step.

    directory: an output directory, or the file itself. Raises UserError if there is no such line.
    """
    path = directory / METRICS if directory.is_dir() else directory
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); is it a run's output?") from None
    lines = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        # Skip an invalid line: a killed run can leave a truncated last line.
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            lines.append(value)
    if not lines:
        raise UserError(f"{path}: contains no training step yet")
    return lines


def series(lines: list[dict[str, Any]], field: str) -> tuple[list[int], list[float]]:
    """Return (steps, values) of the log lines in which `field` is a finite number."""
    found = [(m["step"], m[field]) for m in lines if isinstance(m.get(field), (int, float))]
    found = [(step, value) for step, value in found if math.isfinite(value)]
    return [step for step, _ in found], [value for _, value in found]


def shown(name: str) -> str:
    """Return a legend label for `name`; matplotlib omits labels that start with an underscore."""
    return f" {name}" if name.startswith("_") else name


def smoothed(values: list[float], width: int) -> list[float]:
    """Return the moving average over the last `width` values (over fewer at the start)."""
    return [
        sum(values[max(0, i + 1 - width) : i + 1]) / min(width, i + 1) for i in range(len(values))
    ]


def draw(runs: dict[str, list[dict[str, Any]]], config: PlotConfig) -> None:
    """Write one picture with a panel per field and a line per run.

    Raises UserError if matplotlib is missing or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is not installed; pip install matplotlib") from None
    fields = config.panels or tuple(PANELS)
    columns = min(2, len(fields))
    rows = -(-len(fields) // columns)
    figure = Figure(figsize=(6 * columns, 10 / 3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, field in zip(axes, fields, strict=False):
        draw_panel(axis, runs, field, config.smooth if field == "loss" else 1)
    for axis in axes[len(fields) :]:
        axis.set_axis_off()
    axes[0].legend()
    try:
        figure.savefig(config.output, dpi=120)
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(
            f"--output {config.output}: cannot be written ({reason}); name a .png in a directory "
            "that exists"
        ) from None


def draw_panel(axis: Any, runs: dict[str, list[dict[str, Any]]], field: str, smooth: int) -> None:
    """Draw one field of every run on a matplotlib axis.

    smooth: width of the moving average in log lines; 1 draws none.
    """
    for i, (name, lines) in enumerate(runs.items()):
        steps, values = series(lines, field)
        few = len(steps) < 40
        axis.plot(
            steps, values, color=f"C{i}", alpha=0.35 if smooth > 1 else 1, linewidth=1.3,
            marker="o" if few else None, markersize=3, label=None if smooth > 1 else shown(name),
        )  # fmt: skip
        if smooth > 1:
            axis.plot(steps, smoothed(values, smooth), color=f"C{i}", label=shown(name))
    axis.set_title(PANELS[field])
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    found = [value for lines in runs.values() for value in series(lines, field)[1]]
    if field in ("tokens_per_second", "peak_memory_gib"):
        axis.set_ylim(0, 1.08 * max(found, default=1))
    if not found:
        axis.text(0.5, 0.5, "nothing logged", ha="center", transform=axis.transAxes)


if __name__ == "__main__":
    sys.exit(main())
