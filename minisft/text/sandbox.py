"""A jinja2 sandbox that also limits the output length, steps and time of a rendering.

A chat template comes from a model repository and is not trusted. jinja2's sandbox already hides
Python's internals and refuses to change its inputs. It does not limit work: it runs any number of
nested loops and evaluates `'a' * 10**8`. The environment in this module stops both.
"""

import functools
import math
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.sandbox
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.visitor import NodeTransformer

from minisft.config.errors import UserError

MAX_CHARS = 10_000_000  # in one rendered chat, and in any string that a template builds
MAX_STEPS = 2_000_000  # loop iterations and calls in one rendering: a few seconds
MAX_SECONDS = 10.0  # for one rendering: a single step may search, copy or compare long strings
MAX_BITS = 1_000_000  # in an integer
# Exceptions that Python raises when a template gets data that it was not written for.
_FAULTS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
# Formats of a width of six digits or from an argument: "%100000d", "%*d", "{:100000}", "{:{}}".
_WIDE_FORMAT = re.compile(r"%[-+# 0-9.]*(\d{6}|\*)")
_WIDE_FIELD = re.compile(r"\{[^{}]*:[^{}]*(\d{6}|\{)")


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandboxed jinja2 environment that counts steps and checks sizes before building results.

    Use one environment per template and render it in one thread at a time: `steps` and `deadline`
    describe the rendering in progress.
    """

    # jinja2 calls `call_binop` for these operators only.
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    steps = 0
    deadline = math.inf

    def __init__(self, extensions: list, filters: dict[str, Callable[..., Any]]) -> None:
        """Add these jinja2 extensions, and filters (name -> function), to jinja2's own."""
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.filters = {
            name: _bounded(name, filter) for name, filter in (self.filters | filters).items()
        }
        self.globals |= {"dict": _Dict(), "namespace": _Namespace}

    def tick(self) -> None:
        """Do nothing. `_parse` adds a call of tick to every loop body, so that `call` counts it."""

    def check_time(self) -> None:
        """Raise SecurityError if the current rendering is past its deadline."""
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it runs for more than {MAX_SECONDS:g} seconds")

    def concat(self, pieces: Iterable[Any]) -> str:
        """Concatenate values for `~`, macros and `{% set %}` blocks, after checking the length."""
        pieces = [str(piece) for piece in pieces]
        _check_length(sum(map(len, pieces)))
        return "".join(pieces)

    # Positional-only, because a template may pass a keyword argument called "self" or "context".
    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function, method or macro for the template; count the call, check its sizes."""
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise SecurityError(f"it runs for more than {MAX_STEPS:,} steps")
        # Reading the clock at every step makes an empty loop 1.4 times slower.
        if self.steps % 64 == 0:
            self.check_time()
        if getattr(obj, "__func__", None) is BoundedEnvironment.tick:
            return None
        # jinja2 wraps str.format and str.format_map, so find the string through __wrapped__.
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        if isinstance(owner, str):
            _check_growth(getattr(obj, "__name__", ""), (owner, *args, *kwargs.values()))
        return _checked(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right` after checking the size of the result."""
        sequences = (str, list, tuple)
        if operator == "+" and isinstance(left, sequences) and isinstance(right, type(left)):
            _check_length(len(left) + len(right))
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, sequences) and isinstance(other, int):
                    _check_length(len(one) * max(other, 0))
        if operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise SecurityError("it formats a value with % to an excessive or variable width")
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (abs(right) if operator == "**" else 1) + right.bit_length()
            if bits > MAX_BITS:
                raise SecurityError(f"it computes a number of more than {MAX_BITS:,} bits")
        return _checked(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        """Parse a template, add a call of `tick` to every loop body, and replace `~`."""
        tree = super()._parse(source, name, filename)
        # jinja2 limits range() but not nested loops, whose bodies may contain no call to count.
        for loop in tree.find_all(jinja2.nodes.For):
            tick = _environment_call("tick", [], loop.lineno)
            loop.body.insert(0, jinja2.nodes.ExprStmt(tick, lineno=loop.lineno))
        tree = _BoundConcat().visit(tree)
        tree.set_environment(self)
        return tree


class _BoundConcat(NodeTransformer):
    """Replaces `a ~ b`, whose length jinja2 does not check, by `BoundedEnvironment.concat`."""

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        """Return the call of `concat` that replaces one `~` expression."""
        self.generic_visit(node)
        values = jinja2.nodes.List(node.nodes, lineno=node.lineno)
        return _environment_call("concat", [values], node.lineno)


def _environment_call(name: str, arguments: list, line: int) -> jinja2.nodes.Call:
    """Return the syntax node that calls the environment's method `name`."""
    function = jinja2.nodes.EnvironmentAttribute(name, lineno=line)
    return jinja2.nodes.Call(function, arguments, [], None, None, lineno=line)


def compile_template(environment: BoundedEnvironment, source: str) -> jinja2.Template:
    """Compile a template; raises UserError with the reason if the template is malformed."""
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as e:
        raise UserError(f"chat template line {e.lineno}: {_one_line(e)}") from None
    # jinja2 accepts some templates whose generated Python does not compile, for example a macro
    # with two parameters of one name. The generated code names the variable x "l_1_x".
    except SyntaxError as e:
        what = re.sub(r"\bl_\d+_", "", e.msg)
        raise UserError(f"chat template: {what}; correct the template") from None
    except RecursionError:
        raise UserError("chat template is nested too deeply") from None


def render_bounded(compiled: jinja2.Template, variables: dict[str, Any]) -> str:
    """Render a template compiled in a BoundedEnvironment, after resetting steps and deadline.

    Raises UserError, in one line, if the template raises an error, does something unsafe, or
    exceeds MAX_CHARS, MAX_STEPS, MAX_SECONDS or MAX_BITS.
    """
    environment = compiled.environment
    assert isinstance(environment, BoundedEnvironment)
    environment.steps, environment.deadline = 0, time.monotonic() + MAX_SECONDS
    pieces, length = [], 0
    try:
        # Render piece by piece to stop an endless output before it fills the memory.
        for piece in compiled.generate(variables):
            pieces.append(piece)
            length += len(piece)
            _check_length(length)
            environment.check_time()
    except SecurityError as e:
        reason = f"chat template refused: {_one_line(e)}"
        raise UserError(f"{reason}; is it from a source you trust?") from None
    except TemplateError as e:
        raise UserError(f"chat template: {_one_line(e)}") from None
    except _FAULTS as e:
        raise UserError(f"chat template failed: {type(e).__name__}: {_one_line(e)}") from None
    return "".join(pieces)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _check_length(length: int) -> None:
    if length > MAX_CHARS:
        raise SecurityError(f"it produces more than {MAX_CHARS:,} characters")


def _checked(result: Any) -> Any:
    """Return `result`, or raise SecurityError if it is a string longer than MAX_CHARS."""
    if isinstance(result, str):
        _check_length(len(result))
    return result


def _check_growth(name: str, values: tuple[Any, ...]) -> None:
    """Raise SecurityError if a string method or filter would build a result that is too long.

    name: of the method or filter. values: the value that it is called on, then its arguments. They
    give an upper bound of the result's length.
    """
    numbers = [v for v in values[1:] if isinstance(v, int)]
    texts = [v for v in values if isinstance(v, str)]
    # An integer argument may be a width or a count, as in center, ljust and batch.
    _check_length(max(map(abs, numbers), default=0))
    value = values[0]
    if name == "replace" and len(texts) >= 3:
        _check_length(len(texts[0]) + texts[0].count(texts[1]) * len(texts[2]))
    elif name == "join" and texts:
        items = next((v for v in values if isinstance(v, (list, tuple))), ())
        # str.join is called on the separator; the join filter gets it as an argument.
        separator = texts[0] if value is texts[0] else texts[-1]
        size = sum(len(item) for item in items if isinstance(item, str))
        _check_length(size + len(separator) * len(items))
    elif name in ("indent", "expandtabs", "wordwrap", "tojson") and numbers:
        lines = texts[0].count("\n") + texts[0].count("\t") + 1 if texts else 1000
        _check_length(lines * max(numbers))
    # Without these checks, templates built 11 GB with `translate` and `wordwrap`.
    elif name == "translate":
        raise SecurityError("it calls translate() with its own table")
    if name in ("indent", "wordwrap") and len(texts) > 1:
        _check_length(len(texts[0]) * max(len(text) for text in texts[1:]))
    formats = name in ("format", "format_map") and isinstance(value, str)
    if formats and (_WIDE_FORMAT.search(value) or _WIDE_FIELD.search(value)):
        raise SecurityError("it calls format() with an excessive or variable width")


def _bounded(name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter to check the size of its result, where possible before the call."""

    # wraps() also copies `jinja_pass_arg`: such a filter gets a context as its first argument.
    @functools.wraps(filter)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        given = args[1:] if getattr(filter, "jinja_pass_arg", None) else args
        _check_growth(name, (*given, *kwargs.values()))
        return _checked(filter(*args, **kwargs))

    return bounded


class _Dict:
    """Replaces `dict` in templates: offers only `dict(...)` and `dict.fromkeys(...)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict:
        """Return a dict that maps each key to the value."""
        return dict.fromkeys(keys, value)


class _Namespace(jinja2.utils.Namespace):
    """Replaces `namespace` in templates; refuses names that begin with an underscore."""

    # Positional-only, because a template may store a name called "self".
    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"it stores the underscore name {name!r} on a namespace")
        super().__setitem__(name, value)
