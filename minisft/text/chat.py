"""Render chats with their template, and find the character spans of assistant turns.

The text equals that of transformers 5.23 `apply_chat_template(tokenize=False)`. A template gets
only plain JSON values, and is rendered under the limits of `sandbox.py`.
"""

import functools
import json
import re
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.exceptions import TemplateError
from jinja2.parser import Parser

from minisft.config.errors import UserError
from minisft.text.sandbox import BoundedEnvironment, compile_template, render_bounded

# Marks around a generation block while spans are recorded. They are private-use characters, which
# Unicode never assigns, so ordinary text does not contain them.
_OPEN, _CLOSE = "\U0010fdd2", "\U0010fdd3"
_OPEN_NAME, _CLOSE_NAME = "__generation_open__", "__generation_close__"
_REASONING = ("reasoning_content", "thinking", "reasoning")  # keys that data sets use


def render(
    template: str,
    messages: list[dict],
    *,
    special_tokens: dict[str, str],
    tools: list[dict] | None = None,
    documents: list[dict] | None = None,
    add_generation_prompt: bool = False,
    variables: dict[str, Any] | None = None,
) -> str:
    """Render one chat with a template and return the text.

    special_tokens: {"bos_token": "<s>", ...}, visible to the template by name. variables: more
    template variables, which override special tokens. Inputs are never changed.
    Raises UserError if the template rejects the chat (with the template's reason), is malformed,
    does something unsafe, or exceeds a limit of the sandbox.
    """
    if not messages:
        raise UserError("the conversation is empty; expected at least one message")
    # Arrow and some APIs store None for an absent key, but templates test whether the key exists.
    chat = [{k: v for k, v in message.items() if v is not None} for message in messages]
    names = {
        **special_tokens,
        "messages": [_with_reasoning(message) for message in _plain(chat)],
        "tools": _plain(tools),
        "documents": _plain(documents),
        "add_generation_prompt": add_generation_prompt,
        **_plain(variables or {}),
    }
    return render_bounded(_compile(template), names)


def assistant_spans(
    template: str,
    messages: list[dict],
    *,
    special_tokens: dict[str, str],
    tools: list[dict] | None = None,
    documents: list[dict] | None = None,
    variables: dict[str, Any] | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """Return (text, spans): the rendered chat, and the spans of its generation blocks.

    text equals `render(...)`. A span is (start, end) in characters of text; end is exclusive.
    Raises UserError if `render` does, or if the template has no generation block.
    """
    if not has_generation_block(template):
        raise UserError(
            "the chat template has no {% generation %} block, so the assistant's part is unknown; "
            "mark it in the template, or train on prompt and completion columns"
        )
    given = json.dumps([messages, tools, documents, variables], ensure_ascii=False, default=str)
    # A message that contains a mark could change which text is trained.
    if _OPEN in given or _CLOSE in given:
        raise UserError(
            "a message contains U+10FDD2 or U+10FDD3; these private-use characters are reserved, "
            "remove them from the row"
        )
    marked = render(
        template,
        messages,
        special_tokens=special_tokens,
        tools=tools,
        documents=documents,
        variables={**(variables or {}), _OPEN_NAME: _OPEN, _CLOSE_NAME: _CLOSE},
    )
    text, spans, start = "", [], None
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", marked):
        if piece == _OPEN:
            start = len(text)
        elif piece == _CLOSE:
            spans.append((start, len(text)))
        else:
            text += piece
    return text, spans


def has_generation_block(template: str) -> bool:
    """Return whether the template marks the assistant's text with `{% generation %}`."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def _with_reasoning(message: dict) -> dict:
    """Return the message with its reasoning text under both keys that chat templates read."""
    found = next((message[k] for k in _REASONING if message.get(k) is not None), None)
    if found is None:
        return message
    return {"thinking": found, **message, "reasoning_content": found}


def _plain(value: Any) -> Any:
    """Return a copy in plain JSON types: a template could call the methods of other objects."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return f"<{type(value).__name__}>"


class _GenerationTag(jinja2.ext.Extension):
    """The tag `{% generation %}...{% endgeneration %}`: renders its content in a new scope.

    Two variables are written around the content. They are undefined and render as an empty string,
    unless `assistant_spans` sets them.
    """

    tags = {"generation"}  # noqa: RUF012 - jinja2's own spelling

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        """Parse one generation block into a syntax node."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [jinja2.nodes.Name(name, "load", lineno=line) for name in (_OPEN_NAME, _CLOSE_NAME)]
        before, after = (jinja2.nodes.Output([mark], lineno=line) for mark in marks)
        return jinja2.nodes.Scope([before, *body, after], lineno=line)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return the value as JSON without HTML escapes, which jinja2's own filter would add."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


# Compiling a template takes about 100 times as long as rendering a short chat.
@functools.lru_cache(maxsize=128)
def _compile(template: str) -> jinja2.Template:
    """Compile a template in a new environment that serves this template only."""
    environment = BoundedEnvironment(
        [_GenerationTag, "jinja2.ext.loopcontrols"], filters={"tojson": _tojson}
    )
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda pattern: datetime.now().strftime(pattern),
    }
    return compile_template(environment, template)
