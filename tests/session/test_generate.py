"""Greedy generation with a cache compared with recomputing everything; stops; sampling."""

import dataclasses

import pytest
import torch
from tiny_llama import CFG, CPU, LORA, random_adapter, random_weights

from minisft.config.model import ModelConfig, RopeConfig
from minisft.llama import Compute, logits, make_tokens
from minisft.session.generate import GREEDY, InferenceModel, Sampling, generate

ROPES = {
    "default": RopeConfig(),
    "linear": RopeConfig("linear", factor=3.0),
    "dynamic": RopeConfig("dynamic", factor=2.0),  # within max_position_embeddings
    "llama3": RopeConfig(
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
    "yarn": RopeConfig("yarn", factor=4.0, original_max_position_embeddings=16),
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [16] * 20, [17, 18, 19]]
NEW = 12


def compute(cfg=CFG, dtype=torch.float32, **changes):
    return Compute(cfg, dtype, LORA.scaling, **changes)


def greedy(
    prompts, cfg=CFG, dtype=torch.float32, stop_ids=(), new=NEW, compute_=None, sampling=GREEDY
):
    weights = random_adapter(cfg).views, random_weights(cfg, dtype=dtype)
    return generate(
        InferenceModel(*weights, compute_ or compute(cfg, dtype), CPU),
        prompts,
        max_new_tokens=new,
        stop_ids=set(stop_ids),
        sampling=sampling,
    )


def recomputed(prompt, cfg=CFG, new=NEW):
    """The likeliest next token, again and again, each time from the whole text."""
    weights, adapter, ids = random_weights(cfg), random_adapter(cfg).views, list(prompt)
    for _ in range(new):
        z = logits(adapter, weights, make_tokens([ids]), compute(cfg))[-1]
        best = z.topk(2).values
        assert best[0] - best[1] > 1e-5, "too near a tie to compare"
        ids.append(int(z.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ROPES)
def test_cached_equals_recomputed(name):
    """A batch of prompts of different lengths, each as it would go on alone."""
    cfg = dataclasses.replace(CFG, rope=ROPES[name])
    got = greedy(PROMPTS, cfg)
    assert got == [recomputed(p, cfg) for p in PROMPTS]
    assert all(len(answer) == NEW for answer in got)
    assert len({tuple(answer) for answer in got}) == len(PROMPTS), "the prompts are told apart"


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"num_hidden_layers": 1},
    ],
    ids=str,
)
def test_cached_equals_recomputed_for_other_shapes(changes):
    cfg = ModelConfig(**{**vars(CFG), **changes})
    assert greedy(PROMPTS, cfg) == [recomputed(p, cfg) for p in PROMPTS]


def test_prompts_of_one_length():
    """They take another path through attention."""
    prompts = [[5, 6, 7], [8, 9, 10], [5, 6, 8]]
    assert greedy(prompts) == [recomputed(p) for p in prompts]


def test_half_precision_generates():
    answers = greedy(PROMPTS, dtype=torch.bfloat16)
    assert [len(a) for a in answers] == [NEW] * 5


def test_each_prompt_ends_at_its_own_stop():
    """The others go on undisturbed; the stop id is part of the answer."""
    free = greedy(PROMPTS)
    stops = {free[0][2], free[3][5]}
    want = []
    for answer in free:
        at = next((i for i, t in enumerate(answer) if t in stops), NEW)
        want.append(answer[: at + 1])
    assert len({len(a) for a in want}) >= 3, "they stop at different lengths"
    assert greedy(PROMPTS, stop_ids=stops) == want


def test_the_number_of_new_tokens():
    assert [len(a) for a in greedy(PROMPTS, new=1)] == [1] * 5
    assert greedy(PROMPTS, new=5) == [a[:5] for a in greedy(PROMPTS)]


def test_dropout_and_checkpointing_of_training_are_off():
    training = compute(lora_dropout=0.5, checkpoint_blocks=True)
    assert greedy(PROMPTS, compute_=training) == greedy(PROMPTS)


def test_sampling_follows_its_seed():
    def draw(**options):
        return greedy(PROMPTS, sampling=Sampling(temperature=1.0, **options))

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw(seed=1) != greedy(PROMPTS)


def test_sampling_draws_from_the_softmax():
    """First tokens at temperature 0.4 against their probabilities."""
    n, temperature = 2000, 0.4
    z = logits(random_adapter().views, random_weights(), make_tokens([PROMPTS[0]]), compute())[-1]
    p = (z / temperature).softmax(0)
    drawn = greedy([PROMPTS[0]] * n, new=1, sampling=Sampling(temperature))
    share = torch.tensor([t for (t,) in drawn]).bincount(minlength=CFG.vocab_size) / n
    deviation = (p * (1 - p) / n).sqrt()
    assert ((share - p).abs() <= 5 * deviation + 1 / n).all()


def test_top_p_keeps_the_likeliest_share():
    """The fewest tokens, likeliest first, whose probabilities reach top_p."""
    z = logits(random_adapter().views, random_weights(), make_tokens([PROMPTS[0]]), compute())[-1]
    p, order = z.softmax(0).sort(descending=True)
    top_p = (p[:3].sum() - 0.5 * p[2]).item()  # the third is needed
    drawn = greedy([PROMPTS[0]] * 1000, new=1, sampling=Sampling(1.0, top_p))
    assert {t for (t,) in drawn} == set(order[:3].tolist())
    only = greedy([PROMPTS[0]] * 50, new=1, sampling=Sampling(1.0, 1e-6))
    assert {t for (t,) in only} == {int(order[0])}
