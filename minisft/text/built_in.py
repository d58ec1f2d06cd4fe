"""The built-in chat templates, for bases that ship none. Each marks the assistant's turns.

Where a template writes special tokens, the tokenizer must have them. `alpaca` and `plain` write
only the tokenizer's own BOS and EOS, so they fit every base.
"""

from __future__ import annotations

from pathlib import Path

from minisft.config.errors import UserError

# Name of a file in templates/ -> the special tokens that it writes as strings.
BUILT_IN: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "alpaca": (),
    "plain": (),
}


def built_in_template(name: str, special: set[str]) -> str:
    """Return the template of that name. special: the tokenizer's special tokens, as strings.

    Raises UserError if the template writes a token that the tokenizer lacks: it would become
    several tokens of text, and the end of a turn would not stop generation.
    """
    if missing := [token for token in BUILT_IN[name] if token not in special]:
        raise UserError(
            f"--chat-template {name} writes {', '.join(missing)}, which this tokenizer does not "
            "have as special tokens; use alpaca or plain, which end a turn with its own EOS"
        )
    # The files have no line break but those that a template writes, at their end too: runs save
    # the text, and its bytes are part of the key under which tokenised rows are cached.
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_bytes().decode()
