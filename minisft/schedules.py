"""Learning-rate schedules: each step's factor on the peak rate, bitwise equal to transformers.

s step, from 0  w warm-up steps  T total steps  p = (s - w) / (T - w), the progress after warm-up
"""

import math

from minisft.config.train import TrainConfig


def warmup_steps(config: TrainConfig, total: int) -> int:
    """Return the number of warm-up steps; a value below 1 is a share of `total`, rounded up."""
    steps = config.warmup_steps
    return math.ceil(steps * total) if steps < 1 else int(steps)


def lr_factor(step: int, total: int, config: TrainConfig) -> float:
    """Return the factor on every learning rate at `step`, counted from 0.

    Warm-up is linear from 0; afterwards (defaults of the options in parentheses) the factor is,
    linear: down to 0 at `total`. cosine: num_cycles (0.5) periods. cosine_with_restarts: num_cycles
    (1) half periods, each from 1 to 0. cosine_with_min_lr: down to min_lr, or to min_lr_rate of the
    peak. polynomial: (1 - p)^power (1) down to lr_end (1e-7). constant (no warm-up),
    constant_with_warmup: 1. inverse_sqrt: 1 / sqrt((s - w) / timescale + 1), timescale (w or 1e4).
    warmup_stable_decay: warm-up from min_lr_ratio (0), 1, then num_decay_steps down to that ratio.
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
        # Return 0 at and after the last step, where turns % 1.0 would restart at the peak.
        return 0.0 if progress >= 1 else max(0.0, 0.5 * (1.0 + math.cos(math.pi * (turns % 1.0))))
    wave = 0.5 * (1.0 + math.cos(math.pi * options.get("num_cycles", 0.5) * 2.0 * progress))
    if kind == "cosine_with_min_lr":
        floor = options.get("min_lr_rate")
        floor = options["min_lr"] / config.learning_rate if floor is None else floor
        wave = wave * (1 - floor) + floor
    return max(0.0, wave)


def _polynomial(step: int, warmup: int, total: int, peak: float, options: dict) -> float:
    end = options.get("lr_end", 1e-7)
    # After the last step, the base of the power would be negative.
    if step > total:
        return end / peak
    # lr_end is an absolute learning rate, but the result is a factor on the peak: divide.
    left = 1 - (step - warmup) / (total - warmup)
    return ((peak - end) * left ** options.get("power", 1.0) + end) / peak


def _warmup_stable_decay(step: int, warmup: int, total: int, options: dict) -> float:
    decay, floor = int(options["num_decay_steps"]), options.get("min_lr_ratio", 0)
    # The default number of steps at the peak rate makes the decay end at the last step.
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
        return floor
    return max(0.0, wave * (1.0 - floor) + floor)
