"""Whole runs against TRL's SFTTrainer: the same rows in the same order, the same numbers a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from runs import metrics
from safetensors.torch import load_file

datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")

import minisft  # noqa: E402
from minisft.batches import RowSchedule  # noqa: E402
from minisft.config.model import LINEAR_NAMES  # noqa: E402
from minisft.config.train import TrainConfig  # noqa: E402
from minisft.files import load as minisft_model  # noqa: E402
from minisft.files.adapter import KEY_PREFIX  # noqa: E402

STEPS, SEED = 8, 11
SETTINGS = {
    "max_steps": STEPS,
    "seed": SEED,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "max_length": 48,
    "weight_decay": 0.1,
    "warmup_steps": 3,
    "logging_steps": 1,
    "learning_rate": 2e-4,
}
NUMBERS = ("loss", "grad_norm", "learning_rate", "epoch")


class Run(NamedTuple):
    """What a run leaves: its log, a line a step, the rows of each, and its final tensors."""

    log: list[dict[str, Any]]
    rows: list[list[int]]
    tensors: dict[str, torch.Tensor]


def token_rows(count: int) -> list[dict[str, list[int]]]:
    """Rows of 2 to 60 random ids, some beyond max_length, a third of the labels ignored."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        n = 2 + (i * 17) % 59
        ids = torch.randint(5, 384, (n,), generator=generator).tolist()
        ids[0] = 5 + i  # tells the row
        ignored = torch.rand(n, generator=generator) < 0.33
        labels = [-100 if m else t for m, t in zip(ignored.tolist(), ids, strict=True)]
        rows.append({"input_ids": ids, "labels": [*labels[:1], ids[1], *labels[2:]]})
    return rows


def theirs(
    directory: Path, rows: list[dict], out: Path, lora: Any = None, start: Any = None, **settings
) -> Run:
    """SFTTrainer's run. start(model) is called before the first step."""
    trainer = trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32),
        args=trl.SFTConfig(
            output_dir=str(out),
            report_to="none",
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            disable_tqdm=True,
            save_strategy="no",
            dataset_num_proc=None,
            **settings,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(directory),
        peft_config=lora,
    )
    if start:
        start(trainer.model)
    row_of = {tuple(row["input_ids"]): i for i, row in enumerate(trainer.train_dataset)}
    seen: list[list[int]] = []
    step = trainer.training_step

    def training_step(model, inputs, *rest, **named):
        if trainer.state.global_step == len(seen):
            seen.append([])
        seen[-1] += rows_of(inputs, row_of)
        return step(model, inputs, *rest, **named)

    trainer.training_step = training_step
    trainer.train()
    tensors = {
        name.removeprefix(KEY_PREFIX).replace(".default", ""): p.detach()
        for name, p in trainer.model.named_parameters()
        if p.requires_grad
    }
    return Run([line for line in trainer.state.log_history if "loss" in line], seen, tensors)


def rows_of(inputs: dict[str, torch.Tensor], row_of: dict[tuple, int]) -> list[int]:
    """Which dataset rows a collated batch holds: right-padded ones, or packed ones end to end."""
    if "attention_mask" in inputs:
        pairs = zip(inputs["input_ids"], inputs["attention_mask"].sum(1).tolist(), strict=True)
        return [row_of[tuple(ids[:n].tolist())] for ids, n in pairs]
    ids, found = inputs["input_ids"][0].tolist(), []
    while ids:
        row = next(row for row in row_of if list(row) == ids[: len(row)])
        found.append(row_of[row])
        ids = ids[len(row) :]
    return found


def ours(directory: Path, rows: list[dict], out: Path, monkeypatch: Any, **settings) -> Run:
    """minisft.train's run, its log read from metrics.jsonl and its result from the export."""
    source = out.with_suffix(".jsonl")
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []
    loop_step = minisft.run.Batches.batch

    def batch(self, step, rank=0):
        result = loop_step(self, step, rank)
        seen.append(result.rows)
        return result

    monkeypatch.setattr(minisft.run.Batches, "batch", batch)
    minisft.train(
        TrainConfig(
            model=str(directory), dataset=str(source), output_dir=str(out), dtype="float32",
            device="cpu", load_in_4bit=False, **settings,
        )
    )  # fmt: skip
    file = "model.safetensors" if settings.get("full_finetuning") else "adapter_model.safetensors"
    tensors = {n.removeprefix(KEY_PREFIX): t for n, t in load_file(out / file).items()}
    return Run(metrics(out), seen, tensors)


def assert_equal_runs(a: Run, b: Run) -> None:
    assert a.rows == b.rows and len(a.rows) == STEPS
    assert len(a.log) == len(b.log) == STEPS
    for step, (mine, other) in enumerate(zip(a.log, b.log, strict=True)):
        assert mine["num_tokens"] == other["num_tokens"], step
        for name in NUMBERS:
            assert abs(mine[name] - other[name]) < 1e-5, (step, name)
        # 1e-5 is negligible compared with a rate of 2e-4.
        assert mine["learning_rate"] == pytest.approx(other["learning_rate"], rel=1e-12)
    assert set(a.tensors) == set(b.tensors)
    for name, tensor in a.tensors.items():
        assert tensor.dtype == torch.float32
        assert (tensor - b.tensors[name]).abs().max() < 1e-6, name


def assert_clipped_at_times(run: Run, max_norm: float) -> None:
    norms = [line["grad_norm"] for line in run.log]
    assert min(norms) < 0.98 * max_norm < 1.02 * max_norm < max(norms)


def test_full_finetuning_equals_sft_trainer(llama_directory, tmp_path, monkeypatch):
    """15 rows are 8 batches an epoch: steps of 3, 3 and 2, the last of which has 3 rows."""
    rows = token_rows(15)
    settings = SETTINGS | {"max_grad_norm": 2.0}
    want = theirs(llama_directory, rows, tmp_path / "trl", **settings)
    got = ours(
        llama_directory, rows, tmp_path / "minisft", monkeypatch, full_finetuning=True, **settings
    )
    assert_equal_runs(got, want)
    assert_clipped_at_times(want, 2.0)
    assert [len(step) for step in got.rows] == [6, 6, 3] * 2 + [6, 6]
    start = load_file(llama_directory / "model.safetensors")
    assert all((got.tensors[n] - t).abs().max() > 1e-4 for n, t in start.items())
    schedule = RowSchedule(15, 2, 3, SEED)
    dealt = [[r for batch in schedule.rows(s) for r in batch] for s in range(STEPS)]
    assert want.rows == dealt


def test_dft_loss_equals_sft_trainer(llama_directory, tmp_path, monkeypatch):
    """Each token's loss weighted by its probability; accumulation as for nll."""
    rows = token_rows(15)
    settings = SETTINGS | {"loss_type": "dft"}
    want = theirs(llama_directory, rows, tmp_path / "trl", **settings)
    got = ours(
        llama_directory, rows, tmp_path / "minisft", monkeypatch, full_finetuning=True, **settings
    )
    assert_equal_runs(got, want)
    assert want.log[0]["loss"] < 1


def test_lora_with_packing_equals_sft_trainer(llama_directory, tmp_path, monkeypatch):
    """From one adapter, whose B is not zero so that A moves from the first step."""
    rows = token_rows(60)
    settings = SETTINGS | {
        "packing": True, "packing_strategy": "bfd", "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine", "learning_rate": 1e-3,
    }  # fmt: skip
    first: dict[str, torch.Tensor] = {}

    def start(model):
        generator = torch.Generator().manual_seed(3)
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                p.data.normal_(0, 0.05, generator=generator)
            if p.requires_grad:
                key = name.removeprefix(KEY_PREFIX).replace(".default", "")
                first[key] = p.detach().clone()

    def init_lora_(trainable, seed, kind):
        assert set(trainable.views) == set(first)
        for name, view in trainable.views.items():
            view.copy_(first[name])

    lora = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=list(LINEAR_NAMES), task_type="CAUSAL_LM"
    )
    want = theirs(llama_directory, rows, tmp_path / "trl", lora=lora, start=start, **settings)
    monkeypatch.setattr(minisft_model, "init_lora_", init_lora_)
    got = ours(
        llama_directory,
        rows,
        tmp_path / "minisft",
        monkeypatch,
        lora_r=4,
        lora_alpha=12,
        **settings,
    )
    assert_equal_runs(got, want)
    assert_clipped_at_times(want, 1.0)
    assert len({len(step) for step in got.rows}) > 1, "no short last group of an epoch"
    assert all((got.tensors[n] - t).abs().max() > 1e-4 for n, t in first.items())


@pytest.mark.parametrize(
    ("count", "batch", "accumulation", "seed"), [(7, 3, 1, 0), (9, 1, 4, 3407), (5, 8, 2, 2**31)]
)
def test_row_order_equals_trainer_s(count, batch, accumulation, seed, llama_directory, tmp_path):
    """Three epochs: another permutation each, a short last batch, a short last step."""
    want = theirs(
        llama_directory,
        token_rows(count),
        tmp_path,
        num_train_epochs=3,
        seed=seed,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_length=16,
        logging_steps=1,
    )
    schedule = RowSchedule(count, batch, accumulation, seed)
    steps = range(3 * schedule.steps_per_epoch)
    assert want.rows == [[row for b in schedule.rows(step) for row in b] for step in steps]
    assert [line["epoch"] for line in want.log] == [schedule.epoch_after(step) for step in steps]
