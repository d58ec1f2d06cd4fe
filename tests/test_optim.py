"""Optimizers and clipping against their originals; which tensors are decayed, and at what rate."""

import dataclasses
import math

import pytest
import torch
from minisft.kernels.adamw import global_norm

from minisft.config.errors import UserError
from minisft.config.lora import LoraConfig
from minisft.config.model import ModelConfig
from minisft.config.train import TrainConfig
from minisft.lora import ParamGroup, allocate, is_decayed, param_groups, trainable_shapes
from minisft.optim import check_optimizer, clip_, init_moments, update_

BIASED = ModelConfig(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    attention_bias=True,
    mlp_bias=True,
)


def config(**settings):
    plain = {"learning_rate": 3e-4, "warmup_steps": 0, "max_grad_norm": 0.0}
    return TrainConfig(**(plain | settings))


# -------------------------------------------------------------------------------------------- AdamW

SHAPES = {"a.weight": (7, 5), "b.weight": (11,), "norm.weight": (5,), "c.bias": (3,)}
# Matrices of whole blocks of 256, as bitsandbytes quantises them one by one; then what stays fp32.
BLOCKS = {
    "p.lora_A.weight": (64, 128),
    "p.lora_B.weight": (96, 64),
    "lm_head.weight": (40, 32),
    "model.norm.weight": (33,),
}


def ours_and_theirs(shapes, make, steps=10, **settings):
    """Ten steps of update_ and of a torch optimizer on the same parameters and gradients.

    make(groups): theirs, from [{"params", "weight_decay"}]. Yields both after each step.
    """
    c = config(learning_rate=1e-2, **settings)
    slices = param_groups(shapes, c)
    generator = torch.Generator().manual_seed(0)
    flat = allocate(shapes, torch.device("cpu"))
    flat.buffer.normal_(generator=generator)
    moments = init_moments(flat, slices, c.optim)
    theirs = {n: v.clone().requires_grad_() for n, v in flat.views.items()}
    optimizer = make(
        [
            {
                "params": [p for n, p in theirs.items() if is_decayed(n)],
                "weight_decay": c.weight_decay,
            },
            {"params": [p for n, p in theirs.items() if not is_decayed(n)], "weight_decay": 0.0},
        ]
    )
    for step in range(1, steps + 1):
        grads = allocate(shapes, torch.device("cpu"))
        noise = torch.randn(flat.buffer.shape, generator=generator)
        grads.buffer.copy_(noise * 10.0 ** (step % 4 - 3))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / step
        for name, parameter in theirs.items():
            parameter.grad = grads.views[name].clone()
        optimizer.step()
        scaled = [group.scaled(1 / step) for group in slices]
        settings = {"norm": global_norm(grads.buffer), "step": step}
        update_(flat, grads.buffer, moments, scaled, **settings, config=c)
        yield flat.views, theirs


def assert_close(shapes, make, tolerance, **settings):
    for step, (mine, theirs) in enumerate(ours_and_theirs(shapes, make, **settings)):
        for name, parameter in theirs.items():
            assert (mine[name] - parameter).abs().max() <= tolerance, (step, name)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95), (0.0, 0.5)])
def test_adamw_equals_torch_over_ten_steps(betas, weight_decay):
    """Decayed tensors first, as in a trained buffer; the last two are not decayed."""
    assert_close(
        SHAPES,
        lambda g: torch.optim.AdamW(g, betas=betas, eps=1e-6),
        2.5e-7,  # one ulp
        weight_decay=weight_decay,
        adam_beta1=betas[0],
        adam_beta2=betas[1],
        adam_epsilon=1e-6,
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sgd_equals_torch(weight_decay):
    assert_close(SHAPES, torch.optim.SGD, 2.5e-7, optim="sgd", weight_decay=weight_decay)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adafactor_equals_transformers(weight_decay):
    """With Trainer's settings: neither a relative step nor a rate scaled by the parameter."""
    transformers = pytest.importorskip("transformers")

    def make(g):
        return transformers.Adafactor(g, lr=1e-2, scale_parameter=False, relative_step=False)

    assert_close(SHAPES, make, 1e-6, optim="adafactor", weight_decay=weight_decay)


@pytest.mark.parametrize("optim", ["adamw_8bit", "lion_8bit"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_eight_bit_rules_equal_bitsandbytes(optim, weight_decay):
    """Bit for bit where a matrix is whole blocks; theirs keeps 32 bits below 4096 entries."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def make(g):
        kind = bitsandbytes.optim.Lion if optim == "lion_8bit" else bitsandbytes.optim.AdamW
        return kind(g, betas=(0.9, 0.99), optim_bits=8)

    settings = {"optim": optim, "weight_decay": weight_decay, "adam_beta2": 0.99}
    for mine, theirs in ours_and_theirs(BLOCKS, make, **settings):
        for name, parameter in theirs.items():
            difference = (mine[name] - parameter).abs().max()
            assert difference <= (0 if "lora" in name else 1e-6), name


def test_eight_bit_moments_take_a_quarter_of_the_memory():
    """Two bytes and two scales a block for an entry, where AdamW has eight."""
    flat = allocate({"p.lora_A.weight": (16, 4096)}, torch.device("cpu"))
    sizes = {}
    for optim in ("adamw", "adamw_8bit", "lion_8bit"):
        c = config(optim=optim)
        slices = param_groups({n: tuple(v.shape) for n, v in flat.views.items()}, c)
        sizes[optim] = sum(t.nbytes for t in init_moments(flat, slices, optim).values())
    assert sizes["adamw_8bit"] / sizes["adamw"] == pytest.approx(0.254, abs=1e-3)
    assert sizes["lion_8bit"] * 2 == sizes["adamw_8bit"]


def test_embeddings_heads_norms_and_biases_keep_32_bit_moments():
    shapes = trainable_shapes(None, BIASED)
    flat, c = allocate(shapes, torch.device("cpu")), config(optim="adamw_8bit")
    slices = param_groups(shapes, c)
    moments = init_moments(flat, slices, c.optim)
    start, kept = 0, set()
    for name, shape in shapes.items():
        (i,) = [i for i, g in enumerate(slices) if g.start <= start < g.stop]
        kept |= {name} if moments[f"exp_avg.{i}"].dtype == torch.float32 else set()
        start += math.prod(shape)
    assert kept == {n for n in shapes if not n.endswith("_proj.weight")}


def test_paged_state_needs_a_gpu():
    with pytest.raises(UserError, match=r"paged_adamw_8bit .* CUDA .* --optim adamw_8bit"):
        check_optimizer("paged_adamw_8bit", torch.device("cpu"))


def test_adamw_step_by_hand():
    """The first step moves by lr, whatever the gradient's size: m = g / 10, v = g^2 / 100."""
    flat = allocate({"a": (1,), "b": (1,)}, torch.device("cpu"))
    flat.buffer.fill_(2.0)
    grads = torch.tensor([-0.3, 4.0])
    slices = [ParamGroup(0, 1, True, 0.2), ParamGroup(1, 2, False, 0.4)]
    moments = init_moments(flat, slices, "adamw")
    c = config(adam_beta2=0.99, adam_epsilon=0.0, weight_decay=0.5)
    scaled = [group.scaled(0.5) for group in slices]
    update_(flat, grads, moments, scaled, norm=global_norm(grads), step=1, config=c)
    assert flat.buffer.tolist() == pytest.approx([2 * (1 - 0.05) + 0.1, 2 - 0.2])
    assert moments["exp_avg"].tolist() == pytest.approx([-0.03, 0.4])
    assert moments["exp_avg_sq"].tolist() == pytest.approx([0.0009, 0.16])


# ----------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize(
    ("size", "max_norm"), [(1, 1e-3), (1, 1.0), (1, 5.0), (1, 1e6), (1e-6, 1e-6), (1e-6, 1.0)]
)
def test_clip_equals_torch(size, max_norm):
    """Also small gradients, for which the 1e-6 added to the norm matters."""
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(46, generator=generator) * size
    parameters = [torch.zeros(n) for n in (35, 11)]
    for p, g in zip(parameters, grads.split((35, 11)), strict=True):
        p.grad = g.clone()
    theirs = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    want = torch.cat([p.grad for p in parameters])
    before = grads.clone()
    norm = global_norm(grads)
    assert torch.allclose(norm, theirs, rtol=1e-6, atol=0)
    clip_(grads, norm, max_norm)
    assert torch.allclose(grads, want, rtol=1e-6, atol=0)
    assert global_norm(grads) <= max_norm * (1 + 1e-6)
    assert torch.equal(grads, before) == (max_norm > norm)


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "lion_8bit", "adafactor", "sgd"])
def test_every_rule_takes_the_clipped_gradient(optim):
    noise = torch.randn(sum(math.prod(s) for s in BLOCKS.values()))
    found = []
    for max_norm in (2.0, 0.0):
        c = config(optim=optim, max_grad_norm=max_norm, adam_epsilon=1e-3)
        flat = allocate(BLOCKS, torch.device("cpu"))
        flat.buffer.fill_(1.0)
        slices, grads = param_groups(BLOCKS, c), noise.clone()
        if not max_norm:
            clip_(grads, global_norm(grads), 2.0)
        moments = init_moments(flat, slices, optim)
        norm = global_norm(grads)
        update_(flat, grads, moments, slices, norm=norm, step=1, config=c)
        found.append((flat.buffer, *moments.values()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], torch.ones_like(found[0][0]))


def test_max_norm_zero_measures_without_clipping():
    grads = torch.full((4,), 50.0)
    clip_(grads, global_norm(grads), 0.0)
    assert grads.tolist() == [50.0] * 4 and global_norm(grads).item() == 100.0


# ------------------------------------------------------------------------------------ decay groups


def decayed_names(shapes):
    """Names whose whole slice of the buffer lies in decayed groups."""
    found, start = set(), 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        inside = [g for g in param_groups(shapes, config()) if g.start <= start and stop <= g.stop]
        assert len(inside) == 1
        found |= {name} if inside[0].decayed else set()
        start = stop
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_decay_groups_equal_trainer_s(tied):
    transformers = pytest.importorskip("transformers")
    hf = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(hf)
    want = set(transformers.Trainer.get_decay_parameter_names(None, model))
    cfg = ModelConfig(**{**vars(BIASED), "tie_word_embeddings": tied})
    shapes = trainable_shapes(None, cfg)
    assert set(shapes) == set(dict(model.named_parameters()))
    assert decayed_names(shapes) == want & set(shapes)
    assert {"model.embed_tokens.weight"} < decayed_names(shapes) < set(shapes)


def test_decayed_tensors_of_a_whole_model_are_one_slice():
    """Two groups, that cover the buffer: decayed first."""
    shapes = trainable_shapes(None, BIASED)
    first, second = param_groups(shapes, config())
    assert (first.start, first.decayed, second.decayed) == (0, True, False)
    assert first.stop == second.start
    assert second.stop == sum(map(math.prod, shapes.values()))


def test_adapters_and_trained_copies_are_decayed():
    lora = LoraConfig(r=2, modules_to_save=("embed_tokens", "lm_head"))
    shapes = trainable_shapes(lora, BIASED)
    assert decayed_names(shapes) == set(shapes)
    assert param_groups(shapes, config()) == [
        ParamGroup(0, sum(map(math.prod, shapes.values())), True, 3e-4)
    ]


@pytest.mark.parametrize(
    ("name", "decayed"),
    [
        ("model.norm.weight", False),
        ("model.layers.0.input_layernorm.weight", False),
        ("model.layers.0.post_attention_layernorm.weight", False),
        ("model.layers.0.self_attn.q_norm.weight", False),
        ("model.layers.0.self_attn.q_proj.bias", False),
        ("model.layers.0.self_attn.q_proj.weight", True),
        ("model.layers.0.mlp.up_proj.lora_B.weight", True),
        ("model.abnormal.weight", True),
    ],
)
def test_decay_by_name(name, decayed):
    assert is_decayed(name) == decayed


# ------------------------------------------------------------------------------------------- rates


def settings_of(shapes, c):
    """Name -> (learning rate, decayed) of the group that each tensor lies in."""
    found, start = {}, 0
    for name, shape in shapes.items():
        (group,) = [g for g in param_groups(shapes, c) if g.start <= start < g.stop]
        start += math.prod(shape)
        assert start <= group.stop
        found[name] = (group.learning_rate, group.decayed)
    return found


def unsloth_s(model, lr, embedding_lr):
    """Name -> (rate, decayed) as UnslothTrainer groups the parameters of a model."""
    transformers = pytest.importorskip("transformers")
    decayed = transformers.Trainer.get_decay_parameter_names(None, model)
    ends = [m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            own = name.endswith("modules_to_save.default.weight") or any(p is e for e in ends)
            short = name.removeprefix("base_model.model.").replace(".default.", ".")
            rate = embedding_lr if own else lr
            found[short.replace(".modules_to_save.", ".")] = (rate, name in decayed)
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_embedding_learning_rate_groups_equal_unsloth_s(tied, full):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    hf = transformers.LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=True, mlp_bias=True,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(hf)
    c = config(learning_rate=1e-4, embedding_learning_rate=1e-5, full_finetuning=full)
    if not full:
        c = dataclasses.replace(c, lora_r=2, modules_to_save=("embed_tokens", "lm_head"))
        adapter = peft.LoraConfig(
            r=2, target_modules=list(c.target_modules), modules_to_save=list(c.modules_to_save),
            ensure_weight_tying=tied,
        )  # fmt: skip
        model = peft.get_peft_model(model, adapter)
    cfg = ModelConfig(**{**vars(BIASED), "tie_word_embeddings": tied})
    want = unsloth_s(model, 1e-4, 1e-5)
    got = settings_of(trainable_shapes(c.lora, cfg), c)
    assert got == want
    assert {rate for rate, _ in got.values()} == {1e-4, 1e-5}


def test_without_its_own_rate_an_embedding_has_the_others():
    shapes = trainable_shapes(None, BIASED)
    assert {rate for rate, _ in settings_of(shapes, config()).values()} == {3e-4}


def test_loraplus_ratio_is_on_the_b_matrices():
    c = config(loraplus_lr_ratio=16.0, embedding_learning_rate=1e-5, modules_to_save="lm_head")
    rates = settings_of(trainable_shapes(c.lora, BIASED), c)
    assert len(rates) == 29
    for name, (rate, decayed) in rates.items():
        wanted = 1e-5 if name == "lm_head.weight" else 3e-4 * (16 if "lora_B" in name else 1)
        assert (rate, decayed) == (wanted, True), name


@pytest.mark.parametrize("n", [1, 4095, 4096, 10_000, 1 << 24])
def test_the_norm_is_right_however_long_the_gradient(n):
    grads = torch.randn(n, generator=torch.Generator().manual_seed(0))
    assert global_norm(grads).item() == pytest.approx(grads.double().norm().item(), rel=1e-6)
