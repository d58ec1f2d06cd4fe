"""Parse the flags of the scripts with tyro, print errors in one line, return exit codes.

Exit codes: 0 success, 2 an error that the user can fix, 3 training stopped by a guard, 75 preempted
with a valid checkpoint, 1 unexpected error (with a traceback).
"""

import contextlib
import dataclasses
import io
import itertools
import re
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from minisft.config.errors import UserError, flag, wrong
from minisft.config.fields import Setting, settings
from minisft.config.names import nearest, refusal, translate, translate_flags

Config = TypeVar("Config")


def parse_flags(cls: type[Config], argv: Sequence[str], *, prog: str, default: Config) -> Config:
    """Build a `cls` from `default`, overridden by `--config FILE.yaml`, then by the other flags.

    cls: a dataclass whose fields are the flags; in a flag, hyphens and underscores are the same.
    Raises UserError for an unknown flag or key (with the closest known name) and for a value of
    the wrong type; raises SystemExit(0) after --help.
    """
    import tyro

    known = settings(cls)
    argv, config_file = _take_config(list(argv))
    argv = translate_flags(argv, known)
    if config_file is not None:
        values = _yaml_values(config_file, known)
        default = dataclasses.replace(default, **values)  # pyright: ignore[reportArgumentType]
    argv = _spell_out(argv, known)
    _check_words(argv, known)
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured), _choices_as_text():
            return tyro.cli(cls, args=argv, prog=prog, default=default, description=cls.__doc__)
    except SystemExit as e:
        if e.code in (0, None):
            raise
        # Re-raise the dataclass's own UserError, which tyro would print over several lines.
        if isinstance(e.__context__, UserError):
            raise e.__context__ from None
        raise UserError(_one_line(captured.getvalue())) from None


def run_main(main: Callable[[], Any], stopped: dict[type[BaseException], int]) -> int:
    """Call `main` and return the exit code; prints user errors and warnings in one line each.

    stopped: exception type -> exit code, for a run that was stopped without a user error.
    """

    def tell(line: str) -> None:
        # Replace control characters, which file names in a message may contain.
        line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", line)
        # Ignore a closed stderr, so that the exit code is still returned.
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: tell(f"warning: {message}")
            main()
        return 0
    except UserError as e:
        tell(f"error: {e}")
        return 2
    except tuple(stopped) as e:
        tell(str(e))
        return next(code for kind, code in stopped.items() if isinstance(e, kind))


def _choices_as_text() -> contextlib.AbstractContextManager:
    """Return a context in which tyro accepts any string for a Literal of strings.

    The dataclass checks the choices instead, because it also accepts alternative spellings.
    """
    from tyro.constructors import ConstructorRegistry, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def _(info: Any) -> Any:
        choices = typing.get_args(info.type)
        if typing.get_origin(info.type) is not Literal or not isinstance(choices[0], str):
            return None
        return registry.get_primitive_spec(PrimitiveTypeInfo.make(str, info.markers))

    return registry


def _take_config(argv: list[str]) -> tuple[list[str], str | None]:
    """Return the flags without --config, and the file that --config names (None without it)."""
    kept, files = list[str](), list[Any]()
    words = iter(argv)
    for word in words:
        name, equals, file = word.partition("=")
        if name == "--config":
            files.append(file if equals else next(words, None))
        else:
            kept.append(word)
    if None in files:
        raise UserError("--config: expected a YAML file after it")
    if len(files) > 1:
        raise UserError(f"--config is given {len(files)} times ({', '.join(files)}); give one file")
    return kept, files[0] if files else None


def _spell_out(argv: list[str], known: dict[str, Setting]) -> list[str]:
    """Give each switch with three states a value: --x -> `--x True`, --no-x -> `--x False`."""
    switches = {flag(s.name) for s in known.values() if s.kind is bool and s.optional}
    out: list[str] = []
    for word, following in itertools.pairwise([*argv, ""]):
        name = word.replace("_", "-")
        positive = "--" + name[5:] if name.startswith("--no-") else name
        # tyro has no --no-x for a switch that may also be None.
        if positive in switches and following.lower() not in ("true", "false"):
            out += [positive, str(positive == name)]
        elif out and out[-1].replace("_", "-") in switches:
            out.append(word.title())
        else:
            out.append(word)
    return out


def _check_words(argv: list[str], known: dict[str, Setting]) -> None:
    """Raise UserError for unknown flags, switches with a value, and list flags given twice."""
    given = [word.partition("=")[0].replace("_", "-") for word in argv if word.startswith("--")]
    for setting in known.values():
        name = flag(setting.name)
        # tyro would use only the values after the last occurrence.
        if setting.kind is tuple and (times := given.count(name)) > 1:
            raise UserError(f"{name} is given {times} times; give all its values after one {name}")
    for word, following in itertools.pairwise([*argv, ""]):
        if not word.startswith("--"):
            continue
        typed, _, value = word.partition("=")
        name = typed.removeprefix("--").replace("-", "_")
        positive = name.removeprefix("no_")
        switch = positive in known and known[positive].kind is bool and not known[positive].optional
        if switch and (value or following).lower() in ("true", "false", "yes", "no", "1", "0"):
            on = flag(positive)
            raise UserError(f"{word}: a switch takes no value; give {on} or --no-{on[2:]}")
        if name not in known and name != "help" and not switch:
            guess = nearest(positive, [*known, "config"])
            hint = f"did you mean {flag(guess)}?" if guess else "see --help for the list"
            raise UserError(f"unknown flag {typed}; {hint}")


def _read_yaml(file: str) -> dict[Any, Any]:
    import yaml

    try:
        raw = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"--config {file}: cannot be read ({e.strerror}); check the path") from None
    except yaml.YAMLError as e:
        where = getattr(e, "problem_mark", None)
        line = f":{where.line + 1}" if where else ""
        reason = " ".join(str(getattr(e, "problem", None) or e).split())
        raise UserError(f"--config {file}{line}: malformed YAML ({reason})") from None
    # PyYAML raises these for invalid UTF-8, invalid numbers or dates, and deep nesting.
    except (ValueError, RecursionError) as e:
        raise UserError(f"--config {file}: malformed YAML ({type(e).__name__}: {e})") from None
    if raw is not None and not isinstance(raw, dict):
        found = type(raw).__name__
        raise UserError(f"--config {file}: expected `name: value` lines, found {found}")
    return raw or {}


def _yaml_values(file: str, known: dict[str, Setting]) -> dict[str, Any]:
    """Read settings from a YAML file: minisft's name -> value. Null values are skipped."""
    values: dict[str, Any] = {}
    for key, value in _read_yaml(file).items():
        if value is None and refusal(str(key)):
            continue
        name, text = translate(str(key), str(value), known)
        if not name:  # a name to ignore
            continue
        if text is not None and text != str(value):
            value = text
        name = name.replace("-", "_")
        if name in values:
            raise UserError(f"--config {file}: {key!r} gives {name} a second time")
        if name not in known:
            guess = nearest(name, known)
            hint = f"; did you mean {guess}?" if guess else ""
            raise UserError(f"--config {file}: unknown key {key!r}{hint}")
        if value is None:
            continue
        setting = known[name]
        try:
            values[name] = setting.normalized(_coerced(value, setting))
        except UserError:
            raise wrong(f"--config {file}: {key}", value, setting.expected) from None
    return values


def _coerced(value: Any, setting: Setting) -> Any:
    """Convert a YAML value to its setting's type where possible; else return it unchanged."""
    scalar = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    if setting.kind is tuple:
        return value if isinstance(value, (list, dict)) else [value]
    if scalar and setting.kind in (int, float, str):
        # YAML 1.1 parses 2e-4 as a string, and a name such as 7 as a number.
        with contextlib.suppress(ValueError, OverflowError):
            number = setting.kind(value)
            if setting.kind is not int or number == float(value):
                return number
    return value


def _one_line(box: str) -> str:
    """Convert tyro's boxed error to one line: the first paragraph and the flag's help text."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box).replace("─", "-")
    text = re.sub(r"[━-╿]", " ", text.partition("\n")[2])  # the first line is a title
    paragraphs = [" ".join(p.split()) for p in re.split(r"(?m)^\s*-{5,}\s*$", text)]
    message = next(filter(None, paragraphs), "malformed flags")
    usage = re.search(r"Argument helptext:\s*(--.*)", text)
    return f"{message}; " + (f"expected {usage[1].strip()}" if usage else "see --help")
