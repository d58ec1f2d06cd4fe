"""Message contents that are lists of parts: `[{"type": "text", "text": "..."}]`.

A template that reads such a list gets it unchanged, and renders it as in transformers. A template
written for strings prints the list as Python or JSON, omits it, or fails; for it, the texts are
joined to one string. Which kind a template is, is found by rendering the chat with a marker in
place of each part's text.
"""

import json
from collections.abc import Callable
from typing import Any

from minisft.config.errors import UserError


def part_type(part: dict) -> Any:
    """Return the type of a part that is an object; "text" if it names none."""
    return "text" if part.get("type") is None else part["type"]


def part_text(part: str | dict) -> str | None:
    """Return the text of a part, or None if it is of another type."""
    if isinstance(part, str):
        return part
    return part["text"] if part_type(part) == "text" else None


def join_unread(messages: list[dict], render: Callable[[list[dict]], str]) -> list[dict]:
    """Return the messages, with the parts that `render` does not write joined to a string.

    Raises UserError, naming the part, if a content that must be joined has a part without text.
    """
    listed = {i for i, message in enumerate(messages) if isinstance(message.get("content"), list)}
    if not listed:
        return messages
    probe = [_marked(m, i) if i in listed else m for i, m in enumerate(messages)]
    try:
        text = render(probe)
    # If the chat fails for another reason than its lists, the caller's rendering reports it.
    except UserError:
        text = ""
    return [
        _joined(m, i) if i in listed and not _is_read(probe[i]["content"], i, text) else m
        for i, m in enumerate(messages)
    ]


def _marker(message: int, part: int) -> str:
    return f"message{message}part{part}end"


def _marked(message: dict, i: int) -> dict:
    """Return message i, a marker in place of each part's text or string under its type's name."""
    parts = []
    for j, part in enumerate(message["content"]):
        if isinstance(part, str):
            part = _marker(i, j)
        elif isinstance(part.get(part_type(part)), str):
            part = {**part, part_type(part): _marker(i, j)}
        parts.append(part)
    return {**message, "content": parts}


def _is_read(parts: list, i: int, text: str) -> bool:
    """Return whether the text has every marker of message i, and no printed list or object."""
    printed = [parts, *(part for part in parts if isinstance(part, dict))]
    forms = [f(x) for x in printed for f in (str, _json)]
    markers = [m for j in range(len(parts)) if (m := _marker(i, j)) in _json(parts)]
    return all(m in text for m in markers) and not any(form in text for form in forms)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _joined(message: dict, i: int) -> dict:
    """Return message i with the texts of its parts joined to one string."""
    texts = []
    for j, part in enumerate(message["content"]):
        text = part_text(part)
        if text is None:
            raise UserError(
                f"message {i}: part {j} of its content is of type {part_type(part)!r}, which the "
                "chat template does not read; expected text"
            )
        texts.append(text)
    return {**message, "content": "".join(texts)}
