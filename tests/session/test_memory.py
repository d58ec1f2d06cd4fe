"""The estimate of memory, held against what autograd keeps and what a process takes."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, flags, pairs, train, write_model, write_rows
from tiny_llama import CFG, all_rows, random_adapter, random_dataset, random_weights, whole_model

from minisft.config.lora import LoraConfig
from minisft.config.train import TrainConfig
from minisft.explicit import Choice
from minisft.files import load as load_module
from minisft.files.load import load_base
from minisft.llama import Compute
from minisft.loss import loss_sum
from minisft.session import context
from minisft.session.evaluate import eval_tokens
from minisft.session.memory import autograd_bytes, estimate, levers, resident_gib
from minisft.step import ExecutionPlan

LLAMA_16M = Path(__file__).parents[3] / "shared/models/llama-16m"


@pytest.mark.parametrize(
    "lora, compute",
    [
        (LoraConfig(r=3), Compute(CFG)),
        (LoraConfig(r=16, target_modules=("q_proj", "down_proj")), Compute(CFG)),
        (LoraConfig(r=3), Compute(CFG, torch.bfloat16)),
        (LoraConfig(r=3, use_dora=True), Compute(CFG)),
        (None, Compute(CFG)),
    ],
)
def test_what_autograd_keeps_of_a_token(lora, compute):
    trainable = random_adapter(lora=lora) if lora else whole_model()
    frozen = random_weights(dtype=compute.dtype) if lora else {}
    micro = all_rows(random_dataset([[100]] * 5)).micro_batches[0]
    leaves = {n: v.detach().requires_grad_() for n, v in trainable.views.items()}
    known = {t.untyped_storage().data_ptr() for t in (*frozen.values(), trainable.buffer)}
    saved, alive = {}, []

    def save(tensor):
        alive.append(tensor)  # else its address is given to another
        of_tokens = tensor.numel() % 500 == 0
        if of_tokens and tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss_sum(leaves, frozen, micro, compute)
    assert 500 * autograd_bytes(compute, trainable) == pytest.approx(sum(saved.values()), rel=0.15)


def test_checkpointed_blocks_keep_one_layer_and_the_inputs_of_all():
    flat, some = random_adapter(), Compute(CFG, checkpoint_blocks=True)
    whole = autograd_bytes(Compute(CFG), flat)
    assert autograd_bytes(some, flat) == whole / 2 + 2 * CFG.hidden_size * 4


def test_sizes_are_known_before_anything_is_loaded(llama_directory):
    """Weights, trained tensors and every optimizer's state, to the byte."""
    for changes in (
        {"optim": "adamw_8bit", "modules_to_save": "lm_head"},
        {"optim": "adafactor", "load_in_4bit": False, "dtype": "bfloat16"},
        {"optim": "lion_8bit", "full_finetuning": True},
        {"optim": "sgd", "use_dora": True},
    ):
        config = {"model": str(llama_directory), "device": "cpu", **changes}
        loaded, planned = (load_base(TrainConfig(**config, dry_run=d)) for d in (False, True))
        assert resident_gib(*planned) == resident_gib(*loaded)
        assert all(t.is_meta for t in (planned[1].trainable.buffer, *planned[1].moments.values()))


def test_the_parts_of_what_the_hand_written_pass_takes_sum_to_its_peak(llama_directory):
    model, state = load_base(TrainConfig(model=str(llama_directory), device="cpu"))
    choice = Choice(True, (), 4096, 1024, 8192, 5 << 30, "")
    needs = estimate(model, state, ExecutionPlan(model.compute, choice), 10**9, 0)
    assert sum(needs.values()) == pytest.approx(5)
    config = TrainConfig(model=str(llama_directory))
    planned, free = levers(config, needs), levers(config, resident_gib(model, state))
    assert planned[0].startswith("--max-memory-gib below 5.00 ") and "batch" not in str(planned)
    assert free[0].startswith("halve --per-device-train-batch-size 2 ")


def test_an_evaluation_that_needs_more_is_what_the_estimate_tells(llama_directory):
    config = TrainConfig(
        model=str(llama_directory), device="cpu", per_device_eval_batch_size=64,
        eval_dataset="x.jsonl",
    )  # fmt: skip
    assert eval_tokens(config) == 8192  # 64 rows of 2,048 are cut: the value does not depend on it
    model, state = load_base(dataclasses.replace(config, dry_run=True))
    plan = ExecutionPlan(model.compute)
    small, large = (estimate(model, state, plan, 10, n) for n in (0, 8192))
    assert "activations of 10 tokens" in small
    assert "activations of 8,192 evaluated tokens" in large
    assert sum(large.values()) > 5 * sum(small.values())


def test_a_dry_run_for_a_gpu_tells_the_plan_of_the_hand_written_pass(tmp_path, monkeypatch):
    """The device is asked how much is free, and for nothing else."""
    gpu = torch.device("cuda")
    for module in (load_module, context):
        monkeypatch.setattr(module, "resolve_device", lambda name: gpu)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**31))
    (tmp_path / "model").mkdir()
    wide = write_model(tmp_path / "model", hidden_size=128)
    rows = write_rows(tmp_path / "rows.jsonl", pairs(16))
    given = {"model": wide, "dataset": rows, "dtype": "bfloat16", "max_length": 64}
    out = train(**given, dry_run=True, output_dir=tmp_path / "out").out
    peak, room = re.search(r"predicted peak ([\d.]+) of ([\d.]+) GiB", out).groups()
    assert f"memory  about {peak} GiB: " in out and "explicit block, none" in out
    assert float(room) == pytest.approx(0.95, abs=0.01) and "has no effect" not in out


def test_rows_shorter_than_max_length_count_as_they_are(llama_directory, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", pairs(16))
    given = {"model": llama_directory, "dataset": rows, "max_length": 250}
    out = train(**given, dry_run=True, output_dir=tmp_path / "out").out
    longest = int(re.search(r"longest (\d+)", out)[1])
    tokens = int(re.search(r"activations of (\d+) tokens", out)[1])
    assert longest < tokens <= min(2 * 250, 8 * longest)


@pytest.mark.skipif(not LLAMA_16M.exists(), reason=f"{LLAMA_16M} is not there")
def test_the_estimate_is_within_30_percent_of_what_a_process_takes(tmp_path):
    """Beyond the process as it is before. Large blocks are given back when freed: glibc would keep
    them for later, and what the process holds is then up to twice what is in use."""
    text = "The quick brown fox jumps over the lazy dog. " * 8
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": text + str(i)} for i in range(30)])
    given = {"model": LLAMA_16M, "dataset": rows, "packing": True, "max_length": 1024}
    given |= {"gradient_accumulation_steps": 1, "max_steps": 1, "save_strategy": "no"}
    argv = [sys.executable, ROOT / "scripts/train.py", *flags(**given, output_dir=tmp_path / "out")]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    dry, run = (
        subprocess.run([*argv, *more], env=env, capture_output=True, text=True, check=True).stdout
        for more in (["--dry-run"], [])
    )
    about, before = re.search(
        r"memory  about ([\d.]+) GiB: this process so far ([\d.]+)", dry
    ).groups()
    peak = float(re.search(r"memory  .*peak ([\d.]+)", run)[1])
    assert float(about) - float(before) == pytest.approx(peak - float(before), rel=0.3)
