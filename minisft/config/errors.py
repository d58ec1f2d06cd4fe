"""`UserError`, for errors that users can fix, and helpers that build its messages."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An error that the user can fix. Its one-line message has the value and what to do.

    Scripts print it without a traceback and exit with code 2.
    """


def flag(name: str) -> str:
    """Convert the name of a setting to its flag: lora_r -> --lora-r."""
    return "--" + name.replace("_", "-")


def wrong(name: str, value: object, expected: str) -> UserError:
    """Return a UserError for an invalid value: `NAME is VALUE; expected EXPECTED`."""
    return UserError(f"{name} is {value!r}; expected {expected}")


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name with the spelling closest to `name`; None if none is close."""
    # A lower cutoff gives guesses of unrelated meaning, for example for --wandb and --lr-decay.
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.72)), None)
