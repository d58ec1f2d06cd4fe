"""Datasets of a run: several at once, kept tokens, processes, overlong rows, preview, dry run."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import call, flags, pairs, read, step_lines, train, write_model, write_rows
from tiny_tokenizer import TEMPLATE, write_byte_level
from tokenised import named_rows

from minisft.batches import IGNORED, RowSchedule, TokenizedDataset, mixed_order, source_shares
from minisft.config.errors import UserError
from minisft.config.train import TrainConfig
from minisft.data import preview
from minisft.data import token_files as tokens
from minisft.data.load import cache_key, data_settings, load_rows, num_shared
from minisft.data.readers import read_rows
from minisft.data.settings import Settings
from minisft.data.token_files import TokenWriter, data_hash
from minisft.data.tokenize import tokenize
from minisft.text.tokenizer import Tokenizer, load_tokenizer

CHAT = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "The answer is 42."},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def _arrays(dataset: TokenizedDataset) -> list[list[int]]:
    names = ("input_ids", "labels", "document_offsets", "row_offsets")
    return [getattr(dataset, name).tolist() for name in names]


def _load(tokenizer: Tokenizer, scratch: Path, **settings: Any) -> TokenizedDataset:
    said: list[str] = []
    config = TrainConfig(model="m", **settings)
    dataset = load_rows(config, tokenizer, 400, scratch=scratch, say=said.append)
    assert all("from" in line for line in said)
    return dataset


# -------------------------------------------------------------------------------------- mixtures


def test_sources_follow_each_other_and_are_told_apart(tokenizer: Tokenizer, tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", pairs(5))
    two = write_rows(tmp_path / "two.jsonl", [{"question": "a", "answer": "b"}, {"messages": CHAT}])
    with pytest.raises(UserError, match=r"two\.jsonl:2 \(row 1\)"):  # one format a source
        _load(
            tokenizer,
            tmp_path,
            dataset=(one, two),
            columns=("prompt=question", "completion=answer"),
        )
    two = write_rows(tmp_path / "two.jsonl", [{"messages": CHAT}] * 3)
    both = _load(tokenizer, tmp_path, dataset=(str(one), str(two)))
    assert len(both) == 8 and both.stats["duplicates"] == 2
    assert [(s["format"], s["rows"]) for s in both.stats["sources"]] == [
        ("prompt-completion", 5),
        ("messages", 3),
    ]
    alone = _load(tokenizer, tmp_path, dataset=str(two))
    assert both.input_ids[-len(alone.input_ids) :].tolist() == alone.input_ids.tolist()
    with pytest.raises(UserError, match=r"none of .*one\.jsonl, .*two\.jsonl has a column 'ask'"):
        _load(tokenizer, tmp_path, dataset=(one, two), columns=("text=ask",))


def test_no_packed_row_holds_two_sources(tokenizer: Tokenizer, tmp_path: Path) -> None:
    files = [write_rows(tmp_path / f"{i}.jsonl", pairs(7, first=10 * i)) for i in range(3)]
    settings = {"packing": True, "max_length": 64}
    mixed = _load(tokenizer, tmp_path, dataset=tuple(files), **settings)
    alone = [_load(tokenizer, tmp_path, dataset=file, **settings) for file in files]
    assert _arrays(mixed)[0] == [i for d in alone for i in d.input_ids.tolist()]
    assert len(mixed) == sum(map(len, alone)) == mixed.stats["rows_packed"]


def test_weights_are_shares_of_an_epoch() -> None:
    shares = source_shares([10, 30], [0.75, 0.25])
    assert shares == ((10, 30), (30, 10))
    orders = [mixed_order(shares, seed) for seed in range(3)]
    for order in orders:
        assert len(order) == 40
        small = sorted(i for i in order if i < 10)
        assert small == sorted([*range(10)] * 3)  # three whole passes
        large = [i for i in order if i >= 10]
        assert len(set(large)) == len(large) == 10 and max(large) < 40  # drawn without repetition
        assert order != sorted(order)
    assert orders[0] == mixed_order(shares, 0) != orders[1]
    drawn = [frozenset(i for i in order if i >= 10) for order in orders]
    assert len(set(drawn)) == 3  # another part of the large source each epoch
    assert source_shares([3, 3, 3], [0.5, 0.3, 0.2]) == ((3, 4), (3, 3), (3, 2))
    assert source_shares([5, 5], [None, None]) == ()
    with pytest.raises(UserError, match="less than one row an epoch"):
        source_shares([5, 5], [0.999, 0.001])


def test_the_batch_of_a_step_is_a_function_of_seed_and_step() -> None:
    schedule = RowSchedule(
        num_rows=40, batch_size=4, accumulation=2, seed=7, shares=((10, 30), (30, 10))
    )
    steps = [schedule.rows(step) for step in range(10)]
    assert [i for rows in steps[:5] for batch in rows for i in batch] == mixed_order(
        schedule.shares, 7
    )
    assert [i for rows in steps[5:] for batch in rows for i in batch] == mixed_order(
        schedule.shares, 8
    )
    assert dataclasses.replace(schedule).rows(6) == steps[6]


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("a.jsonl", [("a.jsonl", None)]),
        (("a.jsonl", "b.jsonl"), [("a.jsonl", None), ("b.jsonl", None)]),
        (("a.jsonl:3", "org/name:1"), [("a.jsonl", 0.75), ("org/name", 0.25)]),
        (Path("a.jsonl"), [("a.jsonl", None)]),
    ],
)
def test_weights_are_read_from_the_flag(dataset: Any, expected: list) -> None:
    assert TrainConfig(dataset=dataset).sources == expected


def test_malformed_weights_are_refused() -> None:
    for dataset, reason in (
        (("a:0.5", "b"), "every dataset a weight, or none"),
        (("a:0", "b:1"), "'a:0'; expected a weight above 0"),
        (("a:inf", "b:1"), "weight above 0"),
    ):
        with pytest.raises(UserError, match=reason):
            TrainConfig(dataset=dataset)


def test_a_run_on_a_mixture_resumes_and_knows_its_weights(model: Path, tmp_path: Path) -> None:
    files = [write_rows(tmp_path / f"{i}.jsonl", pairs(6, first=10 * i)) for i in range(2)]
    given = {
        "model": model, "dataset": [f"{files[0]}:0.7", f"{files[1]}:0.3"], "max_length": 64,
        "num_train_epochs": 2, "gradient_accumulation_steps": 1, "save_steps": 3,
    }  # fmt: skip
    outcome = train(**given, output_dir=tmp_path / "whole")
    assert "0.jsonl: 8 rows an epoch, of 6" in outcome.out
    train(**given, output_dir=tmp_path / "half", max_steps=6)
    given |= {"output_dir": tmp_path / "half", "resume_from_checkpoint": "auto"}
    other = call("train", flags(**given | {"dataset": [f"{f}:0.5" for f in files]}))
    assert other.code == 2 and "the training rows differ" in other.err
    # The schedule of the learning rate is that of the whole run: losses tell the rows.
    resumed = train(**given)
    assert "resuming from" in resumed.out
    whole = step_lines(tmp_path / "whole", "num_tokens")
    assert len(whole) == 12 and step_lines(tmp_path / "half", "num_tokens") == whole


# -------------------------------------------------------------------------- columns of eval rows


def test_columns_apply_to_the_eval_rows_where_they_are_there(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [{"question": p["prompt"], "answer": p["completion"]} for p in pairs(4)]
    renamed = write_rows(tmp_path / "renamed.jsonl", rows)
    plain = write_rows(tmp_path / "plain.jsonl", pairs(4))
    odd = write_rows(tmp_path / "odd.jsonl", [{"q": "a", "completion": "b"}])
    config = TrainConfig(
        dataset=str(renamed), columns=("prompt=question", "completion=answer"),
        eval_dataset=str(plain),
    )  # fmt: skip
    load = {"scratch": tmp_path, "say": print}
    trained = load_rows(config, tokenizer, 400, **load)
    evaluated = load_rows(config, tokenizer, 400, **load, for_eval=True)
    assert _arrays(evaluated) == _arrays(trained)
    assert evaluated.stats["sources"][0]["columns"] == {}
    assert num_shared(trained, evaluated) == 4
    config = dataclasses.replace(config, eval_dataset=str(odd))
    with pytest.raises(
        UserError, match=r"odd\.jsonl: no known format; found columns q, completion"
    ):
        load_rows(config, tokenizer, 400, **load, for_eval=True)


def test_rows_that_are_trained_and_evaluated_are_a_warning(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", pairs(6) + pairs(2))
    outcome = train(
        model=model, dataset=rows, eval_dataset=rows, max_steps=1, output_dir=tmp_path / "out"
    )
    assert "warning: 8 of 8 eval rows are among the training rows" in outcome.out
    assert "2 duplicates" in outcome.out


# ----------------------------------------------------------------------------------- kept tokens


def test_kept_tokens_are_taken_again_until_anything_changes(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", pairs(30))
    given = {"dataset": str(rows), "dataset_cache_dir": str(tmp_path / "cache"), "max_length": 64}
    config = TrainConfig(model="m", **given)
    said: list[str] = []
    load = {"scratch": tmp_path, "say": said.append}
    first = load_rows(config, tokenizer, 400, **load)
    assert not said and first.entry is not None and first.entry.parent == tmp_path / "cache"
    again = load_rows(config, tokenizer, 400, **load)
    assert len(said) == 1 and _arrays(again) == _arrays(first) and again.stats == first.stats
    memory = load_rows(dataclasses.replace(config, dataset_cache_dir=""), tokenizer, 400, **load)
    assert _arrays(memory) == _arrays(first)
    assert data_hash(memory) == data_hash(first) == data_hash(again)
    # One flipped byte: made again.
    file = first.entry / "input_ids"
    damaged = bytearray(file.read_bytes())
    damaged[40] ^= 1
    file.write_bytes(damaged)
    assert tokens.load_tokens(first.entry) is None
    assert _arrays(load_rows(config, tokenizer, 400, **load)) == _arrays(memory)
    (first.entry / "meta.json").unlink()
    assert tokens.load_tokens(first.entry) is None
    empty = dataclasses.replace(config, response_part="no such", instruction_part="text")
    for _ in range(2):  # rows without anything to train are not kept
        with pytest.raises(UserError, match="nothing is left to train"):
            load_rows(empty, tokenizer, 400, **load)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [first.entry.name]


def test_the_key_of_kept_tokens_sees_all_that_shapes_them(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", pairs(3))

    def key(template: str = TEMPLATE, **settings: Any) -> str:
        config = TrainConfig(**{"model": "m", "dataset": str(rows), **settings})
        directory = write_byte_level(tmp_path / "t", chat_template=template)
        tokenizer = load_tokenizer(directory, chat_template=config.chat_template)
        names = [name for name, _ in config.sources]
        return cache_key(names, config, tokenizer, data_settings(config, config.packing))

    base = key()
    assert key() == base == key(learning_rate=1.0, seed=1, dataset_num_proc=3, output_dir="x")
    other = write_rows(tmp_path / "other.jsonl", pairs(3))
    changed = [
        key(template=TEMPLATE + " "),
        key(chat_template="alpaca"),
        key(max_length=77),
        key(overlong="drop"),
        key(completion_only_loss=False),
        key(assistant_only_loss=True),
        key(instruction_part="a", response_part="b"),
        key(packing=True),
        key(packing=True, packing_strategy="wrapped"),
        key(columns=("text=prompt",)),
        key(dataset_format="text"),
        key(dataset_text_field="prompt"),
        key(skip_bad=True),
        key(dataset=(str(rows), str(other))),
        key(template=TEMPLATE + "{{ strftime_now('%Y') }}"),
    ]
    rows.write_bytes(rows.read_bytes().replace(b"What", b"Whaz", 1))
    changed.append(key())
    assert len({base, *changed}) == len(changed) + 1


def test_many_tokens_go_to_files_that_have_no_name(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = named_rows(pairs(50), "mem")
    held = tokenize([rows], tokenizer, Settings(packing="bfd", max_length=64))
    monkeypatch.setattr(tokens, "HELD_BYTES", 500)
    writer = TokenWriter(tmp_path)
    spilled = tokenize([rows], tokenizer, Settings(packing="bfd", max_length=64), writer=writer)
    assert _arrays(spilled) == _arrays(held) and data_hash(spilled) == data_hash(held)
    assert spilled.row_targets is not None and held.row_targets is not None
    assert spilled.row_targets.tolist() == held.row_targets.tolist()
    assert list(tmp_path.iterdir()) == []
    bad = named_rows([*pairs(50), {"prompt": 1, "completion": "x"}], "mem")
    with pytest.raises(UserError, match="row 50"):
        tokenize([bad], tokenizer, Settings(), writer=TokenWriter(tmp_path))
    assert list(tmp_path.iterdir()) == []
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(UserError, match="cannot be written there"):
            tokenize([rows], tokenizer, Settings(), writer=TokenWriter(tmp_path / "sub"))


def test_processes_do_not_change_the_result(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*pairs(1500), {"prompt": "a", "completion": " "}])
    rows = read_rows(str(path), columns={})
    settings = Settings(packing="bfd", max_length=64)
    one = tokenize([rows], tokenizer, settings)
    two = tokenize([rows], tokenizer, settings, num_proc=2)
    assert _arrays(one) == _arrays(two) and one.stats == two.stats
    assert one.stats["dropped"] == {"empty": 1}
    path.write_text(path.read_text() + '{"prompt": 1, "completion": "x"}\n')
    rows = read_rows(str(path), columns={})
    with pytest.raises(UserError, match=r"rows\.jsonl:1502 \(row 1501\): prompt is a number"):
        tokenize([rows], tokenizer, settings, num_proc=2)


def test_a_process_that_ends_unasked_is_told(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise BrokenProcessPool("a child process terminated abruptly")

    monkeypatch.setattr("minisft.data.tokenize.ProcessPoolExecutor.submit", broken)
    with pytest.raises(
        UserError,
        match=r"--dataset-num-proc 2: a tokenising worker died .* try --dataset-num-proc 1",
    ):
        tokenize([named_rows(pairs(1001), "mem")], tokenizer, Settings(), num_proc=2)


# ------------------------------------------------------------------------------------- long rows


LONG = [
    {"prompt": "0123456789" * 3, "completion": "42"},
    {"prompt": "0", "completion": "0123456789"},
    {"prompt": "0", "completion": "1"},
]


@pytest.mark.parametrize(
    ("overlong", "lengths", "counts"),
    [
        (None, [6, 4], {"truncated": 1, "split": 0}),
        ("truncate", [6, 4], {"truncated": 1, "split": 0}),
        ("drop", [4], {"truncated": 0, "split": 0}),
        ("split", [4, 6, 6, 1, 4], {"truncated": 0, "split": 2}),
    ],
)
def test_overlong_rows(
    overlong: str | None, lengths: list[int], counts: dict, tokenizer: Tokenizer
) -> None:
    settings = Settings(max_length=6, overlong=overlong)
    dataset = tokenize([named_rows(LONG, "mem")], tokenizer, settings)
    found = [b - a for i in range(len(dataset)) for a, b in dataset.row_documents(i)]
    whole = tokenize([named_rows(LONG, "mem")], tokenizer, Settings())
    if overlong == "split":  # pieces without a trained label are left out
        first = whole.row_documents(0)[0][1]
        assert found[0] == first % 6 or found[0] == 6
        assert found[-1] == 4 and sum(found[1:-1]) > 6
    else:
        assert found == lengths
    assert {k: dataset.stats[k] for k in counts} == counts
    reasons = {"drop": "longer than max_length", None: "nothing to train within max_length"}
    if overlong in reasons:
        assert reasons[overlong] in dataset.stats["dropped"]
    trained = whole.labels[whole.labels != IGNORED].tolist()
    kept = dataset.labels[dataset.labels != IGNORED].tolist()
    assert (kept == trained) == (overlong == "split")


def test_overlong_rows_may_stop_the_run(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"mem \(row 0\): 3\d tokens; --max-length is 6"):
        tokenize([named_rows(LONG, "mem")], tokenizer, Settings(max_length=6, overlong="error"))
    with pytest.raises(UserError, match="expected one of truncate, drop, split, error"):
        TrainConfig(model="m", dataset="rows.jsonl", overlong="cut")  # pyright: ignore


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_overlong_comes_before_packing(strategy: str, tokenizer: Tokenizer) -> None:
    def packed(overlong: str | None) -> TokenizedDataset:
        settings = Settings(max_length=6, overlong=overlong, packing=strategy)
        return tokenize([named_rows(LONG, "mem")], tokenizer, settings)

    whole = len(tokenize([named_rows(LONG, "mem")], tokenizer, Settings()).input_ids)
    assert packed("drop").stats["dropped"] == {"longer than max_length": 2}
    assert packed("split").stats["num_tokens"] == whole
    assert packed("truncate").stats["num_tokens"] == 6 + 6 + 4
    left = packed(None).stats
    assert left["num_tokens"] == (16 if strategy == "bfd" else whole)
    assert (left["truncated"], left["split"]) == ((2, 0) if strategy == "bfd" else (0, 2))


# ----------------------------------------------------------------------------- preview, dry run


def test_preview_json_holds_every_row_in_dataset_order(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", pairs(1100))
    file = tmp_path / "deep" / "preview.json"
    given = {"model": model, "dataset": rows, "max_length": 64, "packing": True, "dry_run": True}
    given |= {"output_dir": tmp_path / "out"}
    outcome = train(**given, preview=10**6, preview_json=file)
    assert not (tmp_path / "out").exists()
    tokenizer = load_tokenizer(model)
    config = TrainConfig(model="m", dataset=str(rows), max_length=64, packing=True)
    dataset = load_rows(config, tokenizer, 400, scratch=tmp_path, say=print)
    shown = read(file)["rows"]
    assert len(shown) == len(dataset) > 100
    for i, row in enumerate(shown):
        documents = dataset.row_documents(i)
        a, b = documents[0][0], documents[-1][1]
        assert row["input_ids"] == dataset.input_ids[a:b].tolist()
        assert row["labels"] == dataset.labels[a:b].tolist()
        assert row["position_ids"] == [j for x, y in documents for j in range(y - x)]
        assert row["document_ids"] == [
            n for n, (x, y) in enumerate(documents) for _ in range(y - x)
        ]
        assert row["text"] == tokenizer.backend.decode(row["input_ids"], skip_special_tokens=False)
    steps = -(-len(dataset) // 8)
    assert f"steps   {steps} ({steps} an epoch)" in outcome.out
    train(**given, preview=len(dataset), preview_json=file)  # more than the sample makes
    assert read(file)["rows"] == shown
    train(**given, preview_json=file)  # all rows, too
    assert len(read(file)["rows"]) == len(dataset)
    outcome = train(**given, preview=2, preview_json=file)
    assert read(file)["rows"] == shown[:2] and "=== row 1:" in outcome.out
    assert "about" in outcome.out and "(a sample of 1,100 rows)" in outcome.out


def test_preview_marks_the_trained_tokens(model: Path, tmp_path: Path) -> None:
    evil = "\x1b[31mred"
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": evil + " What", "completion": " fox\n"}])
    given = {"model": model, "dataset": rows, "dry_run": True, "per_device_train_batch_size": 1}
    given |= {"output_dir": tmp_path / "out"}
    lines = train(**given, preview=1).out.splitlines()
    at = lines.index("<|bos|>\\x1b[31mred What[[ fox")
    assert lines[at - 1].startswith("=== row 0: ") and lines[at + 1] == "<|eot|>]]"
    assert lines[at + 2].startswith("ids: 0 ") and lines[at + 2].endswith(" 1]]")
    text = write_rows(tmp_path / "text.jsonl", [{"text": "the fox"}])
    lines = train(**given | {"dataset": text}, preview=1).out.splitlines()
    assert "<|bos|>[[the fox<|eot|>]]" in lines  # nothing precedes BOS, so it is not a target
    short = train(**given).out.splitlines()
    assert "row 0   <|bos|>\\x1b[31mred What[[ fox\\n<|eot|>]]" in short


def test_trained_tokens_are_green_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal(io.BytesIO(), encoding="ascii"))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert preview.terminal_style() == ("\x1b[32m", "\x1b[0m")
    assert preview.printable("é\n\t\x07\u202e") == "\\xe9\n\t\\x07\\u202e"
    monkeypatch.setenv("TERM", "dumb")
    assert preview.terminal_style() == ("[[", "]]")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert preview.terminal_style() == ("[[", "]]")


def test_a_dry_run_tells_what_would_be_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", pairs(20))
    given = {"model": model, "dataset": rows, "dry_run": True, "output_dir": tmp_path / "out"}
    before = sorted(tmp_path.rglob("*"))
    out = train(**given, eval_dataset=rows, num_train_epochs=3).out
    settings = next(li for li in out.splitlines() if li.startswith("settings "))
    assert f"--dataset {rows} " in settings and "--num-train-epochs 3" in settings
    assert "lora" not in settings  # the default's
    assert "20 rows" in out and "format prompt-completion" in out and "memory  about" in out
    assert "steps   9 (3 an epoch)" in out and sorted(tmp_path.rglob("*")) == before
    small = write_model(tmp_path / "small", vocab_size=300)
    other = write_model(tmp_path / "other")
    (other / "config.json").write_text(
        (other / "config.json").read_text().replace('"hidden_size": 32', '"hidden_size": 64')
    )
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": None}])
    for change, reason in (
        ({"dataset": bad}, "completion is null"),
        ({"model": small}, "does not exist in the model, whose embedding has 300 rows"),
        ({"model": other}, "64"),
        ({"dataset": tmp_path / "no.jsonl"}, "no such file"),
        ({"target_modules": "nothing"}, "nothing"),
    ):
        outcome = call("train", flags(**given | change))
        assert outcome.code == 2 and reason in outcome.err and outcome.err.count("\n") == 1


def test_torch_is_not_asked_for_a_gpu_in_a_dry_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a kernel ran")

    rows = write_rows(tmp_path / "rows.jsonl", pairs(3))
    monkeypatch.setattr(torch.cuda, "init", refuse)
    monkeypatch.setattr("minisft.files.weights.iter_tensors", refuse)
    train(model=model, dataset=rows, dry_run=True, output_dir=tmp_path / "out")
