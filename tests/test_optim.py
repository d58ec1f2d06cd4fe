"""AdamW, clipping and schedules against torch and transformers; which tensors are decayed."""

import math

import pytest
import torch

from minisft.config import LoraConfig, ModelConfig, TrainConfig
from minisft.lora import Group, allocate, groups, is_decayed, trainable_shapes
from minisft.optim import adamw_, clip_, grad_norm, lr_at, warmup_steps

KINDS = ("linear", "cosine", "constant", "constant_with_warmup")
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
    return TrainConfig(**({"learning_rate": 3e-4, "warmup_steps": 0} | settings))


@pytest.mark.parametrize("total", [1, 2, 10, 97])
@pytest.mark.parametrize("warmup", [0, 3, 0.07, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_lr_equals_transformers_to_the_bit(kind, warmup, total):
    transformers = pytest.importorskip("transformers")
    c = config(lr_scheduler_type=kind, warmup_steps=warmup)
    arguments = transformers.TrainingArguments(warmup_steps=warmup, use_cpu=True)
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=c.learning_rate)
    scheduler = transformers.get_scheduler(
        kind,
        optimizer,
        num_warmup_steps=arguments.get_warmup_steps(total),
        num_training_steps=total,
    )
    for step in range(total):
        assert lr_at(step, total, c) == scheduler.get_last_lr()[0], step
        optimizer.step()
        scheduler.step()


def test_lr_by_hand():
    """Warm-up starts at 0 and reaches the peak; the last step is one short of 0."""
    linear = config(learning_rate=1.0, warmup_steps=2)
    assert [lr_at(s, 6, linear) for s in range(6)] == [0, 0.5, 1, 0.75, 0.5, 0.25]
    cosine = config(learning_rate=1.0, lr_scheduler_type="cosine")
    got = [lr_at(s, 4, cosine) for s in range(4)]
    assert got == pytest.approx([1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)])
    constant = config(learning_rate=1.0, lr_scheduler_type="constant", warmup_steps=2)
    assert [lr_at(s, 6, constant) for s in range(6)] == [1] * 6


def test_warmup_below_one_is_a_share_rounded_up():
    assert [warmup_steps(config(warmup_steps=w), 97) for w in (0, 0.01, 0.5, 1, 3, 200)] == (
        [0, 1, 49, 1, 3, 200]
    )


# -------------------------------------------------------------------------------------------- AdamW

SHAPES = {"a.weight": (7, 5), "b.weight": (11,), "norm.weight": (5,), "c.bias": (3,)}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95), (0.0, 0.5)])
def test_adamw_equals_torch_over_ten_steps(betas, weight_decay):
    """Decayed tensors first, as in a trained buffer; the last two are not decayed."""
    generator = torch.Generator().manual_seed(0)
    flat = allocate(SHAPES, torch.device("cpu"))
    flat.buffer.normal_(generator=generator)
    exp_avg, exp_avg_sq = torch.zeros_like(flat.buffer), torch.zeros_like(flat.buffer)
    theirs = {n: v.clone().requires_grad_() for n, v in flat.views.items()}
    before = flat.buffer.clone()
    optimizer = torch.optim.AdamW(
        [
            {"params": [theirs["a.weight"], theirs["b.weight"]], "weight_decay": weight_decay},
            {"params": [theirs["norm.weight"], theirs["c.bias"]], "weight_decay": 0.0},
        ],
        betas=betas,
        eps=1e-6,
    )
    for step in range(1, 11):
        lr = 1e-2 / step
        grads = allocate(SHAPES, torch.device("cpu"))
        grads.buffer.copy_(torch.randn(before.shape, generator=generator) * 10.0 ** (step % 4 - 3))
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, parameter in theirs.items():
            parameter.grad = grads.views[name].clone()
        optimizer.step()
        adamw_(
            flat.buffer,
            grads.buffer,
            exp_avg,
            exp_avg_sq,
            groups(SHAPES),
            step=step,
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            eps=1e-6,
            weight_decay=weight_decay,
        )
        for name, parameter in theirs.items():
            assert (flat.views[name] - parameter).abs().max() < 2.5e-7, (step, name)  # one ulp
    moved = (flat.buffer - before).abs()
    assert moved.min() > 1e-5


def test_adamw_step_by_hand():
    """The first step moves by lr, whatever the gradient's size: m = g / 10, v = g^2 / 100."""
    params, grads = torch.tensor([2.0, 2.0]), torch.tensor([-0.3, 4.0])
    m, v = torch.zeros(2), torch.zeros(2)
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 0.0, "weight_decay": 0.5}
    adamw_(params, grads, m, v, [Group(0, 1, True), Group(1, 2, False)], step=1, **options)
    assert params.tolist() == pytest.approx([2 * (1 - 0.05) + 0.1, 2 - 0.1])
    assert m.tolist() == pytest.approx([-0.03, 0.4])
    assert v.tolist() == pytest.approx([0.0009, 0.16])


# ----------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 5.0, 1e6])
def test_clip_equals_torch(max_norm):
    """To the bit where nothing is clipped; the pieces' norms are summed differently elsewhere."""
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(46, generator=generator)
    parameters = [torch.zeros(n) for n in (35, 11)]
    for p, g in zip(parameters, grads.split((35, 11)), strict=True):
        p.grad = g.clone()
    theirs = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    want = torch.cat([p.grad for p in parameters])
    before = grads.clone()
    norm = grad_norm(grads)
    assert torch.allclose(norm, theirs, rtol=1e-6, atol=0)
    clip_(grads, norm, max_norm)
    assert torch.allclose(grads, want, rtol=1e-6, atol=0)
    assert grad_norm(grads) <= max_norm * (1 + 1e-6)
    assert torch.equal(grads, before) == (max_norm > norm)


def test_max_norm_zero_measures_without_clipping():
    grads = torch.full((4,), 50.0)
    clip_(grads, grad_norm(grads), 0.0)
    assert grads.tolist() == [50.0] * 4 and grad_norm(grads).item() == 100.0


# ------------------------------------------------------------------------------------- decay groups


def decayed_names(shapes):
    """Names whose whole slice of the buffer lies in decayed groups."""
    found, start = set(), 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        inside = [g for g in groups(shapes) if g.start <= start and stop <= g.stop]
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
    first, second = groups(shapes)
    assert (first.start, first.decayed, second.decayed) == (0, True, False)
    assert first.stop == second.start
    assert second.stop == sum(map(math.prod, shapes.values()))


def test_adapters_and_trained_copies_are_decayed():
    lora = LoraConfig(r=2, modules_to_save=("embed_tokens", "lm_head"))
    shapes = trainable_shapes(lora, BIASED)
    assert decayed_names(shapes) == set(shapes)
    assert groups(shapes) == [Group(0, sum(map(math.prod, shapes.values())), True)]


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
