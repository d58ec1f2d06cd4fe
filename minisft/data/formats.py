"""Detect the format of a dataset from its columns, and convert rows of each format to an Example.

The readers raise UserError if a value is missing, null or of the wrong type, a chat is empty, a
role is unknown or content is not text. It names the column; `data.tokenize` adds file and row.
"""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from minisft.config.errors import UserError, closest
from minisft.text.parts import part_text, part_type

# Format -> its required columns. Detection takes the first format whose columns all exist.
FORMATS = {
    "input_ids": ("input_ids",),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),  # or --dataset-text-field
}
KNOWN_COLUMNS = (
    "text", "prompt", "completion", "messages", "conversations", "tools", "chat_template_kwargs",
    "instruction", "input", "output", "system", "input_ids", "labels", "completion_mask",
    "assistant_masks", "attention_mask",
)  # fmt: skip
ROLES = (
    "system", "developer", "user", "assistant", "model", "tool", "function", "ipython",
    "observation",
)  # fmt: skip
MEDIA = ("image", "audio", "video")  # in the types and keys of a content's parts
# ShareGPT messages (`from`/`value`) use role names that chat templates do not know; rename them.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
# Our column name -> names that common datasets use instead, to suggest a rename in an error.
_LIKELY = {
    "prompt": ("question", "instruction", "query", "input"),
    "completion": ("answer", "response", "output", "target", "chosen"),
    "text": ("content", "body", "document"),
}


class Example(NamedTuple):
    """One row of any format: prompt and completion are strings (text) or message lists (chat)."""

    prompt: str | list[dict] | None  # context, not trained by default; None: no prompt
    completion: str | list[dict]  # what is trained: all of the text or chat if prompt is None
    tools: list[dict] | None = None
    variables: dict[str, Any] | None = None  # the row's chat_template_kwargs


def detect_format(columns: Iterable[str], *, text_field: str = "text", source: str = "") -> str:
    """Return the first of FORMATS whose required columns are all in `columns`.

    Otherwise raises UserError with the columns found and the flag that would most likely fix it.
    """
    columns = list(columns)
    for format in FORMATS:
        if not missing_columns(format, columns, text_field=text_field):
            return format
    where = f"{source}: " if source else ""
    raise UserError(
        f"{where}no known format; found columns {', '.join(columns) or '(none)'}; expected "
        f"{text_field!r}, or 'prompt' and 'completion', or 'messages', or 'conversations', or "
        f"'instruction' and 'output', or 'input_ids'; {_remedy(columns)}"
    )


def missing_columns(format: str, columns: Iterable[str], *, text_field: str = "text") -> list[str]:
    """Return the columns that `format` requires and `columns` lacks."""
    needed = (text_field,) if format == "text" else FORMATS[format]
    return [name for name in needed if name not in set(columns)]


def _remedy(columns: list[str]) -> str:
    """Suggest the flag that most likely maps these columns to a known format."""

    def guess(ours: str, taken: str | None = None) -> str | None:
        likely = [c for c in columns if c.lower() in (ours, *_LIKELY[ours])]
        found = likely[0] if likely else closest(ours, columns)
        return None if found == taken else found

    prompt = guess("prompt")
    completion = guess("completion", prompt)
    if prompt and completion:
        return f"did you mean --columns prompt={prompt} completion={completion}?"
    text = guess("text") or closest("messages", columns)
    if text and closest("messages", [text]) == text:
        return f"did you mean --columns messages={text}?"
    if text or len(columns) == 1:
        return f"did you mean --dataset-text-field {text or columns[0]}?"
    return "name them with --dataset-text-field NAME or --columns prompt=NAME completion=NAME"


def read_text(record: dict, *, text_field: str = "text") -> Example:
    """Convert a row of plain text to Example(None, text)."""
    return Example(None, _string(record, text_field))


def read_prompt_completion(record: dict) -> Example:
    """Convert a row whose prompt and completion are both strings or both message lists."""
    prompt, completion = (_present(record, name) for name in ("prompt", "completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        return Example(_string(record, "prompt"), _string(record, "completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        return Example(
            _messages(prompt, "prompt"), _messages(completion, "completion"), **_chat_extras(record)
        )
    raise UserError(
        f"prompt is {_kind(prompt)} and completion is {_kind(completion)}; expected two strings "
        "or two lists of messages"
    )


def read_messages(record: dict) -> Example:
    """Convert a row whose `messages` (or `conversations`) have keys role/content or from/value."""
    other = "messages" not in record and "conversations" in record
    name = "conversations" if other else "messages"
    return Example(None, _messages(_present(record, name), name), **_chat_extras(record))


def read_sharegpt(record: dict) -> Example:
    """Convert a ShareGPT row: `conversations` with keys from/value, and an optional `system` text.

    The keys become role and content; the roles human and gpt become user and assistant.
    """
    chat = _messages(_present(record, "conversations"), "conversations")
    if record.get("system"):
        if chat[0]["role"] == "system":
            raise UserError("the row has a system column and a system message; keep one of them")
        chat.insert(0, {"role": "system", "content": _string(record, "system")})
    return Example(None, chat, **_chat_extras(record))


def read_alpaca(record: dict) -> Example:
    """Convert `instruction`, `input` (may be empty or missing) and `output` to one turn of a chat.

    The user's message is the instruction and, after an empty line, the input; a `system` text comes
    first. The output is the completion.
    """
    asked = _string(record, "instruction")
    if record.get("input"):
        asked += "\n\n" + _string(record, "input")
    prompt = [{"role": "user", "content": asked}]
    if record.get("system"):
        prompt.insert(0, {"role": "system", "content": _string(record, "system")})
    answer = [{"role": "assistant", "content": _string(record, "output")}]
    return Example(prompt, answer, **_chat_extras(record))


def is_empty(example: Example) -> bool:
    """Return True if the completion is blank: its text, or its last message (an assistant's)."""
    if isinstance(example.completion, str):
        return not example.completion.strip()
    last = example.completion[-1]
    content = last.get("content")
    parts = content if isinstance(content, list) else [content or ""]
    blank = all((text := part_text(part)) is not None and not text.strip() for part in parts)
    others = {key for key, value in last.items() if value} - {"role", "content"}
    return last["role"] in ("assistant", "model") and blank and not others


def _chat_extras(record: dict) -> dict[str, Any]:
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as e:
            raise UserError(f"tools is a string but not JSON ({e}); expected a list") from None
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(t, dict) for t in tools)
    ):
        raise UserError(f"tools is {_kind(tools)}; expected a list of JSON schemas")
    variables = record.get("chat_template_kwargs")
    if variables is not None and not isinstance(variables, dict):
        raise UserError(f"chat_template_kwargs is {_kind(variables)}; expected an object")
    # Some templates write a tool preamble for an empty list, but not for None.
    return {"tools": tools or None, "variables": variables}


def _messages(value: Any, column: str) -> list[dict]:
    if not isinstance(value, list):
        hint = "; .csv holds none, .jsonl and .parquet do" if isinstance(value, str) else ""
        raise UserError(f"{column} is {_kind(value)}; expected a list of messages{hint}")
    if not value:
        raise UserError(f"{column} is an empty list; expected at least one message")
    return [_message(message, f"{column}[{i}]") for i, message in enumerate(value)]


def _message(value: Any, name: str) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{name} is {_kind(value)}; expected an object with role and content")
    message = dict(value)
    if "role" not in message and "from" in message:
        role = message.pop("from")
        message["role"] = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    role = message.get("role")
    if role not in ROLES:
        close = closest(role.lower(), ROLES) if isinstance(role, str) else None
        hint = f"; did you mean {close!r}?" if close else ""
        raise UserError(f"{name} has role {role!r}; expected one of {', '.join(ROLES)}{hint}")
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, (dict, str)) for part in content):
            raise UserError(f"{name}.content holds a part that is neither an object nor a string")
        for i, part in enumerate(content):
            if isinstance(part, dict):
                _check_part(part, f"{name}.content[{i}]")
    elif not isinstance(content, str) and not (content is None and _may_be_silent(message)):
        what = _kind(content) if "content" in message else "missing"
        close = closest("content", message) if what == "missing" else None
        hint = f" (its {close!r} is not read; rename it)" if close else ""
        raise UserError(f"{name}.content is {what}; expected a string{hint}")
    return message


def _check_part(part: dict, name: str) -> None:
    """Raise UserError for an image, audio or video part, or a text part without text."""
    kind = part_type(part)
    if not isinstance(kind, str):
        raise UserError(f"{name}.type is {_kind(kind)}; expected a string, such as 'text'")
    if found := [word for word in MEDIA if word in kind or part.get(word) is not None]:
        raise UserError(
            f"{name} is of type {kind!r} and holds {found[0]}; models are trained on text only: "
            "leave such rows out, or give the text alone"
        )
    if kind == "text" and not isinstance(part.get("text"), str):
        raise UserError(f"{name}.text is {_kind(part.get('text'))}; expected a string")


def _may_be_silent(message: dict) -> bool:
    """Return True if a message needs no content: an assistant's or tool's with another key.

    For example tool_calls. A misspelt `content` does not count as another key.
    """
    others = [key for key, value in message.items() if value is not None and key != "role"]
    meant = "content" not in message and closest("content", others)
    return bool(others) and not meant and message["role"] not in ("user", "system", "developer")


def _present(record: dict, name: str) -> Any:
    if name not in record:
        raise UserError(f"column {name!r} is missing in this row; it has {', '.join(record)}")
    return record[name]


def _string(record: dict, name: str) -> str:
    value = _present(record, name)
    if not isinstance(value, str):
        raise UserError(f"{name} is {_kind(value)}; expected a string")
    return value


def _kind(value: Any) -> str:
    """Describe a JSON value for an error message: its type and the start of its repr."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {str: "a string", list: "a list", dict: "an object", int: "a number", float: "a number"}
    shown = repr(value) if len(repr(value)) <= 40 else repr(value)[:37] + "..."
    return f"{kinds.get(type(value), type(value).__name__)} ({shown})"
