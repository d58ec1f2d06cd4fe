"""One row to documents: token ids with a label each, cut to max_length."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minisft.batches import IGNORED
from minisft.config.errors import UserError
from minisft.data.render import Rendered
from minisft.data.settings import Settings
from minisft.data.stats import Counts
from minisft.text.encoding import TEXT_OPEN
from minisft.text.tokenizer import Tokenizer

Piece = tuple[np.ndarray, np.ndarray]  # (ids, labels) of a document, int32 [n] both


class Document(NamedTuple):
    """One tokenised row, and the names of what `stats` counts in it."""

    ids: np.ndarray  # int32 [n]
    labels: np.ndarray  # int32 [n]; IGNORED where not trained
    seen: dict[str, bool]  # a name in stats.WARNINGS, "padded" or "unread_mask" -> whether it holds


def read_ids(record: dict, *, completion_only_loss: bool) -> Document:
    """Return a row that is tokenised already: its labels, or its ids under its masks.

    Padding, where attention_mask is 0, is removed. Raises UserError for a column that is not a
    list of integers in range, as long as input_ids.
    """
    ids = _int_array(record, "input_ids", None)
    unread_mask = False
    if record.get("labels") is not None:
        labels = _int_array(record, "labels", len(ids))
    else:
        labels = ids.copy()
        for name in ("completion_mask", "assistant_masks"):
            if record.get(name) is None:
                continue
            untrained = _int_array(record, name, len(ids)) == 0
            if name == "completion_mask" and not completion_only_loss:
                unread_mask = bool(untrained.any())
            else:
                labels[untrained] = IGNORED
    if record.get("attention_mask") is None:
        return Document(ids, labels, {"unread_mask": unread_mask})
    mask = _int_array(record, "attention_mask", len(ids))
    if len(mask) and mask.max() > 1:
        raise UserError(
            f"attention_mask holds {mask.max()}; expected 1 for a token and 0 for padding"
        )
    real = mask == 1
    seen = {"unread_mask": unread_mask, "padded": not real.all()}
    return Document(ids[real], labels[real], seen)


def _int_array(record: dict, name: str, length: int | None) -> np.ndarray:
    value = record.get(name)
    try:
        array = np.asarray(value if value != [] else np.zeros(0, dtype=np.int64))
    except ValueError:  # lists of several lengths inside it
        raise UserError(f"{name} is a list of lists; expected a list of integers") from None
    if not isinstance(value, list) or array.ndim != 1 or array.dtype.kind not in "iub":
        raise UserError(f"{name} is {type(value).__name__}; expected a list of integers")
    if length is not None and len(array) != length:
        raise UserError(f"{name} has {len(array)} entries; expected {length}, as input_ids")
    lowest = IGNORED if name == "labels" else 0
    if len(array) and not (lowest <= array.min() and array.max() < 2**31):
        raise UserError(f"{name} holds {array.min()}..{array.max()}; expected {lowest}..2^31-1")
    return array.astype(np.int32)


def label_row(
    ids: np.ndarray,
    mask: np.ndarray | None,
    prompt: np.ndarray | None,
    rendered: Rendered,
    settings: Settings,
    tokenizer: Tokenizer,
) -> Document:
    """Return a row's ids with their labels: IGNORED in the prompt and where mask is False.

    ids int32 [n]; mask bool [n], None: all True; prompt: ids of the prompt tokenised alone.
    """
    labels = ids.copy()
    lost_prompt_tokens = False
    if prompt is not None:
        # The prompt may tokenise differently alone than as a prefix of the row ("th" + "e" is one
        # token), so it ends where the two token sequences part. TRL does the same.
        shared = min(len(prompt), len(ids))
        differs = np.flatnonzero(prompt[:shared] != ids[:shared])
        prompt_length = int(differs[0]) if len(differs) else shared
        lost_prompt_tokens = prompt_length < len(prompt)
        if settings.completion_only_loss:
            labels[:prompt_length] = IGNORED
    if mask is not None:
        labels[~mask] = IGNORED
    checks_end = rendered.is_chat and not rendered.no_answer
    seen = {
        "lost_prompt_tokens": lost_prompt_tokens,
        "special_text": TEXT_OPEN in rendered.text,
        "joined_parts": rendered.joined_parts,
        "no_answer": rendered.no_answer and prompt is None,
        "no_end": checks_end and not _ends_in_special(ids, labels, tokenizer),
        "unread_tools": rendered.unread_tools,
        "unread_marks": rendered.untrained_answer and not settings.assistant_only_loss,
    }
    return Document(ids, labels, seen)


def _ends_in_special(ids: np.ndarray, labels: np.ndarray, tokenizer: Tokenizer) -> bool:
    """Whether the last trained non-blank token is a special token; True if none is trained."""
    trained = ids[labels != IGNORED]
    # A template may write a line end after the end-of-turn token: look past up to three blanks.
    for i in trained[:-5:-1].tolist():
        if i in tokenizer.special_ids:
            return True
        if tokenizer.backend.decode([i], skip_special_tokens=False).strip():
            return False
    return not len(trained)


def fit(document: Document, settings: Settings, where: str, counts: Counts) -> list[Piece]:
    """Return the document cut as `overlong` says: in full, cut, in pieces, or nothing (dropped).

    where: names the row in the UserError of overlong "error". counts: gets what happened.
    """
    ids, labels = document.ids, document.labels
    length = settings.max_length or max(1, len(ids))
    too_long = len(ids) > length
    if too_long and settings.overlong == "error":
        raise UserError(
            f"{where}: {len(ids)} tokens; --max-length is {length} and --overlong is error; "
            "raise --max-length, or choose truncate, split or drop"
        )
    if too_long and settings.overlong == "drop":
        counts.dropped["longer than max_length"] += 1
        return []
    if too_long and settings.packing is not None and settings.overlong is None:
        counts.seen["truncated" if settings.packing == "bfd" else "split"] += 1
        return [(ids, labels)]  # packing cuts it
    starts = range(0, len(ids), length) if settings.overlong == "split" and too_long else [0]
    pieces = [(ids[a : a + length], labels[a : a + length]) for a in starts]
    if settings.packing is None:
        # A row whose only label is on its first token has no target, but TRL keeps it: so do we.
        pieces = [piece for piece in pieces if (piece[1] != IGNORED).any()]
    if not pieces:
        reason = "nothing to train within max_length" if too_long else "nothing to train"
        counts.dropped[reason] += 1
    elif too_long:
        counts.seen["split" if settings.overlong == "split" else "truncated"] += 1
    return pieces
