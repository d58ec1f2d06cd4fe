"""The explicit pass against autograd over the reference block: loss, gradients, policies."""

import dataclasses

import pytest
import torch
from minisft.kernels.nf4 import NF4Weight, quantize
from tiny_llama import CFG, LORA, all_rows, random_adapter, random_dataset, random_weights, relative

from minisft.config.lora import LoraConfig
from minisft.config.model import RopeConfig
from minisft.explicit import block as block_module
from minisft.explicit import microbatch as microbatch_module
from minisft.explicit.buckets import pad
from minisft.explicit.buffers import padded_shapes, prepare
from minisft.explicit.cost import buffer_bytes, group_ranks
from minisft.explicit.coverage import unsupported_reason
from minisft.explicit.microbatch import gathered, load_, micro_step_
from minisft.explicit.offload import Host
from minisft.explicit.policy import POLICIES, Dims, Policy, part_bytes
from minisft.llama import Compute
from minisft.step import ExecutionPlan, loss_and_grads

ROWS = [[5, 9], [14], [3, 3, 8], [12, 2]]
# Multiples of 64 * 256 weights in every matrix: these are joined.
WIDE = dataclasses.replace(
    CFG, hidden_size=128, intermediate_size=256, num_attention_heads=8, num_key_value_heads=4,
    head_dim=32,
)  # fmt: skip


def four_bit(weights):
    return {
        n: quantize(w) if n.endswith("_proj.weight") and w.dim() == 2 else w
        for n, w in weights.items()
    }


def run(cfg, lora, weights, policies, *, tokens=64, targets=None, documents=12, chunk=7):
    """(loss, gradient) of one padded micro-batch by the explicit pass."""
    trainable = random_adapter(cfg, lora)
    compute = Compute(cfg, lora_scaling=lora.scaling)
    assert unsupported_reason(trainable, weights, compute) == ""
    step = all_rows(random_dataset(ROWS, vocab=cfg.vocab_size))
    (micro,) = step.micro_batches
    explicit = prepare(trainable, dict(weights), compute, policies, chunk=chunk, max_tokens=tokens)
    load_(explicit, trainable)
    explicit.loss_weight.fill_(1 / step.num_loss_tokens)
    batch = pad(micro, tokens, documents, targets or tokens, longest=16)
    micro_step_(explicit, batch)
    return explicit.loss / step.num_loss_tokens, gathered(explicit)


def truth(cfg, lora, weights):
    trainable = random_adapter(cfg, lora)
    step = all_rows(random_dataset(ROWS, vocab=cfg.vocab_size))
    return loss_and_grads(
        trainable, weights, step, ExecutionPlan(Compute(cfg, lora_scaling=lora.scaling))
    )


def everything(cfg, name="none"):
    return [POLICIES[name]] * cfg.num_hidden_layers


@pytest.mark.parametrize("leaves", ["dense", "nf4"])
@pytest.mark.parametrize("cfg", [CFG, WIDE], ids=["odd", "wide"])
@pytest.mark.parametrize(
    "lora",
    [
        LORA,
        LoraConfig(r=16, lora_alpha=8),
        LoraConfig(r=2, target_modules=("q_proj", "v_proj")),
        LoraConfig(r=2, target_modules=("k_proj", "up_proj", "down_proj")),
        LoraConfig(r=2, target_modules=("o_proj",), use_rslora=True),
        LoraConfig(r=2, layers_to_transform=(1,)),
    ],
    ids=["all", "r16", "qv", "k_up_down", "o", "one_layer"],
)
def test_loss_and_gradients_are_those_of_autograd(lora, cfg, leaves):
    weights = random_weights(cfg)
    weights = four_bit(weights) if leaves == "nf4" else weights
    loss, grads = run(cfg, lora, weights, everything(cfg))
    expected_loss, expected = truth(cfg, lora, weights)
    assert abs(loss - expected_loss) < 1e-5 * expected_loss
    assert relative(grads, expected) < 1e-5


@pytest.mark.parametrize("name", [n for n in POLICIES if n != "none"])
def test_policies_change_no_bit(name):
    weights = four_bit(random_weights(WIDE))
    loss, grads = run(WIDE, LORA, weights, everything(WIDE))
    again = run(WIDE, LORA, weights, everything(WIDE, name))
    assert torch.equal(loss, again[0]) and torch.equal(grads, again[1])


@pytest.mark.parametrize("name", ["full", "recompute_gate_up+offload"])
@pytest.mark.parametrize("tokens", [512, 70])
def test_chunks_of_the_mlp_change_nothing(name, tokens, monkeypatch):
    weights = random_weights(CFG)
    whole = run(CFG, LORA, weights, everything(CFG, name), tokens=tokens)[1]
    asked = []
    monkeypatch.setattr(microbatch_module, "mlp_chunks", lambda *a: asked.append(a) or 4)
    parts = run(CFG, LORA, weights, everything(CFG, name), tokens=tokens)[1]
    assert len(asked) == CFG.num_hidden_layers
    assert relative(parts, whole) < 1e-6


def test_layers_may_have_different_policies():
    weights = random_weights(CFG)
    both = [POLICIES["full"], POLICIES["none"]]
    assert torch.equal(run(CFG, LORA, weights, both)[1], run(CFG, LORA, weights, both[::-1])[1])


@pytest.mark.parametrize("tokens, targets, documents", [(56, 56, 9), (100, 48, 30), (64, 64, 40)])
def test_the_bucket_changes_nothing(tokens, targets, documents):
    weights = random_weights(CFG)
    sizes = {"tokens": tokens, "targets": targets, "documents": documents}
    loss, grads = run(CFG, LORA, weights, everything(CFG), **sizes)
    expected_loss, expected = truth(CFG, LORA, weights)
    assert abs(loss - expected_loss) < 1e-5 * expected_loss
    assert relative(grads, expected) < 1e-5


@pytest.mark.parametrize("chunk", [1, 1000])
def test_the_chunk_of_logits_changes_nothing(chunk):
    weights = random_weights(CFG)
    grads = run(CFG, LORA, weights, everything(CFG), chunk=chunk)[1]
    assert relative(grads, run(CFG, LORA, weights, everything(CFG))[1]) < 1e-6


def test_llama3_rope():
    rope = RopeConfig("llama3", 500.0, 8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                      original_max_position_embeddings=16)  # fmt: skip
    cfg = dataclasses.replace(CFG, rope=rope)
    weights = random_weights(cfg)
    assert (
        relative(run(cfg, LORA, weights, everything(cfg))[1], truth(cfg, LORA, weights)[1]) < 1e-5
    )


def test_weights_side_by_side_are_stored_once():
    weights = four_bit(random_weights(WIDE))
    frozen = dict(weights)
    compute = Compute(WIDE, lora_scaling=1.0)
    explicit = prepare(
        random_adapter(WIDE), frozen, compute, everything(WIDE), chunk=8, max_tokens=8
    )
    q = frozen["model.layers.1.self_attn.v_proj.weight"]
    whole = explicit.layers[1].qkv.weight
    assert isinstance(q, NF4Weight) and isinstance(whole, NF4Weight)
    start = whole.packed.data_ptr()
    assert start < q.packed.data_ptr() < start + whole.packed.numel()


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"lora_dropout": 0.1}, "dropout"),
        ({"model": dataclasses.replace(CFG, rope=RopeConfig("dynamic", factor=2.0))}, "RoPE"),
    ],
)
def test_what_is_not_covered_is_said(change, reason):
    compute = dataclasses.replace(Compute(CFG), **change)
    assert reason in unsupported_reason(random_adapter(), random_weights(), compute)
    trained = random_adapter(lora=LoraConfig(r=2, modules_to_save=("lm_head",)))
    assert "other than plain LoRA" in unsupported_reason(trained, random_weights(), Compute(CFG))


@pytest.mark.parametrize("name", POLICIES)
def test_the_bytes_kept_are_those_of_the_formula(name, monkeypatch):
    """What is alive between the last layer's forward and backward pass, by name and by number."""
    policy, tokens, found = POLICIES[name], 64, []

    def counted(explicit, h, batch):
        raise StopIteration

    def store(self, i, saved, policy, real=Host.store):
        found.append(real(self, i, saved, policy))
        return found[-1]

    monkeypatch.setattr(microbatch_module, "_head_", counted)
    monkeypatch.setattr(Host, "store", store)
    with pytest.raises(StopIteration):
        run(CFG, LORA, random_weights(CFG), everything(CFG, name), tokens=tokens)
    trainable = random_adapter(CFG, LORA)
    sizes = part_bytes(Dims(CFG, 4, group_ranks(trainable, CFG)))
    if name == "none":  # half precision would be 4 D + 4 N H + 4 K H + 4 F, and LoRA's columns
        D, NH, KH, F = CFG.hidden_size, 4 * 14, 2 * 14, CFG.intermediate_size
        rank, heads = 8, CFG.num_attention_heads  # 3, padded
        plain = 2 * D + 2 * NH + 2 * KH + 2 * F
        assert sum(sizes.values()) == 4 * (plain + 5 * rank + 7 * rank) + 4 * heads + 8
    for saved in found:
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in leaves(saved)}
        expected = sizes["small"] + sum(sizes[p] for p in policy.gpu | policy.host)
        lse = 4 * CFG.num_attention_heads if "attended" in policy.gpu | policy.host else 0
        assert sum(kept.values()) == tokens * (expected - lse)  # a CPU's attention has none


@pytest.mark.parametrize("rank", [1, 3, 4, 8])
def test_rows_begin_on_16_bytes(rank, monkeypatch):
    """Flash attention reads q, k and v there, and does not say so."""
    seen = []

    def attend(q, k, v, documents, real=block_module.attend):
        seen.extend((q, k, v))
        return real(q, k, v, documents)

    monkeypatch.setattr(block_module, "attend", attend)
    weights = random_weights(WIDE)
    lora = dataclasses.replace(LORA, r=rank)
    _, grads = run(WIDE, lora, weights, everything(WIDE))
    assert len(seen) == 3 * WIDE.num_hidden_layers
    for t in seen:
        assert t.stride(0) % 8 == 0 and t.storage_offset() % 8 == 0 and t.stride(2) == 1
    assert relative(grads, truth(WIDE, lora, weights)[1]) < 1e-5


def test_ranks_are_rounded_up_and_their_gradients_cut_out():
    trainable = random_adapter(CFG, LORA)
    shapes = padded_shapes(trainable.shapes)
    assert {s[0] for n, s in shapes.items() if ".lora_A." in n} == {8}
    assert {s[1] for n, s in shapes.items() if ".lora_B." in n} == {8}
    compute = Compute(CFG, lora_scaling=LORA.scaling)
    explicit = prepare(
        trainable, random_weights(CFG), compute, everything(CFG), chunk=7, max_tokens=64
    )
    for _ in range(2):  # twice: nothing of the first time is left
        load_(explicit, trainable)
        for name, view in trainable.views.items():
            whole = explicit.adapters.views[name]
            assert torch.equal(whole[: view.shape[0], : view.shape[1]], view)
            assert whole.count_nonzero() == view.count_nonzero()
        trainable.buffer.mul_(-0.5)
    explicit.sums.buffer.copy_(torch.arange(explicit.sums.buffer.numel()))
    parts = [explicit.sums.views[n][:3] for n in shapes if ".lora_A." in n]
    parts += [explicit.sums.views[n][:, :3] for n in shapes if ".lora_B." in n]
    assert gathered(explicit).numel() == trainable.buffer.numel()
    assert gathered(explicit).double().sum() == sum(p.double().sum() for p in parts)


@pytest.mark.parametrize("rank", [3, 8])
def test_the_buffers_are_those_of_the_formula(rank):
    lora = dataclasses.replace(LORA, r=rank)
    trainable = random_adapter(CFG, lora)
    explicit = prepare(
        trainable, random_weights(CFG), Compute(CFG), everything(CFG), chunk=7, max_tokens=64
    )
    buffers = (
        explicit.adapters.buffer, explicit.sums.buffer, explicit.grads.buffer,
        explicit.layers[0].partials, explicit.scratch,
    )  # fmt: skip
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in buffers}
    expected = buffer_bytes(trainable, Dims(CFG, 4, group_ranks(trainable, CFG)))
    assert expected - sum(found.values()) == 36 << 20  # cuBLAS's


def leaves(x):
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for y in x for t in leaves(y)] if isinstance(x, tuple) else []


def test_a_policy_names_parts():
    for policy in POLICIES.values():
        assert isinstance(policy, Policy) and "x" in policy.gpu | policy.host
        assert not policy.gpu & policy.host
