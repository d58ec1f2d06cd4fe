"""Learning-rate schedules: the factor on the peak rate at each step, transformers' to the bit.

s step from 0  w steps of warm-up  T all steps  p = (s - w) / (T - w)
"""

from __future__ import annotations

import math

from minisft.config.train import TrainConfig


def warmup_steps(config: TrainConfig, total: int) -> int:
    """--warmup-steps as a number of steps: below 1 it is a share of the total, rounded up."""
    asked = config.warmup_steps
    return math.ceil(asked * total) if asked < 1 else int(asked)


def lr_factor(step: int, total: int, config: TrainConfig) -> float:
    """What every learning rate is multiplied by at `step` (from 0): warm-up from 0, then the kind.

    linear: down to 0 at `total`. cosine: num_cycles (0.5) periods. cosine_with_restarts: num_cycles
    (1) half periods, each from the peak. cosine_with_min_lr: down to min_lr or min_lr_rate of the
    peak. polynomial: (1 - p)^power (1) down to lr_end (1e-7). constant, constant_with_warmup: flat.
    inverse_sqrt: 1 / sqrt((s - w) / timescale + 1), timescale w or 10000. warmup_stable_decay:
    flat, then num_decay_steps down to min_lr_ratio (0), which warm-up starts from too.
    """
    kind, options = config.lr_scheduler_type, config.scheduler_options
    if kind == "constant":
        return 1.0
    warmup = warmup_steps(config, total)
    if kind == "warmup_stable_decay":
        return _warmup_stable_decay(step, warmup, total, options)
    if step < warmup:
        return step / max(1, warmup)
    if kind == "constant_with_warmup":
        return 1.0
    if kind == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    if kind == "polynomial":
        return _polynomial(step, warmup, total, config.learning_rate, options)
    if kind == "inverse_sqrt":
        timescale = options.get("timescale") or warmup or 10_000
        return 1.0 / math.sqrt((step + timescale - warmup) / timescale)
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "cosine_with_restarts":
        turns = options.get("num_cycles", 1) * progress
        return 0.0 if progress >= 1 else max(0.0, 0.5 * (1.0 + math.cos(math.pi * (turns % 1.0))))
    wave = 0.5 * (1.0 + math.cos(math.pi * options.get("num_cycles", 0.5) * 2.0 * progress))
    if kind == "cosine_with_min_lr":
        least = options.get("min_lr_rate")
        least = options["min_lr"] / config.learning_rate if least is None else least
        wave = wave * (1 - least) + least
    return max(0.0, wave)


def _polynomial(step: int, warmup: int, total: int, peak: float, options: dict) -> float:
    end = options.get("lr_end", 1e-7)
    if step > total:
        return end / peak
    left = 1 - (step - warmup) / (total - warmup)
    return ((peak - end) * left ** options.get("power", 1.0) + end) / peak


def _warmup_stable_decay(step: int, warmup: int, total: int, options: dict) -> float:
    decay, least = int(options["num_decay_steps"]), options.get("min_lr_ratio", 0)
    stable = int(options.get("num_stable_steps", total - warmup - decay))
    if step < warmup:
        progress = step / max(1, warmup)
        wave = {
            "linear": lambda p: p,
            "cosine": lambda p: 0.5 * (1.0 - math.cos(math.pi * p)),
            "1-sqrt": lambda p: 1.0 - math.sqrt(1.0 - p),
        }[options.get("warmup_type", "linear")](progress)
    elif step < warmup + stable:
        return 1.0
    elif step < warmup + stable + decay:
        progress = (step - warmup - stable) / max(1, decay)
        turns = options.get("num_cycles", 0.5) * 2.0
        wave = {
            "linear": lambda p: 1.0 - p,
            "cosine": lambda p: 0.5 * (1.0 + math.cos(math.pi * turns * p)),
            "1-sqrt": lambda p: 1.0 - math.sqrt(p),
        }[options.get("decay_type", "cosine")](progress)
    else:
        return least
    return max(0.0, wave * (1.0 - least) + least)
