"""The one exception for what a user can fix, and how a setting is spelled as a flag."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can cause and mend: one line that says what, the value, and the remedy.

    Scripts print it without a traceback and leave with exit code 2.
    """


def flag(name: str) -> str:
    """lora_r -> --lora-r."""
    return "--" + name.replace("_", "-")
