"""Which pass, policy and micro-batch a run gets: arithmetic alone, no device."""

import dataclasses
import math

import pytest
import torch
from tiny_llama import CFG, random_adapter, random_weights

from minisft.config.errors import UserError
from minisft.config.lora import LoraConfig
from minisft.config.model import ModelConfig
from minisft.config.train import TrainConfig
from minisft.explicit import plan as planning
from minisft.explicit.buckets import bucket_tokens
from minisft.explicit.cost import peak_bytes, token_seconds
from minisft.explicit.plan import (
    Memory,
    available_host_bytes,
    choose,
    choose_on_gpu,
    gpu_memory,
    micro_batch_sizes,
)
from minisft.explicit.policy import POLICIES, Dims, mlp_chunks, pinned_bytes, saved_bytes
from minisft.llama import Compute
from minisft.lora import allocate, trainable_shapes

# Llama 3.2 1B: the shape that the numbers below are of.
ONE_B = ModelConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    rms_norm_eps=1e-5,
)
RANKS = {"qkv": 48, "o": 16, "gate_up": 32, "down": 16}
DIMS = Dims(ONE_B, 2, RANKS)


def settings(**more):
    return TrainConfig(model="m", dataset=("d",), **more)


def on_cpu(lora=None, compute=None, **more):
    trainable = random_adapter() if lora is None else random_adapter(lora=lora)
    return choose(settings(**more), trainable, random_weights(), compute or Compute(CFG), 64)


def test_a_cpu_gets_autograd_and_a_gpu_s_memory_is_not_asked_for():
    choice = on_cpu()
    assert not choice.explicit and choice.policies == () and choice.tokens == 2 * 2048
    assert on_cpu(gradient_checkpointing="full").description.startswith(
        "autograd, keeping each layer's"
    )


def test_the_explicit_pass_can_be_asked_for():
    choice = on_cpu(step_impl="explicit", gradient_checkpointing="recompute_gate_up")
    assert choice.explicit and choice.policies == (POLICIES["recompute_gate_up"],) * 2


@pytest.mark.parametrize(
    "compute, lora, reason",
    [
        (Compute(CFG, lora_dropout=0.1), None, "LoRA dropout"),
        (Compute(CFG, loss_type="dft"), None, "a loss other than plain nll"),
        (None, LoraConfig(r=2, modules_to_save=("lm_head",)), "other than plain LoRA"),
    ],
)
def test_what_it_does_not_cover_is_refused_only_if_asked_for(compute, lora, reason):
    assert reason in on_cpu(lora, compute).description
    with pytest.raises(UserError, match=f"does not cover .*{reason}"):
        on_cpu(lora, compute, step_impl="explicit")


def test_cheaper_policies_need_less_memory_and_more_time():
    names = ["none", "recompute_gate_up", "recompute_gate_up+qkv", "all_but_attention", "full"]
    peaks = [peak_bytes(DIMS, (POLICIES[n],) * 16, 4096, 512, 8192) for n in names]
    times = [token_seconds(DIMS, (POLICIES[n],) * 16, 4096, 8192, 2048) for n in names]
    assert peaks == sorted(peaks, reverse=True) and times == sorted(times)
    kept = 16 * 4096 * 2 * (2 * 2048 + 2 * 2048 + 2 * 512 + 2 * 8192)
    assert kept < peaks[0] < 1.1 * kept


def test_offload_moves_the_bytes_of_all_layers_but_those_at_work():
    gpu = peak_bytes(DIMS, (POLICIES["full"],) * 16, 4096, 256, 8192)
    host = peak_bytes(DIMS, (POLICIES["full+offload"],) * 16, 4096, 256, 8192)
    x = 2048 * 2 * 4096
    assert gpu - host == 14 * x  # but for the layer at work and the one on its way


EIGHT_B = dataclasses.replace(
    ONE_B, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, head_dim=128
)


@pytest.mark.parametrize(
    "cfg, used, room, tokens, copies",
    [(EIGHT_B, 5.78, 20.9, 6144, True), (ONE_B, 1.08, 5.45, 4096, False)],
    ids=["8b", "1b"],
)
def test_larger_micro_batches_are_worth_some_copies(cfg, used, room, tokens, copies):
    """Measured: 1 % at 8B; at 1B the copies take more than fewer decodings save."""
    adapter = allocate(trainable_shapes(LoraConfig(r=16), cfg), torch.device("meta"))
    memory = Memory(used * 2**30, room * 2**30)
    compute = Compute(cfg, torch.bfloat16)
    choice = choose_on_gpu(settings(), adapter, compute, "auto", 2048, 16384, memory)
    assert choice.tokens == tokens
    assert (POLICIES["none+offload"] in choice.policies) == copies
    assert choice.policies[-1] == POLICIES["none"]  # nothing would hide the last layer's copies


def test_nothing_hides_the_copies_of_the_last_layer():
    all_but_one = (POLICIES["none"],) * 15
    last, first = (*all_but_one, POLICIES["offload"]), (POLICIES["offload"], *all_but_one)
    slow, fast = (token_seconds(DIMS, p, 4096, 8192, 2048) for p in (last, first))
    copies = saved_bytes(POLICIES["offload"], DIMS)[1] / 51e9
    assert slow - fast == pytest.approx(2 * copies)


def long_rows(host_gib, name="auto"):
    """8B in 20 GiB, rows of 32,768 tokens."""
    adapter = allocate(trainable_shapes(LoraConfig(r=16), EIGHT_B), torch.device("meta"))
    memory = Memory(5.78 * 2**30, 20 * 2**30, host_gib * 2**30)
    compute = Compute(EIGHT_B, torch.bfloat16)
    return choose_on_gpu(settings(), adapter, compute, name, 32768, 32768, memory)


def test_no_more_is_pinned_than_the_host_has():
    plenty, little, none = long_rows(1000), long_rows(30), long_rows(0)
    dims = Dims(EIGHT_B, 2, RANKS)
    found = [pinned_bytes(c.policies, dims, c.tokens) for c in (plenty, little, none)]
    assert found[0] > 30 * 2**30 >= found[1] > 0 == found[2]
    assert f"and {found[1] / 2**30:.1f} GiB of host memory" in little.description
    assert "host" not in none.description and none.peak_bytes <= 20 * 2**30
    with pytest.raises(UserError, match=r"--gradient-checkpointing offload would .* 1.0 GiB may"):
        long_rows(1, "offload")


def test_pinned_memory_is_counted_as_it_is_handed_out():
    x, qkv = 4096 * 2 * 3000, (4096 + 2 * 1024 + 48) * 2 * 3000
    two = [POLICIES["full+offload"], POLICIES["recompute_gate_up+offload"]]
    expected = 4 * 2**25 + 2**26  # x; x, attention's output and mid; q, k and v: powers of two
    assert 2**24 < x <= 2**25 < qkv <= 2**26
    assert pinned_bytes(two, Dims(EIGHT_B, 2, RANKS), 3000) == expected


def test_what_the_host_has_left(tmp_path):
    assert available_host_bytes(tmp_path) == math.inf
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   5000 kB\n")
    assert available_host_bytes(tmp_path) == 5000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("3000000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 500000\n")
    for limit, left in (("max", 5000 * 1024), ("4000000", 1500000), ("99000000", 5000 * 1024)):
        (group / "memory.max").write_text(limit + "\n")
        assert available_host_bytes(tmp_path) == left


@pytest.mark.parametrize("longest, step", [(2048, 16384), (2048, 12288), (600, 5000)])
def test_a_micro_batch_is_as_large_as_its_rows(longest, step):
    for size in micro_batch_sizes(0, longest, step)[1:]:
        assert size == bucket_tokens(size // longest * longest)


def test_chunks_of_the_mlp():
    full, none = POLICIES["full"], POLICIES["none"]
    assert [mlp_chunks(t, full, 2048) for t in (1, 2048, 2049, 8192, 10**6)] == [1, 1, 2, 4, 8]
    assert mlp_chunks(10**6, none, 2048) == 1
    less = peak_bytes(DIMS, (full,) * 16, 8192, 256, 1024)
    assert less < peak_bytes(DIMS, (full,) * 16, 8192, 256, 8192)


def fake_gpu(monkeypatch, free_gib, allocated=2**30):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda d: allocated)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda d: allocated)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (int(free_gib * 2**30), 0))
    monkeypatch.setattr(planning, "group_ranks", lambda *a: RANKS)
    monkeypatch.setattr(planning, "buffer_bytes", lambda *a: 2**27)


def on_gpu(config, name, to_load=0):
    memory = gpu_memory(torch.device("cuda"), config.max_memory_gib, to_load)
    compute = Compute(ONE_B, torch.bfloat16)
    return choose_on_gpu(config, random_adapter(), compute, name, 2048, 16384, memory)


@pytest.mark.parametrize("free", [100, 3, 0.45])
def test_a_dry_run_chooses_what_the_run_would(monkeypatch, free):
    """Before the weights are there, as with them."""
    fake_gpu(monkeypatch, free)
    loaded = on_gpu(settings(), "auto")
    fake_gpu(monkeypatch, free + 1, allocated=0)
    assert on_gpu(settings(), "auto", to_load=2**30) == loaded


@pytest.mark.parametrize("free, keeps_all", [(100, True), (3, True), (0.45, False)])
def test_auto_fits_what_is_free(monkeypatch, free, keeps_all):
    fake_gpu(monkeypatch, free)
    choice = on_gpu(settings(), "auto")
    assert choice.peak_bytes <= 2**30 + 0.95 * free * 2**30
    assert all(p.gpu | p.host == POLICIES["none"].gpu for p in choice.policies) == keeps_all
    assert (choice.tokens == 16384) == (free == 100)


def test_a_limit_of_the_user_s_is_kept_and_a_name_is_obeyed(monkeypatch):
    fake_gpu(monkeypatch, 100)
    config = settings(max_memory_gib=2.0)
    choice = on_gpu(config, "auto")
    assert choice.peak_bytes <= 1.99 * 2**30 and "of 2.00 GiB" in choice.description
    config = dataclasses.replace(config, micro_batch_tokens=4096)
    choice = on_gpu(config, "full")
    assert set(choice.policies) == {POLICIES["full"]} and choice.tokens == 4096


@pytest.mark.parametrize("longest, step", [(1837, 9000), (5, 7), (2048, 16384), (40000, 50000)])
@pytest.mark.parametrize("asked", [0, 3000])
def test_micro_batches_hold_every_bucket_that_they_may_be_padded_to(longest, step, asked):
    sizes = micro_batch_sizes(asked, longest, step)
    assert sizes == sorted(set(sizes), reverse=True) and sizes[-1] >= longest
    for size in sizes:
        assert all(bucket_tokens(n) <= size for n in range(1, size + 1, 97))
        assert bucket_tokens(size) == size


def test_buckets_grow_with_what_is_in_them():
    found = [bucket_tokens(n) for n in range(1, 9000)]
    assert found == sorted(found) and all(b >= n for n, b in enumerate(found, 1))
