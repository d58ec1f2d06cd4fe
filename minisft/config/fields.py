"""Declare settings as dataclass fields with notes in `Annotated`, and check their values.

    lora_r: Annotated[int, Fixed, at_least(1)] = 16

The type of a setting is bool, int, float, str, tuple[str, ...] or a `Literal` of its choices. The
notes (Fixed, Free, Check, Items, Idle) add conditions. A field without notes is checked for its
type only, so a subclass may add fields of any type.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar

from minisft.config.errors import UserError, flag, wrong
from minisft.config.names import respelled

Note = TypeVar("Note")
# A run that resumes from a checkpoint may change Free settings, but not Fixed settings.
Fixed, Free = "fixed on resume", "free on resume"


class Check(NamedTuple):
    """A condition on a setting's value; `expected` describes it at the end of error messages."""

    holds: Callable[[Any], Any]
    expected: str


def at_least(limit: float) -> Check:
    """Return the Check that a number is `limit` or more."""
    return Check(lambda value: value >= limit, f"at least {limit}")


def above(limit: float) -> Check:
    """Return the Check that a number is greater than `limit`."""
    return Check(lambda value: value > limit, f"above {limit}")


class Items(NamedTuple):
    """Metadata of a list setting's type annotation: which items the list may contain."""

    what: str = "names"  # for messages
    choices: tuple[str, ...] = ()  # the allowed items; () allows any
    also: type = str  # a type other than str that Python callers may give
    commas: bool = True  # whether an item is split at commas


class Idle(NamedTuple):
    """A note: the setting has no effect if `other` has one of `values` (or, with unless, none).

    Giving the setting is an error that suggests the remedy, or, without a remedy, a warning
    (for pairs that Trainer accepts). why: the cause in the message, by default the other setting
    as a flag; {name} is replaced by the value of that setting.
    """

    other: str
    values: tuple[Any, ...]
    remedy: str = ""
    why: str = ""
    unless: bool = False


class Setting(NamedTuple):
    """The declaration of one field. kind: bool, int, float, str, tuple, or object (unchecked)."""

    name: str
    kind: type
    optional: bool  # None is allowed
    choices: tuple[Any, ...]
    notes: tuple[Any, ...]

    def all(self, kind: type[Note]) -> list[Note]:
        """Return the notes that are instances of the class `kind`."""
        return [note for note in self.notes if isinstance(note, kind)]

    @property
    def items(self) -> Items:
        """The setting's Items note, or the default Items if it has none."""
        return next(iter(self.all(Items)), Items())

    @property
    def expected(self) -> str:
        """The setting's type for messages: "int", "str or None", "a list of token ids"."""
        kind = f"a list of {self.items.what}" if self.kind is tuple else self.kind.__name__
        return kind + " or None" * self.optional

    def normalized(self, value: Any) -> Any:
        """Convert a value to its stored form: current spelling, Path to str, list to tuple of str.

        Raises UserError for a value of the wrong type.
        """
        value = respelled(self.name, value)
        if self.kind is object or (value is None and self.optional):
            return value
        if isinstance(value, Path) and self.kind in (str, tuple):
            value = str(value)
        if isinstance(value, dict) and "=" in self.items.what:
            value = tuple(f"{k}={v}" for k, v in value.items())
        wider = {float: (int, float), tuple: (str, tuple, list)}.get(self.kind, self.kind)
        # isinstance(True, int) is true, so bools need their own check.
        if not isinstance(value, wider) or (isinstance(value, bool) and self.kind is not bool):
            raise wrong(flag(self.name), value, self.expected)
        if self.kind is not tuple:
            return value
        given: Any = [value] if isinstance(value, str) else value
        for item in given:
            if isinstance(item, bool) or not isinstance(item, (str, self.items.also)):
                raise UserError(f"{flag(self.name)} holds {item!r}; expected a list of strings")
        items = [str(item) for item in given]
        # Do not split regular expressions and file names, which may contain commas.
        if self.items.commas and not any(item.startswith("re:") for item in items):
            items = [part for item in items for part in item.split(",")]
        return tuple(filter(None, items))

    def check(self, value: Any) -> None:
        """Raise UserError for a value that is not one of the choices or fails a `Check`."""
        if value is None:
            return
        name, items = flag(self.name), self.items
        if self.choices and value not in self.choices:
            raise wrong(name, value, f"one of {', '.join(map(str, self.choices))}")
        for check in self.all(Check):
            # inf passes every lower bound but is not a useful value.
            if not check.holds(value) or value == math.inf:
                raise wrong(name, value, check.expected + ", or none" * self.optional)
        for item in value if items.choices else ():
            if item not in items.choices:
                raise wrong(name, item, f"some of {items.what}")


@lru_cache
def settings(cls: type) -> dict[str, Setting]:
    """Return the settings that a dataclass declares: name -> Setting, in field order."""
    found = {}
    # field.type would be a string under `from __future__ import annotations`.
    hints = typing.get_type_hints(cls, include_extras=True)
    for name in (field.name for field in dataclasses.fields(cls)):
        hint, notes = hints[name], getattr(hints[name], "__metadata__", ())
        hint = hint.__origin__ if notes else hint
        union = typing.get_origin(hint) in (typing.Union, UnionType)
        members = typing.get_args(hint) if union else (hint,)
        kinds = [member for member in members if member is not NoneType]
        kind, choices = kinds[0] if len(kinds) == 1 else object, ()
        if typing.get_origin(kind) is Literal:
            choices = typing.get_args(kind)
            kind = str if all(isinstance(choice, str) for choice in choices) else object
        elif kind == tuple[str, ...]:
            kind = tuple
        elif kind not in (bool, int, float, str):
            kind = object
        found[name] = Setting(name, kind, NoneType in members, choices, notes)
    return found


def fixed_on_resume(cls: type) -> tuple[str, ...]:
    """Return the names of settings that a run must not change when it resumes."""
    return tuple(name for name, setting in settings(cls).items() if Fixed in setting.notes)


def idle_settings(config: Any) -> Iterator[tuple[str, str, str]]:
    """Yield (name, why, remedy) for each given setting that has no effect with the others.

    A setting is given if it differs from its default. The remedy is "" if a warning is enough.
    """
    for name, setting in settings(type(config)).items():
        given = getattr(config, name) != getattr(type(config), name, None)
        for note in setting.all(Idle) if given else ():
            value = getattr(config, note.other)
            if (value in note.values) != note.unless:
                why = note.why.format_map(vars(config)) or as_flag(note.other, value)
                yield name, why, note.remedy


def as_flag(name: str, value: Any) -> str:
    """Format a setting as a flag: --packing, --no-packing, --lora-r 8, --report-to none."""
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    shown = " ".join(value) or "none" if isinstance(value, tuple) else value
    return f"{flag(name)} {shown}" if shown != "" else f"{flag(name)} ''"
