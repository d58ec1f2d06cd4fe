"""Handle message contents that are lists of parts: `[{"type": "text", "text": "..."}]`.

A template that supports such lists gets them unchanged, and renders them as in transformers. A
template written for strings would print a list as Python or JSON, omit it, or fail; for these
templates, the texts of the parts are concatenated. To find out whether a template supports lists,
the chat is rendered with a marker in place of each part's text.
"""

import json
from collections.abc import Callable
from typing import Any

from minisft.config.errors import UserError


def part_type(part: dict) -> Any:
    """Return the type of a content part given as a dict; "text" if it has no type."""
    return "text" if part.get("type") is None else part["type"]


def part_text(part: str | dict) -> str | None:
    """Return the text of a content part, or None if the part is not of type "text"."""
    if isinstance(part, str):
        return part
    return part["text"] if part_type(part) == "text" else None


def join_unread(messages: list[dict], render: Callable[[list[dict]], str]) -> list[dict]:
    """Return the messages; content lists that the template does not read become strings.

    Raises UserError if such a list has a part that is not text. render: messages -> text.
    """
    listed = {i for i, message in enumerate(messages) if isinstance(message.get("content"), list)}
    if not listed:
        return messages
    probe = [_marked(m, i) if i in listed else m for i, m in enumerate(messages)]
    try:
        text = render(probe)
    # If lists are not the reason for the error, the caller gets it again and reports it.
    except UserError:
        text = ""
    return [
        _joined(m, i) if i in listed and not _is_read(probe[i]["content"], i, text) else m
        for i, m in enumerate(messages)
    ]


def _marker(message: int, part: int) -> str:
    return f"message{message}part{part}end"


def _marked(message: dict, i: int) -> dict:
    """Return message i with a marker in place of the string in each part, part[part["type"]]."""
    parts = []
    for j, part in enumerate(message["content"]):
        if isinstance(part, str):
            part = _marker(i, j)
        elif isinstance(part.get(part_type(part)), str):
            part = {**part, part_type(part): _marker(i, j)}
        parts.append(part)
    return {**message, "content": parts}


def _is_read(parts: list, i: int, text: str) -> bool:
    """Return whether text has all markers of message i, and no list or dict as Python or JSON."""
    printed = [parts, *(part for part in parts if isinstance(part, dict))]
    forms = [f(x) for x in printed for f in (str, _json)]
    markers = [m for j in range(len(parts)) if (m := _marker(i, j)) in _json(parts)]
    return all(m in text for m in markers) and not any(form in text for form in forms)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _joined(message: dict, i: int) -> dict:
    """Return message i with the texts of its parts concatenated to one string."""
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
