"""Chat templates: messages to text, as transformers renders them, in a bounded sandbox.

A template comes from a model repository and is not trusted: it sees plain JSON values, cannot
reach Python's internals or the disk, and stops at a number of steps and characters.
"""

from __future__ import annotations

import functools
import json
import math
import re
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.parser import Parser
from jinja2.visitor import NodeTransformer

from minisft.config.errors import UserError

MAX_CHARS = 10_000_000  # of one rendered chat, and of any string that a template builds
MAX_STEPS = 2_000_000  # loop turns and calls in one rendering: a few seconds
MAX_SECONDS = 10.0  # of one rendering: a step may search, copy or compare long strings
MAX_BITS = 1_000_000  # of an integer
# Around a generation block while spans are recorded: plane-16 private use, never assigned.
_OPEN, _CLOSE = "\U0010fdd2", "\U0010fdd3"
# What Python raises when a template meets data that it was not written for.
_TEMPLATE_FAULTS = (
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)
_WIDE_FORMAT = re.compile(r"%[-+# 0-9.]*(\d{6}|\*)")
_WIDE_FIELD = re.compile(r"\{[^{}]*:[^{}]*(\d{6}|\{)")
_REASONING = ("reasoning_content", "thinking", "reasoning")


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
    """The text of one chat; equal to transformers 5.23 `apply_chat_template(tokenize=False)`.

    special_tokens: {"bos_token": "<s>", ...}, visible to the template by name. variables: any
    further names, which win over special tokens. Inputs are never changed.
    Raises UserError with the template's own reason when it refuses the chat, is malformed, does
    something unsafe, or exceeds MAX_CHARS or MAX_STEPS.
    """
    return _render(
        _compile(template, False),
        messages,
        special_tokens,
        tools,
        documents,
        add_generation_prompt,
        variables,
    )


def assistant_spans(
    template: str,
    messages: list[dict],
    *,
    special_tokens: dict[str, str],
    tools: list[dict] | None = None,
    documents: list[dict] | None = None,
    variables: dict[str, Any] | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """(text, spans): the rendered chat and the characters that generation blocks produced.

    text equals `render(...)`; spans are (start, end) into it, in order, end exclusive.
    Raises UserError as `render`, and for a template without a generation block.
    """
    if not has_generation_block(template):
        raise UserError(
            "the chat template has no {% generation %} block, so the assistant's part is unknown; "
            "mark it in the template, or train on prompt and completion columns"
        )
    given = json.dumps([messages, tools, documents, variables], ensure_ascii=False, default=str)
    if _OPEN in given or _CLOSE in given:
        raise UserError(
            "a message holds U+10FDD2 or U+10FDD3; these private-use characters are reserved, "
            "remove them from the row"
        )
    marked = _render(
        _compile(template, True), messages, special_tokens, tools, documents, False, variables
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
    """Whether the template marks the assistant's part with `{% generation %}`."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def _render(
    compiled: jinja2.Template,
    messages: list[dict],
    special_tokens: dict[str, str],
    tools: list[dict] | None,
    documents: list[dict] | None,
    add_generation_prompt: bool,
    variables: dict[str, Any] | None,
) -> str:
    if not messages:
        raise UserError("the conversation is empty; expected at least one message")
    # Arrow and some APIs write None for a key that is absent; templates test for presence.
    chat = [{k: v for k, v in message.items() if v is not None} for message in messages]
    names = {
        **special_tokens,
        "messages": [_with_reasoning(message) for message in _plain(chat)],
        "tools": _plain(tools),
        "documents": _plain(documents),
        "add_generation_prompt": add_generation_prompt,
        **_plain(variables or {}),
    }
    environment = compiled.environment
    assert isinstance(environment, _Environment)
    environment.steps, environment.deadline = 0, time.monotonic() + MAX_SECONDS
    pieces, length = [], 0
    try:
        for piece in compiled.generate(names):
            pieces.append(piece)
            length += len(piece)
            _check_length(length)
            environment.check_time()
    except SecurityError as e:
        reason = f"chat template refused: {_one_line(e)}"
        raise UserError(f"{reason}; is it from a source you trust?") from None
    except TemplateError as e:
        raise UserError(f"chat template: {_one_line(e)}") from None
    except _TEMPLATE_FAULTS as e:
        raise UserError(f"chat template failed: {type(e).__name__}: {_one_line(e)}") from None
    return "".join(pieces)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _with_reasoning(message: dict) -> dict:
    """Reasoning goes by three names; a template may read either of the first two."""
    found = next((message[k] for k in _REASONING if message.get(k) is not None), None)
    if found is None:
        return message
    return {"thinking": found, **message, "reasoning_content": found}


def _plain(value: Any) -> Any:
    """A copy in plain JSON types: other objects have methods that a template must not reach."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return f"<{type(value).__name__}>"


# ----------------------------------------------------------------------------------- the sandbox


def _check_length(length: int) -> None:
    if length > MAX_CHARS:
        raise SecurityError(f"it produces more than {MAX_CHARS:,} characters")


def _check_growth(name: str, values: tuple[Any, ...]) -> None:
    """Refuse a string method or filter whose result would be too long, before it is made.

    values: the value that it applies to, then its arguments.
    """
    numbers = [v for v in values[1:] if isinstance(v, int)]
    texts = [v for v in values if isinstance(v, str)]
    _check_length(max(map(abs, numbers), default=0))
    value = values[0]
    if name == "replace" and len(texts) >= 3:
        _check_length(len(texts[0]) + texts[0].count(texts[1]) * len(texts[2]))
    elif name == "join" and texts:
        items = next((v for v in values if isinstance(v, (list, tuple))), ())
        separator = texts[0] if value is texts[0] else texts[-1]
        size = sum(len(item) for item in items if isinstance(item, str))
        _check_length(size + len(separator) * len(items))
    elif name in ("indent", "expandtabs", "wordwrap", "tojson") and numbers:
        lines = texts[0].count("\n") + texts[0].count("\t") + 1 if texts else 1000
        _check_length(lines * max(numbers))
    elif name == "translate":
        raise SecurityError("it translates a string by a table of its own")
    if name in ("indent", "wordwrap") and len(texts) > 1:
        _check_length(len(texts[0]) * max(len(text) for text in texts[1:]))
    if (
        name in ("format", "format_map")
        and isinstance(value, str)
        and (_WIDE_FORMAT.search(value) or _WIDE_FIELD.search(value))
    ):
        raise SecurityError("it pads with a format to a width of its own")


def _bounded(name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose result is sized before it is made, as far as its arguments tell."""

    @functools.wraps(filter)  # jinja2 marks on the function what it wants as first argument
    def bounded(*args: Any, **kwargs: Any) -> Any:
        given = args[1:] if getattr(filter, "jinja_pass_arg", None) else args
        _check_growth(name, (*given, *kwargs.values()))
        result = filter(*args, **kwargs)
        if isinstance(result, str):
            _check_length(len(result))
        return result

    return bounded


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Counts the steps of one rendering, and sizes what repetition and calls would build."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    steps = 0
    deadline = math.inf

    def tick(self) -> None:
        """Called once per loop turn; `call` does the counting."""

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it runs for more than {MAX_SECONDS:g} seconds")

    def join_values(self, *values: Any) -> str:
        """The `~` operator."""
        return self.concat([str(value) for value in values])

    def concat(self, pieces: Iterable[str]) -> str:
        """jinja2's own hook: what macros and `{% set %}` blocks collect goes through it."""
        pieces = list(pieces)
        _check_length(sum(map(len, pieces)))
        return "".join(pieces)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # jinja2 passes the template's own keywords along, which may be called "self".
        __self.steps += 1
        if __self.steps > MAX_STEPS:
            raise SecurityError(f"it runs for more than {MAX_STEPS:,} steps")
        if __self.steps % 64 == 0:
            __self.check_time()
        if getattr(__obj, "__func__", None) is _Environment.tick:
            return None
        # jinja2 wraps str.format; the string is behind it.
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(owner, str):
            _check_growth(getattr(__obj, "__name__", ""), (owner, *args, *kwargs.values()))
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str):
            _check_length(len(result))
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if (
            operator == "+"
            and isinstance(left, (str, list, tuple))
            and isinstance(right, type(left))
        ):
            _check_length(len(left) + len(right))
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, (str, list, tuple)) and isinstance(other, int):
                    _check_length(len(one) * max(other, 0))
        if operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise SecurityError("it pads a number with % to a width of its own")
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (abs(right) if operator == "**" else 1) + right.bit_length()
            if bits > MAX_BITS:
                raise SecurityError(f"it computes a number of more than {MAX_BITS:,} bits")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str):
            _check_length(len(result))
        return result

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        """Every loop turn begins with a tick, so that nested loops end; `~` is sized."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            tick = _environment_call("tick", [], loop.lineno)
            loop.body.insert(0, jinja2.nodes.ExprStmt(tick, lineno=loop.lineno))
        tree = _BoundConcat().visit(tree)
        tree.set_environment(self)
        return tree


class _BoundConcat(NodeTransformer):
    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _environment_call("join_values", node.nodes, node.lineno)


def _environment_call(name: str, arguments: list, line: int) -> jinja2.nodes.Call:
    function = jinja2.nodes.EnvironmentAttribute(name, lineno=line)
    return jinja2.nodes.Call(function, arguments, [], None, None, lineno=line)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: its content, in a scope of its own."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own spelling

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        if getattr(self.environment, "marks_generation", False):
            body = [_literal(_OPEN, line), *body, _literal(_CLOSE, line)]
        return jinja2.nodes.Scope(body, lineno=line)


def _literal(text: str, line: int) -> jinja2.nodes.Node:
    return jinja2.nodes.Output([jinja2.nodes.TemplateData(text, lineno=line)], lineno=line)


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)` for templates, without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict:
        return dict.fromkeys(keys, value)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` for templates, refusing names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]  # so that a template may store a name called "self"
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it stores the underscore name {name!r} on a namespace")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes HTML characters."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=128)
def _compile(template: str, marks_generation: bool) -> jinja2.Template:
    # One environment per template: its step count belongs to one rendering at a time.
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.extend(marks_generation=marks_generation)
    environment.filters["tojson"] = _tojson
    environment.filters = {
        name: _bounded(name, filter) for name, filter in environment.filters.items()
    }
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as e:
        raise UserError(f"chat template line {e.lineno}: {_one_line(e)}") from None
    except SyntaxError as e:  # of the Python that jinja makes of it, such as a name given twice
        what = re.sub(r"\bl_\d+_", "", e.msg)  # jinja's prefix of the template's own names
        raise UserError(f"chat template: {what}; correct the template") from None
    except RecursionError:
        raise UserError("chat template is nested too deeply") from None
