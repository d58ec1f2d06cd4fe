"""Learning-rate schedules against transformers' get_scheduler, to the bit."""

import math

import pytest
import torch

from minisft.config.errors import UserError
from minisft.config.train import SCHEDULES, TrainConfig
from minisft.schedules import lr_factor, warmup_steps

OPTIONS = {
    "cosine": [{}, {"num_cycles": 1.25}],
    "cosine_with_restarts": [{}, {"num_cycles": 3}],
    "cosine_with_min_lr": [{"min_lr": 1e-5}, {"min_lr_rate": 0.1, "num_cycles": 0.75}],
    "polynomial": [{}, {"power": 2.0, "lr_end": 1e-6}],
    "inverse_sqrt": [{}, {"timescale": 17}],
    "warmup_stable_decay": [
        {"num_decay_steps": 5},
        {"num_decay_steps": 4, "min_lr_ratio": 0.2, "decay_type": "1-sqrt", "num_stable_steps": 3},
        {"num_decay_steps": 7, "decay_type": "linear", "warmup_type": "cosine"},
        {"num_decay_steps": 7, "num_cycles": 1.5, "warmup_type": "1-sqrt", "min_lr_ratio": 0.1},
    ],
}
CASES = [(kind, options) for kind in SCHEDULES for options in OPTIONS.get(kind, [{}])]


def config(**settings):
    return TrainConfig(**({"learning_rate": 3e-4, "warmup_steps": 0} | settings))


def rate_at(step, total, c):
    return c.learning_rate * lr_factor(step, total, c)


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_rates_equal_transformers_to_the_bit(kind, options):
    transformers = pytest.importorskip("transformers")
    for total in (1, 2, 10, 97):
        for warmup in (0,) if kind == "constant" else (0, 3, 0.07, 0.5):
            c = config(lr_scheduler_type=kind, warmup_steps=warmup, lr_scheduler_kwargs=options)
            arguments = transformers.TrainingArguments(warmup_steps=warmup, use_cpu=True)
            optimizer = torch.optim.AdamW([torch.zeros(1)], lr=c.learning_rate)
            scheduler = transformers.get_scheduler(
                kind,
                optimizer,
                num_warmup_steps=arguments.get_warmup_steps(total),
                num_training_steps=total,
                scheduler_specific_kwargs=dict(options),
            )
            for step in range(total):
                assert rate_at(step, total, c) == scheduler.get_last_lr()[0], (total, warmup, step)
                optimizer.step()
                if step + 1 < total:  # beyond it theirs may divide by zero
                    scheduler.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_scheduler_kwargs": "num_cycles=2"}, "linear knows these names: none"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": "power=2"}, "num_cycles"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": "num_cycles"}, "0 or more"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": "num_cycles=nan"}, "a number"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr=RATE or min_lr_rate"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": "min_lr=0.1"},
            "not below --learning-rate",
        ),
        ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-8}, "lr_end=1e-07"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps=N"),
        ({"lr_scheduler_type": "cosin"}, "expected one of linear, cosine"),
    ],
)
def test_options_that_a_schedule_does_not_know_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        config(**settings)


def test_lr_by_hand():
    """Warm-up starts at 0 and reaches the peak; the last step is one short of 0."""
    linear = config(learning_rate=1.0, warmup_steps=2)
    assert [rate_at(s, 6, linear) for s in range(6)] == [0, 0.5, 1, 0.75, 0.5, 0.25]
    cosine = config(learning_rate=1.0, lr_scheduler_type="cosine")
    got = [rate_at(s, 4, cosine) for s in range(4)]
    assert got == pytest.approx([1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)])
    constant = config(learning_rate=1.0, lr_scheduler_type="constant")
    assert [rate_at(s, 6, constant) for s in range(6)] == [1] * 6


def test_warmup_below_one_is_a_share_rounded_up():
    assert [warmup_steps(config(warmup_steps=w), 97) for w in (0, 0.01, 0.5, 1, 3, 200)] == (
        [0, 1, 49, 1, 3, 200]
    )
