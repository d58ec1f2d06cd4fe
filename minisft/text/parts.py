"""Contents in parts, `[{"type": "text", "text": "..."}]`: for a template that reads them they stay
as they are, and render as in transformers; elsewhere their texts are joined to one string.

A template that was written for strings prints such a list as Python or JSON, leaves it out, or
fails. Which of these it does is seen by rendering the chat with a marker for the text of each part.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from minisft.config.errors import UserError
from minisft.data.formats import part_text, part_type


def join_unread(messages: list[dict], render: Callable[[list[dict]], str]) -> list[dict]:
    """The messages; one whose parts do not come through `render` has a string for its content.

    Raises UserError naming the part where such a content holds more than text.
    """
    if not any(isinstance(message.get("content"), list) for message in messages):
        return messages
    probe = [_marked(message, i) for i, message in enumerate(messages)]
    try:
        text = render(probe)
    except UserError:  # of the lists, or of the chat: then it fails again with strings
        text = ""
    return [
        message if _is_read(marked, i, text) else _joined(message, i)
        for i, (message, marked) in enumerate(zip(messages, probe, strict=True))
    ]


def _marker(message: int, part: int) -> str:
    return f"message{message}part{part}end"


def _marked(message: dict, i: int) -> dict:
    """The message with the text of each part, or the string under its type's name, replaced."""
    if not isinstance(message.get("content"), list):
        return message
    parts = []
    for j, part in enumerate(message["content"]):
        if isinstance(part, str):
            part = _marker(i, j)
        elif isinstance(part.get(part_type(part)), str):
            part = {**part, part_type(part): _marker(i, j)}
        parts.append(part)
    return {**message, "content": parts}


def _is_read(marked: dict, i: int, text: str) -> bool:
    """Whether every marker of a message is in the text, and none of its objects is printed."""
    parts = marked.get("content")  # a call of a tool may have none
    if not isinstance(parts, list):
        return True
    printed = [parts, *(part for part in parts if isinstance(part, dict))]
    forms = [f(x) for x in printed for f in (str, _json)]
    markers = [m for j in range(len(parts)) if (m := _marker(i, j)) in _json(parts)]
    return all(m in text for m in markers) and not any(form in text for form in forms)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _joined(message: dict, i: int) -> dict:
    if not isinstance(message.get("content"), list):
        return message
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
