"""Statistics of a dataset's rows: counts, warnings, and the error if nothing is left to train."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from minisft.config.errors import UserError
from minisft.data.readers import Rows
from minisft.data.settings import Settings
from minisft.data.token_files import TokenWriter


@dataclass
class Counts:
    """Row counts: dropped rows per reason, and rows per warning (the names are WARNINGS' keys)."""

    dropped: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    longest: int = 0  # tokens of the longest row, before it is cut

    def add(self, other: Counts) -> None:
        """Add the counts `other`, of another group of rows, to these."""
        self.dropped.update(other.dropped)
        self.seen.update(other.seen)
        self.longest = max(self.longest, other.longest)


def source_stats(
    rows: Rows, settings: Settings, end_of_turn: str | None, counts: Counts, num_rows: int
) -> dict[str, Any]:
    """Return the statistics of one source. num_rows: its rows in the result (packed if packing)."""
    return {
        "source": rows.source,
        "format": settings.format,
        "columns": rows.renames,
        "rows_total": len(rows) + rows.skipped,
        "rows_read": counts.seen["read"] + rows.skipped,
        "rows_kept": counts.seen["kept"],
        "rows": num_rows,
        "end_of_turn": end_of_turn,
    }


def dataset_stats(
    sources: list[dict[str, Any]],
    counts: Counts,
    writer: TokenWriter,
    settings: Settings,
    template: str | None,
) -> dict[str, Any]:
    """Return the statistics of a dataset, as recorded in run.json.

    sources: `source_stats` of each source. template: the chat template. `TokenWriter.finish` adds
    the numbers of tokens.
    """
    found = dict.fromkeys(source["format"] for source in sources)
    seen = counts.seen
    warned = [text.format(n=seen[k], kept=seen["kept"]) for k, text in WARNINGS.items() if seen[k]]
    stats = {
        "format": ", ".join(found),
        "rows_read": sum(source["rows_read"] for source in sources),
        "rows_kept": seen["kept"],
        "dropped": {reason: n for reason, n in counts.dropped.items() if n},
        "padded": seen["padded"],
        "truncated": seen["truncated"],
        "split": seen["split"],
        "longest": counts.longest,
        "duplicates": writer.num_duplicates(),
        "packing_efficiency": None,
        "chat_template_sha256": template and hashlib.sha256(template.encode()).hexdigest(),
        "warnings": warned,
        "sources": sources,
    }
    if settings.packing is not None and settings.max_length is not None:
        stats["rows_packed"] = writer.num_rows
        room = writer.num_rows * settings.max_length
        stats["packing_efficiency"] = writer.num_tokens / max(room, 1)
    if settings.completion_only_loss is None and (n := seen["unread_mask"]):
        stats["warnings"].append(
            f"{n} of {seen['kept']} rows have a completion_mask, which only "
            "--completion-only-loss applies; without it every token is trained"
        )
    if settings.completion_only_loss and found.keys() & {"text", "messages", "sharegpt"}:
        stats["warnings"].append(
            f"completion_only_loss has no effect on format {stats['format']!r}: every token is "
            "trained; use prompt and completion columns, or assistant_only_loss"
        )
    return stats


# Name in Counts.seen -> warning about n of the rows that are not dropped, with a remedy.
WARNINGS = {
    "lost_prompt_tokens": (
        "in {n} of {kept} rows the prompt's last tokens change when the completion follows, and "
        "count as completion; end the prompt at a token boundary, for instance by moving its last "
        "space to the start of the completion"
    ),
    "two_bos": (
        "{n} of {kept} rows start with two BOS tokens; the tokenizer adds one, so leave it out of "
        "the text"
    ),
    "special_text": (
        "{n} of {kept} chats hold special-token strings in their messages; they are encoded as "
        "plain text"
    ),
    "joined_parts": (
        "{n} of {kept} chats hold contents in parts that the chat template does not read; the "
        "texts of the parts are joined"
    ),
    "no_answer": (
        "{n} of {kept} chats hold no assistant message, and every token of them is trained, the "
        "user's words too; leave them out, or use --assistant-only-loss"
    ),
    "no_end": (
        "in {n} of {kept} chats the last trained token is not a special token, so nothing there "
        "teaches the model to stop; does the chat template end the assistant's turn inside the "
        "trained part?"
    ),
    "unread_tools": (
        "{n} of {kept} chats have tools that the chat template does not write, so the model does "
        "not see them; give a --chat-template that does, or leave the tools out"
    ),
    "unread_marks": (
        "{n} of {kept} chats mark answers with 'weight': 0 or 'train': false, but these are "
        "trained too; use --assistant-only-loss to leave them out"
    ),
}


def _newline_hint(part: str) -> str:
    # In bash, "\n" in plain quotes is a backslash and an n, so such a part matches no text.
    return "; bash writes a line end as $'...\\n'" if "\\n" in part else ""


def check_instruction_part(settings: Settings, counts: Counts, source: str) -> None:
    """Raise UserError if --instruction-part occurs in no rendered row of a source.

    Otherwise everything after the first response part would be trained, including user messages.
    """
    part = settings.instruction_part
    if part and counts.seen["kept"] and not counts.seen["instruction"]:
        raise UserError(
            f"{source}: --instruction-part {part!r} is in none of the rendered rows, so everything "
            "after the first response part would be trained" + _newline_hint(part)
        )


def nothing_to_train(stats: dict[str, Any], settings: Settings) -> UserError:
    """Return the UserError for a dataset without trained tokens: rows dropped, and the remedy."""
    names = ", ".join(source["source"] for source in stats["sources"])
    dropped = "".join(f", {n} dropped ({reason})" for reason, n in stats["dropped"].items())
    cut = settings.max_length is not None and stats["longest"] > settings.max_length
    remedy = "raise --max-length" if cut else "give rows with something to learn"
    if settings.response_part and not cut:
        remedy = (
            f"is --response-part {settings.response_part!r} in the rendered rows? Look at them "
            "with --preview" + _newline_hint(settings.response_part)
        )
    return UserError(
        f"{names}: nothing is left to train: {stats['rows_read']} rows read, "
        f"{stats['rows_kept']} kept{dropped}; the longest row has "
        f"{stats['longest']} tokens, --max-length is {settings.max_length}; {remedy}"
    )
