"""Flags and exit codes, shared by the scripts: tyro parses, errors are one line.

Exit codes: 0 done, 2 the user can mend it, 3 a guard stopped training, 75 preempted with a good
checkpoint, 1 unexpected (with a traceback).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from minisft.config.errors import UserError, flag
from minisft.config.names import refusal, translate, translate_flags
from minisft.config.train import WHOLE_NUMBERS, describe_type, switched

Config = TypeVar("Config")


def parse_flags(cls: type[Config], argv: Sequence[str], *, prog: str, default: Config) -> Config:
    """`--config FILE.yaml` first, then flags, onto `default`; hyphens and underscores are the same.

    cls: a dataclass whose fields are the flags. Raises UserError in one line for an unknown flag or
    key (with the nearest name) and for a value of the wrong type; SystemExit(0) after --help.
    """
    import tyro

    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    argv, config_file = _take_config(list(argv))
    argv = translate_flags(argv, fields)
    if config_file is not None:
        default = _with_yaml(default, config_file, fields)
    argv = _spell_out(argv, fields)
    _check_lists_once(argv, fields)
    for word, following in itertools.pairwise([*argv, ""]):
        if word.startswith("--"):
            _check_known(word, following, fields)
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(cls, args=argv, prog=prog, default=default, description=cls.__doc__)
    except SystemExit as e:
        if e.code in (0, None):
            raise
        if isinstance(e.__context__, UserError):  # the dataclass's own: tyro would break its lines
            raise e.__context__ from None
        raise UserError(_one_line(captured.getvalue())) from None


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether the flags ask for the list of flags."""
    return "--help" in argv or "-h" in argv


def run_main(main: Callable[[], Any], stopped: dict[type[BaseException], int]) -> int:
    """Call `main` and turn how it ended into an exit code; user errors and warnings are one line
    on stderr.

    stopped: exception type -> exit code for endings that are neither success nor the user's error.
    """

    def tell(line: str) -> None:
        line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", line)  # of names in files
        with contextlib.suppress(OSError):  # nobody reads any more: the exit code still tells
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


def _take_config(argv: list[str]) -> tuple[list[str], str | None]:
    kept, files = [], []
    words = iter(argv)
    for word in words:
        if word == "--config":
            file = next(words, None)
            if file is None:
                raise UserError("--config: expected a YAML file after it")
            files.append(file)
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            kept.append(word)
    if len(files) > 1:
        raise UserError(f"--config is given {len(files)} times ({', '.join(files)}); give one file")
    return kept, files[0] if files else None


def _spell_out(argv: list[str], fields: dict[str, Any]) -> list[str]:
    """A switch that may be left open: --x and --no-x become `--x True` and `--x False`."""
    open_switches = {flag(name) for name, f in fields.items() if f.type == "bool | None"}
    out: list[str] = []
    for word, following in itertools.pairwise([*argv, ""]):
        name = word.replace("_", "-")
        given = following.lower() in ("true", "false")
        if name in open_switches and not given:
            out += [name, "True"]
        elif name.startswith("--no-") and "--" + name[5:] in open_switches and not given:
            out += ["--" + name[5:], "False"]
        elif out and out[-1].replace("_", "-") in open_switches:
            out.append(word.title())
        else:
            out.append(word)
    return out


def _check_lists_once(argv: list[str], fields: dict[str, Any]) -> None:
    """A list that is given twice would silently lose the first part."""
    lists = [flag(name) for name, f in fields.items() if str(f.type).startswith("tuple")]
    given = [word.partition("=")[0].replace("_", "-") for word in argv if word.startswith("--")]
    for name in lists:
        if (times := given.count(name)) > 1:
            raise UserError(f"{name} is given {times} times; give all its values after one {name}")


def _check_known(word: str, following: str, fields: dict[str, Any]) -> None:
    name, _, value = word.partition("=")
    name = name.removeprefix("--").replace("-", "_")
    positive = name.removeprefix("no_")
    switch = positive in fields and fields[positive].type in ("bool", bool)
    if switch and (value or following).lower() in ("true", "false", "yes", "no", "1", "0"):
        on = flag(positive)
        raise UserError(f"{word}: a switch takes no value; give {on} or --no-{on[2:]}")
    if name in fields or name == "help" or switch:
        return
    guess = _nearest(positive, [*fields, "config"])
    hint = f"did you mean {flag(guess)}?" if guess else "see --help for the list"
    raise UserError(f"unknown flag {word.split('=', 1)[0]}; {hint}")


# What other programs call our settings, where the letters alone would lead astray.
_OTHER_NAMES = {
    "lr": "learning_rate", "batch_size": "per_device_train_batch_size", "wd": "weight_decay",
    "train_batch_size": "per_device_train_batch_size", "epochs": "num_train_epochs",
    "accumulation": "gradient_accumulation_steps", "grad_accum": "gradient_accumulation_steps",
    "max_seq_length": "max_length", "max_seq_len": "max_length", "cutoff_len": "max_length",
    "rank": "lora_r", "r": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout",
    "data": "dataset", "train_file": "dataset", "model_name_or_path": "model",
    "model_name": "model", "output": "output_dir", "out": "output_dir", "resume":
    "resume_from_checkpoint", "scheduler": "lr_scheduler_type", "warmup": "warmup_steps",
    "optimizer": "optim", "steps": "max_steps", "eval_file": "eval_dataset",
    "warmup_ratio": "warmup_steps", "keep": "save_total_limit", "bf16": "dtype", "fp16": "dtype",
}  # fmt: skip


def _nearest(name: str, known: list[str]) -> str | None:
    """The setting that a name most likely means: by what others call it, else by its letters."""
    if (ours := _OTHER_NAMES.get(name)) in known:
        return ours
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.72)), None)


def _with_yaml(default: Config, file: str, fields: dict[str, Any]) -> Config:
    import yaml

    try:
        raw = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"--config {file}: cannot be read ({e.strerror}); check the path") from None
    except UnicodeDecodeError as e:
        raise UserError(f"--config {file}: not UTF-8 at byte {e.start}") from None
    except yaml.YAMLError as e:
        where = getattr(e, "problem_mark", None)
        line = f":{where.line + 1}" if where else ""
        reason = " ".join(str(getattr(e, "problem", None) or e).split())
        raise UserError(f"--config {file}{line}: malformed YAML ({reason})") from None
    except (ValueError, RecursionError) as e:  # a number or a date that is none, deep nesting
        raise UserError(f"--config {file}: malformed YAML ({type(e).__name__}: {e})") from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise UserError(
            f"--config {file}: expected `name: value` lines, found {type(raw).__name__}"
        )
    values = {}
    for key, value in raw.items():
        off = value is None and bool(refusal(str(key)))
        name, text = ("", None) if off else translate(str(key), str(value), fields)
        if not name:  # a switch that is off
            continue
        value = text if text is not None and text != str(value) else value
        name = name.replace("-", "_")
        if name in values:
            raise UserError(f"--config {file}: {key!r} gives {name} a second time")
        if name not in fields:
            guess = _nearest(name, list(fields))
            hint = f"; did you mean {guess}?" if guess else ""
            raise UserError(f"--config {file}: unknown key {key!r}{hint}")
        if value is None:  # it is not given
            continue
        kind = str(fields[name].type)
        wanted = describe_type(name, kind)
        if name in WHOLE_NUMBERS:
            items = value if isinstance(value, list) else [value]
            value = [str(item) if type(item) is int else item for item in items]
        values[name] = _coerce(
            switched(name, value), kind, f"--config {file}: {key} is {value!r}; expected {wanted}"
        )
    return dataclasses.replace(default, **values)  # pyright: ignore[reportArgumentType]


def _coerce(value: Any, kind: str, problem: str) -> Any:
    """A YAML value as the field's type; YAML 1.1 reads 2e-4 as a string, which it is not here.

    problem: what the UserError says for a value of another type.
    """
    kind = kind.removesuffix(" | None")
    try:
        if kind == "bool" and isinstance(value, bool):
            return value
        if kind == "int" and not isinstance(value, bool) and int(value) == float(value):
            return int(value)
        if kind == "float" and not isinstance(value, bool):
            return float(value)
        if kind.startswith("tuple"):
            if isinstance(value, dict):  # columns: {prompt: question}
                return tuple(f"{k}={v}" for k, v in value.items())
            items = value if isinstance(value, list) else [value]
            if all(isinstance(i, str) for i in items):
                return tuple(items)
        if kind == "str" and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(problem)


def _one_line(box: str) -> str:
    """tyro's boxed message: its first paragraph, and what the flag expects if that is in it."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box).replace("─", "-")
    text = re.sub(r"[━-╿]", " ", text.partition("\n")[2])  # the first line is a title
    paragraphs = [" ".join(p.split()) for p in re.split(r"(?m)^\s*-{5,}\s*$", text)]
    message = next(filter(None, paragraphs), "malformed flags")
    usage = re.search(r"Argument helptext:\s*(--.*)", text)
    return f"{message}; " + (f"expected {usage[1].strip()}" if usage else "see --help")
