"""The explicit pass on a GPU: against autograd in float32, its policies, graphs and peaks."""

import dataclasses
import functools
import gc

import pytest
import torch
from minisft.kernels.nf4 import NF4Weight, dequantize, quantize

from minisft.batches import MicroBatch
from minisft.config.lora import LoraConfig
from minisft.config.model import ModelConfig
from minisft.explicit.buckets import bucketed
from minisft.explicit.buffers import prepare
from minisft.explicit.cost import buffer_bytes, group_ranks, peak_bytes
from minisft.explicit.microbatch import gathered, load_, micro_step_
from minisft.explicit.policy import POLICIES, Dims
from minisft.llama import Compute, make_tokens
from minisft.lora import allocate, init_lora_, trainable_shapes
from minisft.loss import loss_sum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CFG = ModelConfig(
    vocab_size=3000,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    rms_norm_eps=1e-5,
)
LORA = LoraConfig(r=8, lora_alpha=16)
LAYOUTS = {"dense": [256, 256], "packed": [200, 3, 97, 211], "one": [384]}


def weights(cfg, four_bit):
    generator = torch.Generator("cuda").manual_seed(0)
    out = {}
    for name, shape in cfg.weight_shapes().items():
        w = torch.randn(shape, device="cuda", generator=generator)
        w = 1 + 0.1 * w if "norm" in name else 0.05 * w
        out[name] = quantize(w) if four_bit and name.endswith("_proj.weight") else w
    return out


def cast(frozen, dtype):
    return {n: w if isinstance(w, NF4Weight) else w.to(dtype) for n, w in frozen.items()}


def as_float(w):
    return (dequantize(w, torch.bfloat16) if isinstance(w, NF4Weight) else w).float()


def adapter(cfg, lora=LORA):
    flat = allocate(trainable_shapes(lora, cfg), torch.device("cuda"))
    init_lora_(flat, 0)
    generator = torch.Generator("cuda").manual_seed(1)
    for name, view in flat.views.items():
        if "lora_B" in name:
            view.normal_(0, 0.05, generator=generator)
    return flat


def micro_batch(lengths, cfg, device="cuda"):
    generator = torch.Generator().manual_seed(2)
    documents = [torch.randint(cfg.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    rows, targets, start = [], [], 0
    for d in documents:
        rows += range(start, start + len(d) - 1)
        targets += d[1:]
        start += len(d)
    return MicroBatch(
        make_tokens(documents, device),
        torch.tensor(rows, device=device),
        torch.tensor(targets, device=device),
    )


def by_autograd(cfg, frozen, flat, micro, dtype):
    leaves = {n: v.detach().clone().requires_grad_() for n, v in flat.views.items()}
    if dtype == torch.float32:  # the truth is of the weights that half precision has
        rounded = cast(frozen, torch.bfloat16)
        frozen = {n: as_float(w) for n, w in rounded.items()}
    else:
        frozen = cast(frozen, dtype)
    loss = loss_sum(leaves, frozen, micro, Compute(cfg, dtype, lora_scaling=LORA.scaling))
    (loss / len(micro.targets_M)).backward()
    return loss.detach(), torch.cat([leaf.grad.flatten() for leaf in leaves.values()])


def prepared(cfg, frozen, flat, name="none", tokens=1024):
    compute = Compute(cfg, torch.bfloat16, lora_scaling=LORA.scaling)
    policies = [POLICIES[name]] * cfg.num_hidden_layers
    explicit = prepare(
        flat, cast(frozen, torch.bfloat16), compute, policies, chunk=128, max_tokens=tokens
    )
    load_(explicit, flat)
    return explicit


def run_(explicit, batch):
    explicit.graphs.run_(functools.partial(micro_step_, explicit), batch)


def by_explicit_pass(explicit, micro):
    explicit.sums.buffer.zero_()
    explicit.loss.zero_()
    explicit.loss_weight.fill_(1 / len(micro.targets_M))
    micro_step_(explicit, bucketed(micro).to(torch.device("cuda")))
    return explicit.loss.clone(), gathered(explicit).clone()


@pytest.fixture
def deterministic(monkeypatch):
    """As --deterministic sets it: flash attention adds dQ in order, and not with warn_only."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize(
    "layout, four_bit, rank",
    [(name, four_bit, 8) for name in LAYOUTS for four_bit in (False, True)]
    + [(name, True, rank) for name in ("dense", "packed") for rank in (1, 4, 64, 256)],
)
def test_loss_and_gradients_stay_within_three_times_autograd_s_error(layout, four_bit, rank):
    lora = dataclasses.replace(LORA, r=rank, lora_alpha=LORA.scaling * rank)
    frozen, flat = weights(CFG, four_bit), adapter(CFG, lora)
    micro = micro_batch(LAYOUTS[layout], CFG)
    loss32, grads32 = by_autograd(CFG, frozen, flat, micro, torch.float32)
    _, grads16 = by_autograd(CFG, frozen, flat, micro, torch.bfloat16)
    loss, grads = by_explicit_pass(
        prepared(CFG, frozen, flat), micro_batch(LAYOUTS[layout], CFG, "cpu")
    )
    assert abs(loss - loss32) / loss32 < 1e-3
    assert error(grads, grads32) < 3 * error(grads16, grads32)


@pytest.mark.parametrize("name", [n for n in POLICIES if n != "none"])
@pytest.mark.parametrize("layout, rank", [*((name, 8) for name in LAYOUTS), ("packed", 3)])
def test_policies_change_no_bit(layout, rank, name, deterministic):
    lora = dataclasses.replace(LORA, r=rank, lora_alpha=LORA.scaling * rank)
    frozen, flat = weights(CFG, True), adapter(CFG, lora)
    micro = micro_batch(LAYOUTS[layout], CFG, "cpu")
    plain = by_explicit_pass(prepared(CFG, frozen, flat), micro)
    again = by_explicit_pass(prepared(CFG, frozen, flat, name), micro)
    assert torch.equal(plain[0], again[0]) and torch.equal(plain[1], again[1])


@pytest.mark.parametrize("name", ["none", "full+offload"])
def test_a_captured_step_is_the_one_it_was_captured_from(name, deterministic):
    frozen, flat = weights(CFG, True), adapter(CFG)
    explicit = prepared(CFG, frozen, flat, name)
    batches = [bucketed(micro_batch(d, CFG, "cpu")) for d in ([256, 256], [200, 311], [180, 330])]
    found = {}
    for turn in range(3):  # kernel by kernel, captured, replayed
        for i, batch in enumerate(batches):
            explicit.sums.buffer.zero_()
            explicit.loss.zero_()
            run_(explicit, batch)
            torch.cuda.synchronize()
            found[turn, i] = (explicit.loss.item(), gathered(explicit).clone())
    assert (
        len(explicit.graphs.inputs) == 2
        and explicit.graphs.captured.keys() == explicit.graphs.inputs.keys()
    )
    for turn in (1, 2):
        for i in range(3):
            assert found[turn, i][0] == found[0, i][0], (turn, i)
            assert torch.equal(found[turn, i][1], found[0, i][1]), (
                turn, i, error(found[turn, i][1], found[0, i][1])
            )  # fmt: skip


@pytest.mark.parametrize("layout", [[1024] * 2, [2048]], ids=["1024x2", "2048"])
@pytest.mark.parametrize("mlp", [8192, 1024])
@pytest.mark.parametrize("name", POLICIES)
def test_the_predicted_peak_is_within_five_percent(name, mlp, layout):
    cfg = dataclasses.replace(
        CFG, hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_hidden_layers=6
    )
    frozen, flat = cast(weights(cfg, True), torch.bfloat16), adapter(cfg)
    torch.cuda.synchronize()
    gc.collect()  # a capture before this test may have left a cycle
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    dims = Dims(cfg, 2, group_ranks(flat, cfg))
    tokens = sum(layout)
    policies = (POLICIES[name],) * cfg.num_hidden_layers
    expected = buffer_bytes(flat, dims) + peak_bytes(dims, policies, tokens, 256, mlp)
    torch.cuda.reset_peak_memory_stats()
    compute = Compute(cfg, torch.bfloat16, lora_scaling=LORA.scaling)
    explicit = prepare(
        flat, frozen, compute, list(policies), chunk=256, max_tokens=tokens, mlp_tokens=mlp
    )
    load_(explicit, flat)
    for _ in range(3):
        run_(explicit, bucketed(micro_batch(layout, cfg, "cpu")))
    torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated()
    assert abs(before + expected - measured) < 0.05 * measured, (before, expected, measured)
