"""A ledger of tokens: what every step of a run was fed, over stops, packing and epochs."""

import json
from collections import Counter

import pytest
from runs import call, flags, pairs, read, train, write_model, write_rows

from minisft import run as loop
from minisft.config.train import TrainConfig
from minisft.data.load import load_rows
from minisft.session.signals import Preempted
from minisft.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def documents_of(batch):
    """The token ids of every document in a step, as the model is given them."""
    found = []
    for micro in batch.micro_batches:
        parts = micro.tokens.input_ids_T.split(micro.tokens.documents.lengths)
        found += [tuple(part.tolist()) for part in parts]
    return found


@pytest.mark.parametrize("strategy", ["bfd", "wrapped", None])
def test_every_row_is_seen_once_an_epoch_over_resumes(model, tmp_path, monkeypatch, strategy):
    """Three epochs, stopped by a signal after steps 2, 3 and 7 (and once killed after a step that
    no checkpoint holds): each step's documents are counted in the order in which they count."""
    rows = [r | {"prompt": f"row {i}: {r['prompt']}"} for i, r in enumerate(pairs(37))]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    packing = {} if strategy is None else {"packing": True, "packing_strategy": strategy}
    settings = {
        "model": model, "dataset": path, "output_dir": tmp_path / "out", "max_length": 64,
        "num_train_epochs": 3, "per_device_train_batch_size": 2, "lora_r": 2, "save_steps": 500,
        "gradient_accumulation_steps": 3, "resume_from_checkpoint": "auto", **packing,
    }  # fmt: skip
    ledger: dict[int, list[tuple]] = {}
    stops = [(2, "signal"), (3, "signal"), (4, "kill"), (7, "signal"), (10**9, "")]
    real = loop.train_step_

    def train_step_(state, frozen, batch, *rest):
        result = real(state, frozen, batch, *rest)
        ledger[state.step] = documents_of(batch)  # a step made again replaces itself
        if state.step == stops[0][0]:
            if stops[0][1] == "kill":
                raise KeyboardInterrupt
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(loop, "train_step_", train_step_)
    while stops:
        argv = flags(**settings)
        if stops[0][1] == "kill":
            with pytest.raises(KeyboardInterrupt):
                call("train", argv)
        else:
            assert call("train", argv).code == (75 if stops[0][1] else 0)
        stops.pop(0)
    total = read(tmp_path / "out" / "run.json")["resolved"]["total_steps"]
    assert list(ledger) == list(range(1, total + 1)) and total % 3 == 0 and total > 8

    config = TrainConfig(**{k: str(v) if k in ("model", "dataset") else v for k, v in (
        ("model", model), ("dataset", path), ("max_length", 64), *packing.items())})  # fmt: skip
    dataset = load_rows(config, load_tokenizer(model), 384, scratch=tmp_path, say=print)
    whole = Counter(
        tuple(dataset.input_ids[a:b].tolist())
        for row in range(len(dataset))
        for a, b in dataset.row_documents(row)
    )
    for epoch in range(3):
        steps = range(epoch * total // 3 + 1, (epoch + 1) * total // 3 + 1)
        assert Counter(d for step in steps for d in ledger[step]) == whole, epoch
    orders = {json.dumps([ledger[s] for s in range(e * total // 3 + 1, (e + 1) * total // 3 + 1)])
              for e in range(3)}  # fmt: skip
    assert len(orders) == 3  # another order in every epoch
    tokens = sum(len(d) * count for d, count in whole.items())
    assert read(tmp_path / "out" / "train_output.json")["metrics"]["num_tokens"] == 3 * tokens
    assert Preempted.__mro__[1] is BaseException


def test_the_ledger_sees_a_row_that_is_given_twice(model, tmp_path, monkeypatch):
    """With the rows of every step shifted by one, the count is not that of the rows."""
    from minisft import batches

    real = batches.RowSchedule.rows
    monkeypatch.setattr(batches.RowSchedule, "rows", lambda self, step, rank=0: real(self, 0, rank))
    path = write_rows(tmp_path / "rows.jsonl", pairs(12))
    seen = []
    step_ = loop.train_step_

    def train_step_(state, frozen, batch, *rest):
        seen.extend(documents_of(batch))
        return step_(state, frozen, batch, *rest)

    monkeypatch.setattr(loop, "train_step_", train_step_)
    train(
        model=model, dataset=path, output_dir=tmp_path / "out", lora_r=2, max_length=64,
        gradient_accumulation_steps=3,
    )  # fmt: skip
    assert len(seen) == 12 and max(Counter(seen).values()) == 2
