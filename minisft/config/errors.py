"""The exception for errors that users can fix, and what error messages are built from."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An error that the user can cause and fix: one line with the value and what to do.

    Scripts print it without a traceback and exit with code 2.
    """


def flag(name: str) -> str:
    """lora_r -> --lora-r."""
    return "--" + name.replace("_", "-")


def wrong(name: str, value: object, expected: str) -> UserError:
    """The error for a value that cannot be used: `NAME is VALUE; expected EXPECTED`."""
    return UserError(f"{name} is {value!r}; expected {expected}")


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is spelled most like this one, for "did you mean"; None if none is."""
    # Below 0.72, guesses share letters rather than meaning: --wandb, --lr-decay.
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.72)), None)
