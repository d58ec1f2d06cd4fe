"""The trained buffer: names, order, initial values, and adapters that change nothing at first."""

import itertools
import math

import pytest
import torch
from tiny_llama import CFG, CPU, LORA, random_adapter, random_weights, relative

from minisft.config.lora import LoraConfig
from minisft.config.model import LINEAR_NAMES, ModelConfig
from minisft.llama import Compute, logits, make_tokens
from minisft.lora import allocate, init_lora_, trainable_shapes

TIED = ModelConfig(**{**vars(CFG), "tie_word_embeddings": True})
DOCUMENTS = [[5, 6, 7, 8, 9], [10, 11], [12] * 17]


def compute(lora=LORA, cfg=CFG, dtype=torch.float32):
    return Compute(cfg, dtype, lora.scaling, lora.lora_dropout)


# --------------------------------------------------------------------------------------- the buffer


@pytest.mark.parametrize("lora", [None, LORA, LoraConfig(r=2, modules_to_save=("embed_tokens",))])
def test_views_tile_the_buffer(lora):
    """Each tensor is a view, one behind the other, without gaps: writes show on both sides."""
    shapes = trainable_shapes(lora, CFG)
    flat = allocate(shapes, CPU)
    assert flat.buffer.dtype == torch.float32 and not flat.buffer.any()
    assert list(flat.views) == list(shapes)
    at = flat.buffer.data_ptr()
    for name, view in flat.views.items():
        assert view.data_ptr() == at and tuple(view.shape) == shapes[name]
        assert view.is_contiguous() and view.dtype == torch.float32
        at += 4 * view.numel()
    assert at == flat.buffer.data_ptr() + 4 * flat.buffer.numel()


def test_full_finetuning_trains_every_weight():
    for cfg in (CFG, TIED):
        assert trainable_shapes(None, cfg) == cfg.weight_shapes()  # dicts: whatever the order


def test_adapter_shapes_are_rank_by_in_and_out_by_rank():
    shapes = trainable_shapes(LORA, CFG)
    want = {}
    for path, (out, in_) in CFG.linear_paths().items():
        want |= {f"{path}.lora_A.weight": (3, in_), f"{path}.lora_B.weight": (out, 3)}
    assert shapes == want and len(shapes) == 2 * 7 * 2


def test_tensors_that_read_one_input_are_neighbours():
    """A of q, k and v side by side, then their B; likewise gate and up: one product serves them."""
    names = [n.removesuffix(".weight") for n in trainable_shapes(LORA, CFG)]
    groups = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    want = [
        f"model.layers.{i}.{'self_attn' if group[0][0] in 'qko' else 'mlp'}.{name}.lora_{half}"
        for i in range(2)
        for group in groups
        for half in "AB"
        for name in group
    ]
    assert names == want


@pytest.mark.parametrize("asked", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
@pytest.mark.parametrize("where", ["modules_to_save", "target_modules"])
def test_trained_copies(asked, where):
    """A tied model has one matrix; asking among the targets means the same."""
    settings = {"modules_to_save": asked}
    if where == "target_modules":
        settings = {"target_modules": (*LINEAR_NAMES, *asked)}
    lora = LoraConfig(r=3, **settings)
    names = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
    for cfg, want in ((CFG, {names[n] for n in asked}), (TIED, {names["embed_tokens"]})):
        shapes = trainable_shapes(lora, cfg)
        copies = {n: s for n, s in shapes.items() if "lora" not in n}
        assert copies == dict.fromkeys(want, (97, 40))
        assert len(shapes) == 28 + len(copies)


# ---------------------------------------------------------------------------------- initial values


def test_a_is_uniform_and_b_zero():
    """PEFT's default: A uniform in +-1/sqrt(in), which has a deviation of 1/sqrt(3 in)."""
    wide = LoraConfig(r=64)
    flat = allocate(trainable_shapes(wide, CFG), CPU)
    init_lora_(flat, 3)
    for name, view in flat.views.items():
        if "lora_B" in name:
            assert not view.any()
            continue
        bound = 1 / math.sqrt(view.shape[1])
        assert view.abs().max() <= bound
        assert view.abs().max() > 0.99 * bound
        n = view.numel()
        assert abs(view.mean()) < 4 * bound / math.sqrt(3 * n)
        assert view.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_draws_differ_by_module_and_by_seed():
    def draws(seed, lora=LORA):
        flat = allocate(trainable_shapes(lora, CFG), CPU)
        init_lora_(flat, seed)
        return {n: v.clone() for n, v in flat.views.items() if "lora_A" in n}

    one, again, other = draws(1), draws(1), draws(2)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not any(torch.equal(one[n], other[n]) for n in one)
    for a, b in itertools.combinations(one.values(), 2):
        assert a.shape != b.shape or not torch.equal(a, b)
    alone = draws(1, LoraConfig(r=3, target_modules=("v_proj",)))
    assert len(alone) == 2
    assert all(torch.equal(one[n], v) for n, v in alone.items()), "other targets change no draw"


def test_initialising_leaves_trained_copies_alone():
    lora = LoraConfig(r=3, modules_to_save=("lm_head",))
    flat = allocate(trainable_shapes(lora, CFG), CPU)
    flat.views["lm_head.weight"].fill_(7.0)
    init_lora_(flat, 0)
    assert (flat.views["lm_head.weight"] == 7).all()


# -------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_with_b_zero_is_the_base(dtype):
    weights = random_weights(dtype=dtype)
    adapter = random_adapter(b_scale=0.0)
    tokens = make_tokens(DOCUMENTS)
    base = logits({}, weights, tokens, compute(dtype=dtype))
    assert torch.equal(logits(adapter.views, weights, tokens, compute(dtype=dtype)), base)
    moved = random_adapter(b_scale=0.1)
    assert relative(logits(moved.views, weights, tokens, compute(dtype=dtype)), base) > 1e-2


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_the_merged_weight(rslora):
    """W + scaling B A in place of W, with scaling alpha / r or alpha / sqrt(r)."""
    lora = LoraConfig(r=3, lora_alpha=5, use_rslora=rslora)
    scaling = 5 / (math.sqrt(3) if rslora else 3)
    weights, adapter = random_weights(), random_adapter(lora=lora)
    merged = dict(weights)
    for path in CFG.linear_paths():
        A, B = (adapter.views[f"{path}.lora_{x}.weight"] for x in "AB")
        merged[f"{path}.weight"] = weights[f"{path}.weight"] + scaling * B @ A
    tokens = make_tokens(DOCUMENTS)
    want = logits({}, merged, tokens, compute(lora))
    got = logits(adapter.views, weights, tokens, compute(lora))
    assert relative(got, want) < 1e-5
    assert relative(logits({}, weights, tokens, compute(lora)), want) > 1e-2


@pytest.mark.parametrize("path", CFG.linear_paths())
def test_every_adapter_counts(path):
    """Each of the fourteen, alone, changes the logits."""
    weights, adapter = random_weights(), random_adapter()
    tokens = make_tokens(DOCUMENTS)
    one = {n: v for n, v in adapter.views.items() if n.startswith(path + ".")}
    assert len(one) == 2
    base = logits({}, weights, tokens, compute())
    assert relative(logits(one, weights, tokens, compute()), base) > 1e-4


@pytest.mark.parametrize("cfg", [CFG, TIED], ids=["untied", "tied"])
def test_a_trained_copy_stands_in_for_the_frozen_weight(cfg):
    """embed_tokens where ids come in, lm_head where logits go out; both at once where tied."""
    lora = LoraConfig(r=3, modules_to_save=("embed_tokens", "lm_head"))
    weights, adapter = random_weights(cfg), random_adapter(cfg, lora)
    copies = {n: v for n, v in adapter.views.items() if "lora" not in n}
    assert len(copies) == 2 - cfg.tie_word_embeddings
    tokens = make_tokens(DOCUMENTS)
    want = logits({}, weights | copies, tokens, compute(cfg=cfg))
    assert torch.equal(logits(copies, weights, tokens, compute(cfg=cfg)), want)
    for name in copies:
        one = logits({name: copies[name]}, weights, tokens, compute(cfg=cfg))
        assert relative(one, logits({}, weights, tokens, compute(cfg=cfg))) > 1e-2
