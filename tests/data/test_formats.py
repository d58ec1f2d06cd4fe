"""Dataset formats: what is detected, what a row becomes, and what an error says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from minisft.config.errors import UserError
from minisft.config.train import TrainConfig
from minisft.data import formats
from minisft.data.formats import Example, detect_format

TEXT = {"type": "text", "text": "x"}
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["text"], "text"),
        (["id", "messages"], "messages"),
        (["conversations", "id"], "sharegpt"),
        (["instruction", "input", "output"], "alpaca"),
        (["instruction", "output", "text"], "alpaca"),
        (["completion", "prompt"], "prompt-completion"),
        (["input_ids", "labels"], "input_ids"),
        (["text", "messages", "prompt", "completion"], "prompt-completion"),
        (["text", "messages", "prompt"], "messages"),
        (["text", "prompt"], "text"),
        (["text", "messages", "prompt", "completion", "input_ids"], "input_ids"),
    ],
)
def test_detection_takes_the_first_complete_format(columns: list[str], expected: str) -> None:
    assert detect_format(columns) == expected


def test_text_field_is_the_users() -> None:
    assert detect_format(["body"], text_field="body") == "text"
    assert formats.read_text({"body": "x"}, text_field="body") == Example(None, "x")


@pytest.mark.parametrize(
    ("columns", "remedy"),
    [
        (["question", "answer"], "--columns prompt=question completion=answer"),
        (["promt", "completion"], "--columns prompt=promt completion=completion"),
        (["Prompt", "Completions"], "--columns prompt=Prompt completion=Completions"),
        (["mesages", "id"], "--columns messages=mesages"),
        (["content", "id"], "--dataset-text-field content"),
        (["texts", "category"], "--dataset-text-field texts"),
        (["only"], "--dataset-text-field only"),
        (["a", "b"], "--columns prompt=NAME completion=NAME"),
    ],
)
def test_unknown_columns_are_listed_with_a_remedy(columns: list[str], remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        detect_format(columns, source="rows.csv")
    message = str(caught.value)
    assert message.startswith("rows.csv: ") and "\n" not in message
    assert ", ".join(columns) in message and remedy in message


def test_unknown_format_is_named() -> None:
    with pytest.raises(UserError, match="'parquet'"):
        TrainConfig(model="m", dataset="rows.jsonl", dataset_format="parquet")  # pyright: ignore


# ----------------------------------------------------------------------------------------- rows


def test_sharegpt_becomes_messages() -> None:
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a", "weight": 1},
        {"role": "user", "content": "r"},
    ]
    before = json.dumps(turns)
    assert formats.read_messages({"conversations": turns}).completion == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "weight": 1},
        {"role": "user", "content": "r"},
    ]
    assert json.dumps(turns) == before


def test_prompt_completion_of_both_kinds() -> None:
    row = {"prompt": "p", "completion": "c", "other": 1}
    assert formats.read_prompt_completion(row) == Example("p", "c")
    row = {"prompt": CHAT[:1], "completion": CHAT[1:]}
    assert formats.read_prompt_completion(row) == Example(CHAT[:1], CHAT[1:])


def test_tools_and_template_arguments_travel() -> None:
    tools = [{"type": "function"}]
    for stored in (tools, json.dumps(tools)):
        row = {"messages": CHAT, "tools": stored, "chat_template_kwargs": {"think": False}}
        assert formats.read_messages(row) == Example(None, CHAT, tools, {"think": False})
    assert formats.read_messages({"messages": CHAT, "tools": []}).tools is None


@pytest.mark.parametrize(
    ("read", "row", "culprit"),
    [
        ("alpaca", {"instruction": "a", "output": None}, "output is null"),
        ("alpaca", {"instruction": 3, "output": "a"}, "instruction is a number"),
        ("alpaca", {"instruction": "a", "input": ["x"], "output": "a"}, "input is a list"),
        ("alpaca", {"instruction": "a"}, "'output' is missing"),
        ("sharegpt", {"conversations": []}, "conversations is an empty list"),
        ("sharegpt", {"messages": CHAT}, "'conversations' is missing"),
        (
            "sharegpt",
            {"system": "s", "conversations": [{"from": "system", "value": "t"}]},
            "a system column and a system message",
        ),
    ],
)
def test_alpaca_and_sharegpt_rows_name_the_culprit(read: str, row: dict, culprit: str) -> None:
    with pytest.raises(UserError, match=culprit):
        getattr(formats, f"read_{read}")(row)


def test_a_system_column_comes_first() -> None:
    asked = [{"from": "human", "value": "q"}]
    example = formats.read_sharegpt({"conversations": asked, "system": "s"})
    assert [m["role"] for m in example.completion if isinstance(m, dict)] == ["system", "user"]
    assert formats.read_sharegpt({"conversations": asked, "system": ""}).completion[0] == CHAT[0]


@pytest.mark.parametrize(
    ("message", "culprit"),
    [
        ({"role": "user", "content_": "q"}, "is missing; .*its 'content_' is not read"),
        ({"role": "assistant", "contents": "a"}, "is missing; .*its 'contents' is not read"),
        ({"role": "user", "name": "Ann"}, "is missing; expected a string$"),
        ({"role": "system", "content": None, "name": "Ann"}, "is null"),
        ({"role": "assistant"}, "is missing"),
    ],
)
def test_a_message_without_content_is_no_blank_turn(message: dict, culprit: str) -> None:
    with pytest.raises(UserError, match=rf"messages\[0\]\.content {culprit}"):
        formats.read_messages({"messages": [message, CHAT[1]]})


def test_tool_calls_need_no_content() -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function"}], "content": None}
    example = formats.read_messages({"messages": [CHAT[0], call]})
    assert example.completion == [CHAT[0], call] and not formats.is_empty(example)


@pytest.mark.parametrize(
    ("read", "row", "culprit"),
    [
        ("text", {"text": None}, "text is null"),
        ("text", {"text": 3}, r"text is a number \(3\)"),
        ("text", {"text": ["a"]}, "text is a list"),
        ("text", {"other": "a"}, "'text' is missing in this row; it has other"),
        ("prompt_completion", {"prompt": "p", "completion": None}, "completion is null"),
        ("prompt_completion", {"prompt": "p", "completion": {"a": 1}}, "completion is an object"),
        ("prompt_completion", {"prompt": "p"}, "'completion' is missing"),
        ("prompt_completion", {"prompt": CHAT, "completion": "c"}, "completion is a string"),
        ("prompt_completion", {"prompt": [], "completion": CHAT}, "prompt is an empty list"),
        ("messages", {"messages": []}, "messages is an empty list"),
        ("messages", {"text": "hi"}, "'messages' is missing in this row; it has text"),
        ("messages", {"messages": "hi"}, "messages is a string"),
        ("messages", {"messages": None}, "messages is null"),
        ("messages", {"messages": ["hi"]}, r"messages\[0\] is a string"),
        ("messages", {"messages": [{"content": "x"}]}, r"messages\[0\] has role None"),
        (
            "messages",
            {"messages": [*CHAT, {"role": "assistent", "content": "x"}]},
            r"messages\[2\] has role 'assistent'.*did you mean 'assistant'",
        ),
        ("messages", {"conversations": [{"from": "narrator", "value": "x"}]}, "role 'narrator'"),
        ("messages", {"messages": [{"role": ["user"], "content": "x"}]}, "role"),
        ("messages", {"messages": [{"role": "user", "content": 5}]}, r"content is a number"),
        ("messages", {"messages": [{"role": "user", "content": None}]}, r"content is null"),
        ("messages", {"messages": [{"role": "user"}]}, r"content is missing"),
        ("messages", {"messages": [{"role": "user", "content": [5]}]}, r"content holds a part"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [TEXT, {"type": "image_url"}]}]},
            r"messages\[0\].content\[1\] is of type 'image_url' and holds image",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": None, "audio": "a.wav"}]}]},
            r"content\[0\] is of type 'text' and holds audio",
        ),
        ("messages", {"messages": [{"role": "user", "content": [{"text": None}]}]}, "text is null"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": 5}]}]}, "type is a num"),
        ("messages", {"messages": CHAT, "tools": "{"}, "tools is a string but not JSON"),
        ("messages", {"messages": CHAT, "tools": {"a": 1}}, "tools is an object"),
        ("messages", {"messages": CHAT, "chat_template_kwargs": 1}, "chat_template_kwargs"),
    ],
)
def test_rows_of_another_shape_name_the_culprit(read: str, row: dict, culprit: str) -> None:
    with pytest.raises(UserError, match=culprit) as caught:
        getattr(formats, f"read_{read}")(row)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("completion", "empty"),
    [
        ("", True),
        (" \n\t", True),
        ("x", False),
        ([{"role": "assistant", "content": " "}], True),
        ([{"role": "assistant", "content": "", "tool_calls": []}], True),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], False),
        ([{"role": "assistant", "content": [TEXT | {"image": None}]}], False),
        ([{"role": "assistant", "content": [TEXT | {"text": " "}, ""]}], True),
        ([{"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}]}], False),
        ([{"role": "user", "content": ""}], False),
    ],
)
def test_what_counts_as_empty(completion: Any, empty: bool) -> None:
    assert formats.is_empty(Example(None, completion)) is empty
