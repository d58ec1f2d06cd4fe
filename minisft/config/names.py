"""Translate Hugging Face's names of settings to minisft's, or refuse them with a reason.

The tables are in names.toml. minisft/config/README.md shows the same tables, and a test compares
the two files.
"""

import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from minisft.config.errors import UserError, closest, flag, wrong

_TABLES = tomllib.loads((Path(__file__).parent / "names.toml").read_text(encoding="utf-8"))
ALIASES: dict[str, str] = _TABLES["aliases"]
VALUES: dict[str, dict[str, str]] = _TABLES["values"]
_SPELLINGS: dict[str, dict[str, str]] = _TABLES["spellings"]
SWITCHES: dict[str, tuple[str, str]] = {k: (s, v) for k, (s, v) in _TABLES["switches"].items()}
# A key that ends in * stands for all names with that prefix.
REFUSED: dict[str, str] = _TABLES["refused"] | {
    name: group["why"] for group in _TABLES["refused_together"] for name in group["names"]
}
_ON, _OFF = ("true", "yes", "1", "on", ""), ("false", "no", "0", "off", "none")


def refusal(name: str) -> str:
    """Return the reason why a setting (such as hub_token) is refused, or "" if it is not."""
    starred = (why for key, why in REFUSED.items() if key[-1] == "*" and name.startswith(key[:-1]))
    return REFUSED.get(name) or next(starred, "")


def respelled(name: str, value: Any) -> Any:
    """Return a setting's value with an alternative spelling replaced by the current spelling."""
    # The tables hold True as "True"; they have no keys for numbers and lists.
    key = value.lower() if isinstance(value, str) else repr(value)
    return _SPELLINGS.get(name, {}).get(key, value)


def nearest(name: str, known: Collection[str]) -> str | None:
    """Return the known setting that a name most likely means, or None: the setting that other
    programs call by this name, or else the known name with the closest spelling."""
    guess = _TABLES["guesses"].get(name)
    return guess if guess in known else closest(name, known)


def translate(name: str, value: str | None, known: Collection[str]) -> tuple[str, str | None]:
    """Translate Hugging Face's name of a setting to (minisft's name, value).

    value: the text given, or None. known: the names of the script's settings. A name in `known`,
    or in no table, is returned unchanged. Returns ("", None) for a setting to ignore: a switch
    that is off, or a refused name whose value asks for what minisft does anyway.
    Raises UserError with the reason for a refused name with any other value.
    """
    plain = name.replace("-", "_")
    ours = plain if plain in known else ALIASES.get(plain, "")
    if plain == "warmup_ratio" and not _below_one(value):
        raise wrong(flag(plain), value, "a share of the steps below 1, or --warmup-steps N")
    if ours in known:
        new_value = VALUES.get(ours, {}).get((value or "").lower(), value)
        return name if ours == plain else ours, new_value
    negated = plain.startswith("no_")
    switch = SWITCHES.get(plain.removeprefix("no_"))
    if switch and switch[0] in known:
        text = (value or "").lower()
        if text not in _ON + _OFF:
            raise wrong(flag(plain), value, "true or false")
        return ("", None) if negated or text in _OFF else switch
    key = plain if refusal(plain) else plain.removeprefix("no_")
    # A script without lora_r does not train: it reports a refused name as an unknown flag.
    if "lora_r" not in known or not (why := refusal(key)):
        return name, value
    if _is_done_anyway(key, (value or "on").lower() if key == plain else "no"):
        return "", None
    raise UserError(f"{flag(plain)} is not a setting here: {why}")


def _below_one(text: str | None) -> bool:
    try:
        return not float(text or "") >= 1
    except ValueError:
        return True  # the parser reports what is not a number


def _is_done_anyway(name: str, text: str) -> bool:
    """Return whether a refused setting's value asks for what training does without it."""
    if text in (*_OFF, "{}", "[]") and name not in _TABLES["on_only"]["names"]:
        return True
    done = _TABLES["accepted"].get(name)
    return text == done or (done == "true" and text in _ON)


def translate_flags(argv: list[str], known: Collection[str]) -> list[str]:
    """Return the command line with every flag translated to minisft's name (`translate`).

    Raises UserError if two different flags give the same setting.
    """
    out, typed, rest = [], dict[str, str](), list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            out.append(word)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        text = value if equals else _take_value(name.replace("-", "_"), rest, known)
        new, new_value = translate(name, text, known)
        if not new:
            continue
        ours = new.replace("-", "_").removeprefix("no_")
        this = word.partition("=")[0] if name.replace("-", "_") in known else word
        first = typed.setdefault(ours, this)
        if ours in known and first.replace("_", "-") != this.replace("_", "-"):
            raise UserError(f"{first} and {this} both give {flag(ours)}; drop one")
        if new == name and new_value == text:
            out.append(word)
        else:
            out += [flag(new)] if new_value is None else [flag(new), new_value]
    return out


def _take_value(name: str, rest: list[str], known: Collection[str]) -> str | None:
    """Return the value of a flag without "=", removed from `rest`, if a table needs the value.

    Returns "" for a switch or a refused name without a value, None for a flag in no table.
    """
    following = rest[0] if rest else "--"
    values = VALUES.get(ALIASES.get(name, name), {})
    is_switch = name.removeprefix("no_") in SWITCHES
    needed = name == "warmup_ratio" or ("lora_r" in known and bool(refusal(name)))
    takes = values or (_ON[:-1] + _OFF if is_switch else ())
    if following.lower() in takes or (needed and not following.startswith("--")):
        return rest.pop(0)
    if "true" in values and following.startswith("--"):
        return "true"
    return "" if is_switch or needed else None
