"""Reading files, tokenising rows and packing: rows kept, counts, error messages."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokenizer import TEMPLATE, write_byte_level
from tokenised import encode_texts, tokenize_rows

from minisft.batches import IGNORED, TokenizedDataset
from minisft.config.errors import UserError
from minisft.config.train import TrainConfig
from minisft.data.readers import Rows, read_rows
from minisft.data.token_files import data_hash
from minisft.text.encoding import decode, encode_batch
from minisft.text.tokenizer import Tokenizer, load_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
BOS, EOT = 0, 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_byte_level(tmp_path_factory.mktemp("tokenizer")))


def _tokenize(rows: list[dict], tokenizer: Tokenizer, **options: Any) -> TokenizedDataset:
    return tokenize_rows(rows, tokenizer, source="mem", **options)


def _texts(dataset: TokenizedDataset, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(whole text, trained text) of each row."""
    out = []
    for i in range(len(dataset)):
        ((a, b),) = dataset.row_documents(i)
        ids, labels = dataset.input_ids[a:b], dataset.labels[a:b]
        assert bool(((labels == ids) | (labels == IGNORED)).all())
        shown = [ids.tolist(), labels[labels != IGNORED].tolist()]
        out.append(tuple(decode(tokenizer, row, skip_special_tokens=False) for row in shown))
    return out


# --------------------------------------------------------------------------------- reading files


def _write(path: Path, content: bytes | str) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def _read(path: Path, content: bytes | str, **options: Any) -> Rows:
    return read_rows(_write(path, content), **({"columns": {}} | options))


@pytest.mark.parametrize(
    "content",
    [
        b'{"text": "a"}\n{"text": "b"}\n',
        b'{"text": "a"}\n{"text": "b"}',
        b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n',
        b'\n\n{"text": "a"}\n   \n{"text": "b"}\n\n',
    ],
)
def test_jsonl_edges_are_accepted(content: bytes, tmp_path: Path) -> None:
    rows = _read(tmp_path / "x.jsonl", content)
    assert [row["text"] for row in rows] == ["a", "b"] and rows.columns == ("text",)
    assert len(rows) == 2


def test_rows_know_their_line(tmp_path: Path) -> None:
    rows = _read(tmp_path / "x.jsonl", '\n{"text": "a"}\n\n{"text": "b"}')
    assert rows.where(1) == f"{tmp_path}/x.jsonl:4 (row 1)"


def test_strange_text_survives(tmp_path: Path) -> None:
    texts = ["\0", "🙂‍🧑", "שלום", "\u2028", "a\r\nb", "x" * 300_000]
    content = "\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts)
    assert [row["text"] for row in _read(tmp_path / "x.jsonl", content)] == texts


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.json", '[{"a": 1}, {"a": 2, "b": 3}]', [{"a": 1}, {"a": 2, "b": 3}]),
        ("x.json", '{"version": 1, "data": [{"a": 1}]}', [{"a": 1}]),
        ("x.json", '{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ("x.json", b'\xef\xbb\xbf[{"a": "\xc3\xa9"}]', [{"a": "é"}]),
        (
            "x.csv",
            'a,b\n1,"x, ""y""\nz"\n\n2,\n',
            [{"a": "1", "b": 'x, "y"\nz'}, {"a": "2", "b": ""}],
        ),
        ("x.csv", b"\xef\xbb\xbfa,b\r\n1,2\r\n", [{"a": "1", "b": "2"}]),
        ("x.csv", ",a\n0,x\n", [{"Unnamed: 0": "0", "a": "x"}]),  # as pandas writes it
        ("x.csv", "a\n" + "w" * 200_000, [{"a": "w" * 200_000}]),
    ],
)
def test_other_files(name: str, content: str | bytes, expected: list, tmp_path: Path) -> None:
    assert list(_read(tmp_path / name, content)) == expected


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["a", None], "messages": [[{"role": "user"}], []]})
    parquet.write_table(table, tmp_path / "x.parquet")
    rows = read_rows(str(tmp_path / "x.parquet"), columns={})
    assert list(rows) == table.to_pylist() and rows.columns == ("text", "messages")
    with pytest.raises(UserError, match=r"bad\.parquet: not a readable parquet file"):
        _read(tmp_path / "bad.parquet", "PAR1 nothing")


def test_parquet_is_read_by_row_groups(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": [f"row {i}" for i in range(5000)]})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=1700)
    rows = read_rows(str(tmp_path / "x.parquet"), columns={})
    assert list(rows) == table.to_pylist() and len(rows) == 5000
    wanted = [4999, 0, 1699, 1700, 3399, 3400, 2700]
    assert [rows[i]["text"] for i in wanted] == [f"row {i}" for i in wanted]
    again = pickle.loads(pickle.dumps(rows))  # as another process gets them
    assert [again[i] for i in wanted] == [rows[i] for i in wanted]


def test_lines_are_read_again_when_asked_for(tmp_path: Path) -> None:
    content = "".join(json.dumps({"text": f"é{i}" * (i % 50)}) + "\n" for i in range(3000))
    rows = _read(tmp_path / "x.jsonl", content)
    assert rows[2999] == {"text": "é2999" * 49} and rows[0] == {"text": ""}
    again = pickle.loads(pickle.dumps(rows))
    assert list(again) == list(rows) and len(pickle.dumps(rows)) < 60_000  # offsets, no rows
    _write(tmp_path / "x.jsonl", "\n" * len(content.encode()))
    fresh = pickle.loads(pickle.dumps(rows))
    with pytest.raises(UserError, match=r"x\.jsonl:8: the line is gone; the file was changed"):
        fresh[7]


@pytest.mark.parametrize(
    ("name", "content", "culprit"),
    [
        ("x.jsonl", '{"text": "a"}\n{"text": oops}\n', r"x\.jsonl:2: malformed JSON.*oops"),
        ("x.jsonl", '{"text": "a', r"\(Unterminated string starting at column 10: "),
        ("x.csv", "a,\n1,2\n", r"x\.csv: header is \['a', ''\]"),
        ("x.jsonl", '{"text": "a"\n', r"x\.jsonl:1: malformed JSON"),
        ("x.jsonl", '{"text": "a"}\n[1]\n', r"x\.jsonl:2: the row is list"),
        ("x.jsonl", "null", r"x\.jsonl:1: the row is NoneType"),
        ("x.jsonl", "[" * 100_000, r"x\.jsonl:1: malformed JSON \(nested too deeply"),
        ("x.jsonl", b'{"text": "a"}\r\n{"text": "caf\xe9"}', r"x\.jsonl:2: .*byte 28 \(0xe9\)"),
        ("x.jsonl", b'\xef\xbb\xbf{"a": "\xe9"}', r"byte 10 \(0xe9\)"),
        ("x.jsonl", "", r"x\.jsonl: holds no rows"),
        ("x.jsonl", "\n \n", r"x\.jsonl: holds no rows"),
        ("x.json", "[]", r"x\.json: holds no rows"),
        ("x.json", '[{"a": 1},\n {"a": }]', r"x\.json:2: malformed JSON"),
        ("x.json", '[{"a": 1}, 3]', r"x\.json \(row 1\): the row is int"),
        ("x.json", '{"a": [], "b": []}', r"keys a, b; expected a list"),
        ("x.json", '"text"', r"x\.json: is str"),
        ("x.json", b'[{"a": "\xe9"}]', r"x\.json: not UTF-8 at byte 8"),
        ("x.csv", "a,b\n1,2\n1,2,3\n", r"x\.csv:3: 3 fields; the header has 2 \(a, b\)"),
        ("x.csv", 'a,b\n1,"2\n', r"x\.csv:\d: malformed CSV"),
        ("x.csv", "a,a\n1,2\n", r"x\.csv: header is \['a', 'a'\]"),
        ("x.csv", "a,b\n", r"x\.csv: holds no rows"),
        ("x.csv", "a;b\n1;2\n", r"x\.csv: the header is one field, 'a;b'; is the .* ';'.*\(a,b\)"),
        ("x.csv", "a\tb\n1\t2\n", r"separated by '\\t'"),
        ("x.csv", b"a,b\n1,\xff\n", r"x\.csv: not UTF-8 at byte 6 \(0xff\)"),
        ("x.tsv", "a\tb\n", r"unknown file type '\.tsv'; expected \.jsonl, \.json, \.csv"),
    ],
)
def test_faulty_files_name_the_place(
    name: str, content: str | bytes, culprit: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=culprit) as caught:
        _read(tmp_path / name, content)
    assert "\n" not in str(caught.value)


def test_missing_files_and_directories(tmp_path: Path) -> None:
    for source in (str(tmp_path / "no.jsonl"), "no/such/rows.csv", "/no/such"):
        with pytest.raises(UserError, match="no such file"):
            read_rows(source, columns={})
    with pytest.raises(UserError, match=r"is a directory; expected a file ending in \.jsonl"):
        read_rows(str(tmp_path), columns={})
    path = _write(tmp_path / "x.jsonl", '{"text": "a"}')
    with pytest.raises(UserError, match="split is 'test'"):
        read_rows(path, split="test", columns={})


def test_unknown_hub_dataset_is_a_user_error() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=r"nobody/nothing: neither a file nor a dataset") as caught:
        read_rows("nobody/nothing", columns={})
    assert "\n" not in str(caught.value)


def test_hub_dataset_through_load_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([{"q": "1", "answer": "2"}, {"q": "3", "answer": "4"}])
    asked = []

    def load_dataset(source: str, split: str) -> Any:
        asked.append((source, split))
        return made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows("org/name", split="test", columns={"prompt": "q", "completion": "answer"})
    assert asked == [("org/name", "test")]
    assert list(rows) == [{"prompt": "1", "completion": "2"}, {"prompt": "3", "completion": "4"}]


def test_skip_bad_counts_malformed_lines(tmp_path: Path, tokenizer: Tokenizer) -> None:
    content = b'{"text": "a"}\noops\n{"text": "\xff"}\n{"text": null}\n{"text": "b"}\n'
    rows = _read(tmp_path / "x.jsonl", content, skip_bad=True)
    assert rows.skipped == 2 and len(rows) == 3
    dataset = tokenize_rows(rows, tokenizer, skip_bad=True)
    assert dataset.stats["dropped"] == {"malformed": 3}
    assert dataset.stats["rows_read"] == 5 and dataset.stats["rows_kept"] == len(dataset) == 2


# --------------------------------------------------------------------------------------- columns


def test_columns_are_renamed(tmp_path: Path) -> None:
    content = '{"question": "q", "answer": "a", "prompt": "old", "id": 1}\n{"answer": "b"}'
    rows = _read(
        tmp_path / "x.jsonl", content, columns={"prompt": "question", "completion": "answer"}
    )
    assert rows.columns == ("prompt", "completion", "id")
    assert rows[0] == {"prompt": "q", "completion": "a", "id": 1}
    assert rows[1] == {"completion": "b"}


@pytest.mark.parametrize(
    ("columns", "culprit"),
    [
        ({"prompt": "qestion"}, r"no column 'qestion'.*found columns question, answer.*'question'"),
        ({"promt": "question"}, "'promt' is not a name we read; did you mean prompt"),
    ],
)
def test_wrong_column_flags_name_the_nearest(columns: dict, culprit: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=culprit):
        _read(tmp_path / "x.jsonl", '{"question": "q", "answer": "a"}', columns=columns)


# ------------------------------------------------------------------------------------ tokenising


def test_text_gets_bos_and_one_eos(tokenizer: Tokenizer) -> None:
    dataset = _tokenize([{"text": "the fox"}, {"text": "the dog<|eot|>"}], tokenizer)
    assert _texts(dataset, tokenizer) == [
        ("<|bos|>the fox<|eot|>",) * 2,
        ("<|bos|>the dog<|eot|>",) * 2,
    ]
    assert dataset.stats["num_trained_tokens"] == len(dataset.input_ids) - 2  # BOS is not a target
    assert dataset.input_ids.dtype == dataset.labels.dtype == torch.int32
    assert dataset.row_offsets.dtype == dataset.document_offsets.dtype == torch.int64
    assert dataset.stats["max_token_id"] == int(dataset.input_ids.max())


def test_prompt_is_masked_and_eos_is_trained(tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "What is", "completion": " the answer"}]
    ((whole, trained),) = _texts(_tokenize(rows, tokenizer), tokenizer)
    assert (whole, trained) == ("<|bos|>What is the answer<|eot|>", " the answer<|eot|>")
    dataset = _tokenize(rows, tokenizer, completion_only_loss=False)
    assert _texts(dataset, tokenizer)[0][1] == whole


def test_chat_has_one_bos_and_no_appended_eos(tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]
    chat = _tokenize([{"messages": turns}], tokenizer)
    ((whole, trained),) = _texts(chat, tokenizer)
    assert whole.startswith("<|bos|><|start|>user") and whole.endswith("you<|eot|>")
    assert whole.count("<|bos|>") == 1 and whole.count("<|eot|>") == 2 and trained == whole
    spans = _tokenize([{"messages": turns}], tokenizer, assistant_only_loss=True)
    assert _texts(spans, tokenizer) == [(whole, "you<|eot|>")]
    split = _tokenize([{"prompt": turns[:1], "completion": turns[1:]}], tokenizer)
    assert _texts(split, tokenizer) == [(whole, "you<|eot|>")]


def test_template_arguments_of_a_row(tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "hi"}]
    rows = [{"messages": turns, "chat_template_kwargs": {"bos_token": "the"}}, {"messages": turns}]
    texts = [whole for whole, _ in _texts(_tokenize(rows, tokenizer), tokenizer)]
    assert texts[0].startswith("the<|start|>") and texts[1].startswith("<|bos|><|start|>")
    rows[0]["chat_template_kwargs"] = {"continue_final_message": True}
    with pytest.raises(UserError, match=r"mem \(row 0\).*continue_final_message"):
        _tokenize(rows, tokenizer)


CHATML = "{% for m in messages %}<{{ m.role }}>{{ CONTENT }}<|eot|>{% endfor %}"
_JOINED = "<user>look here<|eot|><assistant>seen<|eot|>"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("m.content", _JOINED),  # would print Python
        ("m.content | tojson if m.content is not string else m.content", _JOINED),  # or JSON
        ("m.content if m.content is string", _JOINED),  # would leave it out
        ("'' + m.content", _JOINED),  # would fail
        (
            "m.content if m.role == 'assistant' else m.content | map(attribute='text') | join('|')",
            "<user>look |here<|eot|><assistant>seen<|eot|>",  # reads the user's
        ),
        (
            "m.content | map(attribute='text') | join('|') if m.content is not string",
            "<user>look |here<|eot|><assistant>seen<|eot|>",
        ),
    ],
)
def test_parts_are_read_by_the_template_or_joined(
    content: str, expected: str, tokenizer: Tokenizer
) -> None:
    def part(text: str) -> dict:
        return {"type": "text", "text": text}

    chat = [
        {"role": "user", "content": [part("look "), part("here")]},
        {"role": "assistant", "content": [part("seen")]},
    ]
    template = {"chat_template_kwargs": {"chat_template": CHATML.replace("CONTENT", content)}}
    for row in ({"messages": chat}, {"prompt": chat[:1], "completion": chat[1:]}):
        dataset = _tokenize([row | template], tokenizer)
        assert _texts(dataset, tokenizer)[0][0] == expected
        reads_all = "is not string" in content and "tojson" not in content
        said = ["in parts" in w for w in dataset.stats["warnings"]]
        assert any(said) != reads_all


def test_a_tool_call_without_content_stands_beside_contents_in_parts(tokenizer: Tokenizer) -> None:
    chat = [
        {"role": "user", "content": "how many"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]},
        {"role": "tool", "content": [{"type": "text", "text": "4"}]},
        {"role": "assistant", "content": "four"},
    ]
    template = {"chat_template_kwargs": {"chat_template": CHATML.replace("CONTENT", "m.content")}}
    (text, *_), *_ = _texts(_tokenize([{"messages": chat} | template], tokenizer), tokenizer)
    assert text == "<user>how many<|eot|><assistant><|eot|><tool>4<|eot|><assistant>four<|eot|>"


def test_a_part_that_the_template_does_not_read_is_refused(tokenizer: Tokenizer) -> None:
    thought = {"type": "thinking", "thinking": "hm"}
    rows = [{"messages": [{"role": "assistant", "content": [thought, "seen"]}]}]
    with pytest.raises(UserError, match=r"row 0.*message 0: part 0 .* type 'thinking'"):
        _tokenize(rows, tokenizer)


def test_alpaca_and_sharegpt_rows(tokenizer: Tokenizer) -> None:
    rows = [
        {"instruction": "What is it?", "input": "the fox", "output": "a dog"},
        {"instruction": "Again?", "input": "", "output": "a fox", "system": "Be quick."},
    ]
    dataset = _tokenize(rows, tokenizer)
    (one, trained), (two, _) = _texts(dataset, tokenizer)
    assert one.startswith("<|bos|><|start|>user<|end|>\nWhat is it?\n\nthe fox<|eot|>")
    assert two.startswith("<|bos|><|start|>system<|end|>\nBe quick.<|eot|><|start|>user")
    assert trained == "a dog<|eot|>" and dataset.stats["format"] == "alpaca"
    everything = _tokenize(rows, tokenizer, completion_only_loss=False)
    assert _texts(everything, tokenizer)[0] == (one, one)
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "you"}]
    dataset = _tokenize([{"conversations": turns}], tokenizer, assistant_only_loss=True)
    assert (
        _texts(dataset, tokenizer)[0][1] == "you<|eot|>" and dataset.stats["format"] == "sharegpt"
    )


def test_one_source_may_hold_texts_and_chats(tokenizer: Tokenizer) -> None:
    """Each is encoded as its kind: a text gets the tokenizer's BOS, a chat its template's."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]
    rows = [
        {"prompt": "What is", "completion": " the fox"},
        {"prompt": turns[:1], "completion": turns[1:]},
    ]
    for order in (rows, rows[::-1]):
        together = _texts(_tokenize(order, tokenizer), tokenizer)
        assert together == [_texts(_tokenize([row], tokenizer), tokenizer)[0] for row in order]
        assert all(whole.count("<|bos|>") == 1 for whole, _ in together)


def test_chats_without_an_answer_are_a_warning(tokenizer: Tokenizer) -> None:
    asked = {"role": "user", "content": "a"}
    rows = [{"messages": [asked]}, {"messages": [asked, {"role": "assistant", "content": "b"}]}]
    (warning,) = _tokenize(rows, tokenizer).stats["warnings"]
    assert warning.startswith("1 of 2 chats hold no assistant message, and every token of them is")
    assert "--assistant-only-loss" in warning


def test_tools_that_the_template_leaves_out_are_a_warning(tmp_path: Path) -> None:
    template = "{{ tools | tojson if tools and messages | length > 1 }}{{ messages[0].content }}"
    tokenizer = load_tokenizer(write_byte_level(tmp_path, chat_template=template))
    asked, tools = {"role": "user", "content": "a"}, [{"name": "f"}]
    rows = [
        {"messages": [asked], "tools": tools},
        {"messages": [asked], "chat_template_kwargs": {"tools": tools}},
        {"messages": [asked, asked], "tools": tools},
        {"messages": [asked, asked]},
    ]
    warnings = _tokenize(rows, tokenizer).stats["warnings"]
    assert [w[:24] for w in warnings if "tools" in w] == ["2 of 4 chats have tools "]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
@pytest.mark.parametrize("derived", [False, True])
def test_answers_marked_as_not_to_train_are_left_out_or_told(
    mark: dict, derived: bool, tmp_path: Path
) -> None:
    config = {}
    if derived:
        config["chat_template"] = re.sub(r"\{% (end)?generation %\}", "", TEMPLATE)
    tokenizer = load_tokenizer(write_byte_level(tmp_path, **config))
    ask, marked, answer = (
        {"role": "user", "content": "a", "weight": 0},
        {"role": "assistant", "content": "dog"} | mark,
        {"role": "assistant", "content": "fox", "weight": 1, "train": True},
    )
    rows = [{"messages": [ask, marked, ask, answer]}, {"messages": [ask, marked]}]
    dataset = _tokenize(rows, tokenizer, assistant_only_loss=True)
    assert [trained for _, trained in _texts(dataset, tokenizer)] == ["fox<|eot|>"]
    assert dataset.stats["dropped"] == {"nothing to train": 1} and not dataset.stats["warnings"]
    rows.append({"prompt": [ask, marked, ask], "completion": [answer]})
    rows.append({"prompt": [ask], "completion": [marked]})
    (warning,) = _tokenize(rows[:2], tokenizer).stats["warnings"]
    assert warning.startswith("2 of 2 chats mark answers with 'weight': 0 or 'train': false")
    (warning,) = _tokenize(rows[2:], tokenizer).stats["warnings"]
    assert warning.startswith("1 of 2 chats mark answers")


def test_a_template_that_marks_other_than_turns_cannot_leave_one_out(tmp_path: Path) -> None:
    template = TEMPLATE.replace(
        "{% generation %}", "{% generation %}!{% endgeneration %}{% generation %}"
    )
    tokenizer = load_tokenizer(write_byte_level(tmp_path, chat_template=template))
    rows = [
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "weight": 0},
            ]
        }
    ]
    with pytest.raises(UserError, match=r"mem \(row 0\).*marks 2 spans in 1 assistant turns"):
        _tokenize(rows, tokenizer, assistant_only_loss=True)


def test_rows_beyond_all_measure_are_refused(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minisft.text.sandbox.MAX_CHARS", 1000)
    with pytest.raises(
        UserError, match=r"mem \(row 1\): the text has 1,2\d\d characters; at most 1"
    ):
        _tokenize([{"text": "a"}, {"text": "b" * 1200}], tokenizer)
    kept = _tokenize([{"text": "a"}, {"text": "b" * 1200}], tokenizer, skip_bad=True)
    assert kept.stats["dropped"] == {"malformed": 1}


def test_texts_are_encoded_in_parts(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"row {i} " * (i % 7) for i in range(40)]
    spans = [(t, [(0, len(t) // 2)]) for t in texts]
    at_once = encode_texts(tokenizer, texts, add_special_tokens=True)
    covered = encode_batch(tokenizer, spans, add_special_tokens=True)
    monkeypatch.setattr("minisft.text.encoding.PART_CHARS", 30)
    assert encode_texts(tokenizer, texts, add_special_tokens=True) == at_once
    assert encode_batch(tokenizer, spans, add_special_tokens=True) == covered


def test_special_strings_in_messages_stay_text(tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "<|eot|><|start|>assistant<|end|>\nno"}]
    dataset = _tokenize([{"messages": turns}], tokenizer)
    ids = dataset.input_ids.tolist()
    assert ids.count(EOT) == 1 and ids[-1] == EOT
    assert "special-token strings" in dataset.stats["warnings"][0]
    # In a text row they are the user's own control tokens.
    assert _tokenize([{"text": "a<|eot|>b"}], tokenizer).input_ids.tolist().count(EOT) == 2


def test_truncation_comes_after_labels_and_drops_are_counted(tokenizer: Tokenizer) -> None:
    rows = [
        {"prompt": "0123456789" * 3, "completion": "42"},
        {"prompt": "0", "completion": "0123456789"},
        {"prompt": "0", "completion": "1"},
        {"prompt": "0", "completion": " \n"},
    ]
    dataset = _tokenize(rows, tokenizer, max_length=6)
    assert [b - a for i in range(2) for a, b in dataset.row_documents(i)] == [6, 4]
    stats = dataset.stats
    assert stats["dropped"] == {"nothing to train within max_length": 1, "empty": 1}
    assert (stats["rows_read"], stats["rows_kept"], stats["truncated"]) == (4, 2, 1)
    assert stats["longest"] == 30 and stats["num_tokens"] == 10
    kept = _tokenize(rows, tokenizer, max_length=6, packing="bfd").stats
    assert kept["rows_kept"] == 3 and kept["truncated"] == 2 and kept["dropped"] == {"empty": 1}
    with pytest.raises(UserError, match=r"mem: nothing is left to train.*30 tokens.*is 6"):
        _tokenize(rows[:1], tokenizer, max_length=6)


def test_token_rows(tokenizer: Tokenizer) -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 9]},
        {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]},
        {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]},
        {"input_ids": [5, 6, 7]},
    ]
    dataset = _tokenize(rows, tokenizer, completion_only_loss=True)
    assert dataset.labels.reshape(-1, 3).tolist() == [
        [-100, 6, 9],
        [-100, 6, 7],
        [-100, 6, -100],
        [5, 6, 7],
    ]
    labels = _tokenize(rows, tokenizer).labels.reshape(-1, 3)
    assert labels[1].tolist() == [5, 6, 7] and labels[2].tolist() == [5, 6, -100]


def test_padding_is_taken_out(tokenizer: Tokenizer) -> None:
    rows = [
        {"input_ids": [9, 9, 5, 6], "attention_mask": [0, 0, 1, 1]},
        {"input_ids": [5, 7, 8, 9], "labels": [-100, 7, 8, 9], "attention_mask": [1, 1, 1, 0]},
        {"input_ids": [4, 5], "attention_mask": [1, 1], "completion_mask": [0, 1]},
    ]
    dataset = _tokenize(rows, tokenizer)
    assert dataset.input_ids.tolist() == [5, 6, 5, 7, 8, 4, 5]
    assert dataset.labels.tolist() == [5, 6, -100, 7, 8, 4, 5]
    assert dataset.stats["padded"] == 2 and dataset.stats["longest"] == 3
    (warning,) = dataset.stats["warnings"]
    assert warning.startswith("1 of 3 rows have a completion_mask, which only --completion-only")
    for asked in (True, False):
        assert not _tokenize(rows, tokenizer, completion_only_loss=asked).stats["warnings"]


@pytest.mark.parametrize(
    ("row", "culprit"),
    [
        ({"text": None}, r"mem \(row 1\): text is null"),
        ({"text": "\ud83d"}, r"mem \(row 1\).*lone surrogate U\+D83D"),
        ({"messages": []}, r"mem \(row 1\): messages is an empty list"),
        ({"prompt": "\ud83d", "completion": "x"}, r"mem \(row 1\).*lone surrogate"),
        ({"input_ids": [1, "2"]}, r"mem \(row 1\): input_ids"),
        ({"input_ids": [1, -2]}, r"mem \(row 1\): input_ids holds -2"),
        ({"input_ids": [1, 2**31]}, r"mem \(row 1\): input_ids holds"),
        ({"input_ids": [1, 1.5]}, r"mem \(row 1\): input_ids"),
        ({"input_ids": None}, r"mem \(row 1\): input_ids"),
        (
            {"input_ids": [1, 2], "attention_mask": [1, 2]},
            r"mem \(row 1\): attention_mask holds 2; expected 1 for a token and 0 for padding",
        ),
        ({"input_ids": [1, 2], "attention_mask": [1]}, r"\(row 1\): attention_mask has 1 entries"),
        ({"input_ids": [1, 2], "labels": [1]}, r"mem \(row 1\): labels has 1 entries; expected 2"),
    ],
)
def test_rows_at_fault_are_named_or_skipped(row: dict, culprit: str, tokenizer: Tokenizer) -> None:
    good = {
        "text": {"text": "a"},
        "messages": {"messages": [{"role": "user", "content": "a"}]},
        "prompt": {"prompt": "a", "completion": "b"},
        "input_ids": {"input_ids": [1, 2], "labels": [1, 2]},
    }[next(iter(row))]
    with pytest.raises(UserError, match=culprit):
        _tokenize([good, row, good], tokenizer)
    dataset = _tokenize([good, row, good], tokenizer, skip_bad=True)
    assert len(dataset) == 2 and dataset.stats["dropped"] == {"malformed": 1}


def test_a_template_that_refuses_a_row_names_it(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') if messages | length > 1 }}x"
    tokenizer = load_tokenizer(write_byte_level(tmp_path, chat_template=template))
    turn = {"role": "user", "content": "a"}
    with pytest.raises(UserError, match=r"mem \(row 1\): chat template: roles must alternate"):
        _tokenize([{"messages": [turn]}, {"messages": [turn, turn]}], tokenizer)


def test_settings_that_cannot_hold_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="assistant_only_loss needs chat rows"):
        _tokenize([{"text": "a"}], tokenizer, assistant_only_loss=True)
    with pytest.raises(UserError, match=r"mem \(row 0\): assistant_only_loss needs chat rows"):
        _tokenize([{"prompt": "a", "completion": "b"}], tokenizer, assistant_only_loss=True)
    turns = [{"role": "user", "content": "a"}]
    with pytest.raises(UserError, match=r"mem \(row 0\): assistant_only_loss finds no assistant"):
        _tokenize([{"messages": turns}], tokenizer, assistant_only_loss=True)
    with pytest.raises(UserError, match=r"format messages needs column messages; found columns"):
        _tokenize([{"mesages": turns}], tokenizer, format="messages")
    plain = load_tokenizer(write_byte_level(tmp_path, eos_token=None))
    with pytest.raises(UserError, match="no eos_token"):
        _tokenize([{"text": "a"}], plain)


def test_warnings_are_counted(tokenizer: Tokenizer) -> None:
    rows = [{"text": "<|bos|>the"}, {"text": "the"}, {"text": "the"}]
    stats = _tokenize(rows, tokenizer, completion_only_loss=True).stats
    assert stats["duplicates"] == 1 and len(stats["warnings"]) == 2
    assert stats["warnings"][0].startswith("1 of 3 rows start with two BOS")
    assert "completion_only_loss has no effect on format 'text'" in stats["warnings"][1]
    # "th" + "e" is one token, so the prompt's own last token is not there.
    stats = _tokenize([{"prompt": "th", "completion": "e fox"}], tokenizer).stats
    assert stats["warnings"][0].startswith("in 1 of 1 rows the prompt's last tokens change")


# --------------------------------------------------------------------------------------- packing


def _random_rows(rng: random.Random, num_rows: int, longest: int) -> list[dict]:
    rows = []
    for _ in range(num_rows):
        ids = [rng.randrange(1000) for _ in range(rng.randrange(0, longest))]
        rows.append({"input_ids": ids, "labels": [IGNORED if i % 3 == 0 else i for i in ids]})
    return rows


def _documents(dataset: TokenizedDataset) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    ids, labels = dataset.input_ids.tolist(), dataset.labels.tolist()
    return [
        (tuple(ids[a:b]), tuple(labels[a:b]))
        for i in range(len(dataset))
        for a, b in dataset.row_documents(i)
    ]


def test_best_fit_takes_the_tightest_bin(tokenizer: Tokenizer) -> None:
    rows = [{"input_ids": [n] * n} for n in (6, 3, 5, 4, 2)]
    packed = _tokenize(rows, tokenizer, packing="bfd", max_length=10)
    rows_of = [[b - a for a, b in packed.row_documents(i)] for i in range(len(packed))]
    assert rows_of == [[6, 4], [5, 3, 2]]
    assert packed.stats["packing_efficiency"] == 1.0 and packed.stats["rows_packed"] == 2


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packing_keeps_every_token_it_should(strategy: str, tokenizer: Tokenizer) -> None:
    rows = _random_rows(random.Random(3), num_rows=1300, longest=25)
    packed = _tokenize(rows, tokenizer, packing=strategy, max_length=16)
    for i in range(len(packed)):
        assert 0 < sum(b - a for a, b in packed.row_documents(i)) <= 16
    documents = [(tuple(row["input_ids"]), tuple(row["labels"])) for row in rows]
    if strategy == "bfd":
        expected = [(ids[:16], labels[:16]) for ids, labels in documents if ids]
        assert sorted(_documents(packed)) == sorted(expected)
        assert packed.stats["truncated"] == sum(len(ids) > 16 for ids, _ in documents) > 0
    else:
        expected = [pair for d in documents for pair in zip(*d, strict=True)]
        found = list(zip(packed.input_ids.tolist(), packed.labels.tolist(), strict=True))
        assert packed.stats["num_tokens"] == len(expected) and sorted(found) == sorted(expected)
    trained = sum(label != IGNORED for _, labels in _documents(packed) for label in labels[1:])
    assert packed.stats["num_trained_tokens"] == trained


def test_packing_arguments_are_checked() -> None:
    given: dict[str, Any] = {"model": "m", "dataset": "rows.jsonl", "packing": True}
    with pytest.raises(UserError, match="'ffd'; expected one of bfd, bfd_split, wrapped"):
        TrainConfig(**given, packing_strategy="ffd")
    with pytest.raises(UserError, match="--max-length is 0"):
        TrainConfig(**given, max_length=0)


# ---------------------------------------------------------------------------------------- hashes


def test_data_hash_sees_every_array(tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "a", "completion": "bc"}, {"prompt": "d", "completion": "e"}]
    first, again = (_tokenize(rows, tokenizer) for _ in range(2))
    assert data_hash(first) == data_hash(again) and len(data_hash(first)) == 64
    others = [
        _tokenize(rows, tokenizer, completion_only_loss=False),  # labels
        _tokenize(rows, tokenizer, max_length=3),  # ids
        _tokenize(rows, tokenizer, packing="bfd", max_length=32),  # rows
        _tokenize(rows, tokenizer, packing="wrapped", max_length=64),  # documents
    ]
    assert len({data_hash(d) for d in [first, *others]}) == 5


def test_importing_data_does_not_import_datasets() -> None:
    slow = ["datasets", "transformers", "pyarrow", "pandas"]
    code = f"import sys, minisft.data.tokenize; print([m for m in {slow} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
