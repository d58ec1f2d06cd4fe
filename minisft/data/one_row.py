"""Convert one row to documents: render its text, label its token ids, cut them to max_length."""

import json
import re
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from minisft.batches import IGNORED
from minisft.config.errors import UserError
from minisft.data.formats import Example
from minisft.data.settings import Settings
from minisft.data.stats import Counts
from minisft.text import chat, masks, sandbox
from minisft.text.encoding import TEXT_OPEN, Span, mark_special_text
from minisft.text.parts import join_unread
from minisft.text.tokenizer import Tokenizer

Piece = tuple[np.ndarray, np.ndarray]  # (ids, labels) of a document, int32 [n] both


class Rendered(NamedTuple):
    """The rendered text of one row, its trained spans, and flags for warnings about it."""

    text: str  # all of the row: prompt and completion
    # True: the template already wrote the special tokens. False: the tokenizer adds its own.
    is_chat: bool
    prompt: str | None  # the prompt alone, where the row has one
    spans: list[Span] | None  # characters of `text` that are trained; None: all of them
    joined_parts: bool = False  # the template does not read contents in parts: texts were joined
    no_answer: bool = False  # a chat whose every token is trained has no assistant message
    unread_tools: bool = False  # the template does not write the row's tools
    untrained_answer: bool = False  # an answer has 'weight': 0 or 'train': false


class Document(NamedTuple):
    """One tokenised row, and flags that `data.stats` counts over all rows."""

    ids: np.ndarray  # int32 [n]
    labels: np.ndarray  # int32 [n]; IGNORED where not trained
    seen: dict[str, bool]  # a name in stats.WARNINGS, "padded" or "unread_mask" -> whether it holds


def render_example(example: Example, settings: Settings, tokenizer: Tokenizer) -> Rendered:
    """Render a row: append EOS to a text, or apply the chat template to a chat.

    Raises UserError if the template fails or the text cannot be tokenised.
    """
    if isinstance(example.completion, list):
        return _render_chat(example, example.completion, settings, tokenizer)
    if settings.assistant_only_loss:
        raise UserError("assistant_only_loss needs chat rows; this row is text")
    prompt, completion = example.prompt, example.completion
    assert prompt is None or isinstance(prompt, str)
    eos = tokenizer.special_tokens["eos_token"]
    # Without a trained EOS the model never learns to stop. Do not add a second one.
    completion += "" if completion.endswith(eos) else eos
    text = _encodable((prompt or "") + completion)
    return Rendered(text, False, prompt, _part_spans(text, settings))


def _render_chat(
    example: Example, completion: list[dict], settings: Settings, tokenizer: Tokenizer
) -> Rendered:
    prompt = example.prompt if isinstance(example.prompt, list) else None
    given = [*(prompt or []), *completion]
    messages = join_unread(given, lambda m: _render(example, m, tokenizer))
    if settings.assistant_only_loss:
        text, spans = _assistant_spans(example, messages, tokenizer)
        spans = masks.without_marked(spans, messages)
    else:
        text = _render(example, messages, tokenizer)
        spans = _part_spans(text, settings)
    trained = completion if settings.completion_only_loss else messages
    alone = None
    if prompt is not None:
        alone = _render(example, messages[: len(prompt)], tokenizer, generate=True)
    return Rendered(
        text,
        True,
        alone,
        spans,
        joined_parts=messages != given,
        no_answer=spans is None and not masks.answers(messages),
        unread_tools=_leaves_out_tools(example, messages, tokenizer, text),
        untrained_answer=not all(map(masks.is_trained, masks.answers(trained))),
    )


def _part_spans(text: str, settings: Settings) -> list[Span] | None:
    if not settings.response_part:
        return None
    return masks.marker_spans(text, settings.instruction_part, settings.response_part)


def _encodable(text: str) -> str:
    """Return `text` unchanged; raise UserError if it cannot be tokenised."""
    # Limit the length: tokenising one text of 105 M characters took 11.6 GB of memory.
    if len(text) > sandbox.MAX_CHARS:
        raise UserError(
            f"the text has {len(text):,} characters; at most {sandbox.MAX_CHARS:,} of one row are "
            "tokenised: split it into several rows"
        )
    try:
        # JSON can contain half of a surrogate pair ("\ud83d"), which cannot be encoded as UTF-8.
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise UserError(
            f"the text holds a lone surrogate U+{ord(text[e.start]):04X} at character {e.start}; "
            "repair the row's \\u escapes"
        ) from None
    return text


# Keys of chat_template_kwargs that are arguments of rendering, not variables of the template.
_RENDER_NAMES = ("chat_template", "tools", "documents", "add_generation_prompt")
_REFUSED_NAMES = ("messages", "continue_final_message", "tokenize", "return_dict")


def _render_arguments(example: Example, tokenizer: Tokenizer) -> tuple[str, dict[str, Any]]:
    """Return the chat template of a row, and the keyword arguments of `chat.render`."""
    variables = dict(example.variables or {})
    if refused := [name for name in _REFUSED_NAMES if name in variables]:
        raise UserError(f"chat_template_kwargs sets {refused[0]!r}, which a row cannot choose")
    given = {name: variables.pop(name) for name in _RENDER_NAMES if name in variables}
    tools = given.get("tools", example.tools)
    return given.get("chat_template") or tokenizer.template_for(tools), {
        "special_tokens": tokenizer.special_tokens,
        "tools": mark_special_text(tokenizer, tools),
        "documents": mark_special_text(tokenizer, given.get("documents")),
        "variables": variables,
        "add_generation_prompt": bool(given.get("add_generation_prompt", False)),
    }


def _render(
    example: Example, messages: list[dict], tokenizer: Tokenizer, *, generate: bool = False
) -> str:
    template, arguments = _render_arguments(example, tokenizer)
    arguments["add_generation_prompt"] |= generate
    marked = mark_special_text(tokenizer, messages)
    return _encodable(chat.render(template, marked, **arguments))


def _leaves_out_tools(
    example: Example, messages: list[dict], tokenizer: Tokenizer, text: str
) -> bool:
    """Return True if the row has tools and rendering without them also gives `text`."""
    variables = dict(example.variables or {})
    if not variables.pop("tools", example.tools):
        return False
    bare = example._replace(tools=None, variables=variables)
    try:
        return _render(bare, messages, tokenizer) == text
    except UserError:  # the template needs them
        return False


def _assistant_spans(
    example: Example, messages: list[dict], tokenizer: Tokenizer
) -> tuple[str, list[Span]]:
    """Return the rendered chat and the character spans of the assistant's turns."""
    template, arguments = _render_arguments(example, tokenizer)
    del arguments["add_generation_prompt"]
    marked = mark_special_text(tokenizer, messages)
    if chat.has_generation_block(template):
        text, spans = chat.assistant_spans(template, marked, **arguments)
        return _encodable(text), spans
    special = tokenizer.special_text
    shape = _turn_shape(template, json.dumps(arguments, sort_keys=True, default=str), special)
    text, spans = masks.prefix_spans(_renderer(template, arguments), marked, shape, special)
    return _encodable(text), spans


def _renderer(template: str, arguments: dict[str, Any]) -> masks.Render:
    return lambda messages, generate: chat.render(
        template, messages, add_generation_prompt=generate, **arguments
    )


# Cached because most rows have equal arguments: a probe chat per row would double the rendering.
@lru_cache(maxsize=64)
def _turn_shape(template: str, arguments: str, special: re.Pattern[str]) -> masks.TurnShape:
    """Call `masks.turn_shape` for a template and render arguments (JSON, to be hashable)."""
    return masks.turn_shape(_renderer(template, json.loads(arguments)), special)


def end_of_turn(settings: Settings, tokenizer: Tokenizer) -> str | None:
    """Return the text that ends a trained turn if assistant_only_loss is set, else None.

    Checks the masks on a probe chat; raises UserError if the answer in it would not be trained, or
    the question would be.
    """
    if not settings.assistant_only_loss or settings.format == "input_ids":
        return None
    if tokenizer.chat_template is None:
        return None  # rows may bring their own template; each row without one is an error
    try:
        return masks.check_spans(lambda m: _assistant_spans(Example(None, m), m, tokenizer))
    except UserError as e:
        raise UserError(f"assistant_only_loss: {e}") from None


def read_ids(record: dict, completion_only_loss: bool) -> Document:
    """Convert a row that holds token ids; without labels, they are the ids that its masks select.

    Padding (attention_mask 0) is removed. Raises UserError for a column that is not a list of
    integers in range, or not as long as input_ids.
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
    """Label the ids of a row: IGNORED in the prompt (completion_only_loss) and where mask is False.

    ids: int32 [n]. mask: bool [n]; None: all True. prompt: ids of the prompt tokenised alone.
    """
    labels = ids.copy()
    lost_prompt_tokens = False
    if prompt is not None:
        # The prompt may tokenise differently alone than as a prefix of the row ("th" + "e" is one
        # token), so it ends where the two token sequences first differ. TRL does the same.
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
    """Return True if the last trained non-blank token is special, or if no token is trained."""
    trained = ids[labels != IGNORED]
    # A template may write a newline after the end-of-turn token: skip up to three blank tokens.
    for i in trained[:-5:-1].tolist():
        if i in tokenizer.special_ids:
            return True
        if tokenizer.backend.decode([i], skip_special_tokens=False).strip():
            return False
    return not len(trained)


def fit(document: Document, settings: Settings, where: str, counts: Counts) -> list[Piece]:
    """Apply --overlong to a document; return it uncut, truncated, or split, or [] if dropped.

    where: names the row in the UserError of overlong "error". counts: updated with the outcome.
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
        # A row whose only label is on its first token has no target. Keep it, as TRL does.
        pieces = [piece for piece in pieces if (piece[1] != IGNORED).any()]
    if not pieces:
        reason = "nothing to train within max_length" if too_long else "nothing to train"
        counts.dropped[reason] += 1
    elif too_long:
        counts.seen["split" if settings.overlong == "split" else "truncated"] += 1
    return pieces
