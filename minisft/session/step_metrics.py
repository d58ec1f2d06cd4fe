"""The metrics line of a training step."""

from __future__ import annotations

from minisft.files.device import peak_memory_gib
from minisft.lora import ParamGroup
from minisft.session.context import Run


def report_step_(
    run: Run, grad_norm: float, epoch: float, groups: list[ParamGroup], factor: float
) -> None:
    """Log the means over the steps since the last line, with this step's gradient norm.

    groups, factor: the learning rates at their peak, and the schedule's factor on them.
    """
    state = run.state
    losses, tokens, targets, seconds = zip(*state.unlogged, strict=True)
    metrics = {
        "step": state.step,
        "epoch": epoch,
        "loss": sum(losses) / len(losses),
        "grad_norm": grad_norm,
        "learning_rate": run.config.learning_rate * factor,
        "num_tokens": state.num_tokens,
        "num_loss_tokens": sum(targets),
        "tokens_per_second": sum(tokens) / sum(seconds),
        "step_time_s": sum(seconds) / len(seconds),
        "peak_memory_gib": peak_memory_gib(run.base.device),
    }
    run.report.step(metrics)
    state.unlogged = []
