"""Which characters of a rendered chat the loss sees: the assistant's turns, found in three ways.

By the template's own `{% generation %}` blocks (`chat.assistant_spans`), by rendering the chat's
prefixes where the template has none, or between two marker strings.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from minisft.config.errors import UserError
from minisft.text.tokenizer import TEXT_CLOSE, TEXT_OPEN

ASSISTANT = ("assistant", "model")
Span = tuple[int, int]  # characters, end exclusive
Render = Callable[[list[dict], bool], str]  # (messages, add_generation_prompt) -> text
MAX_DERIVED_TURNS = 200  # each takes three renderings of the chat so far
_REMEDY = (
    "mark the assistant's part with {% generation %} in a --chat-template of your own, or give "
    "--instruction-part and --response-part"
)


class TurnShape(NamedTuple):
    """What the template writes around an answer, learnt from a probe chat of one turn."""

    header: str  # before it, from the end of the user's turn on
    end: str  # after it, without trailing blanks: the end of the turn


def turn_shape(render: Render, special: re.Pattern[str]) -> TurnShape:
    """Render a probe and see. special matches the tokenizer's special tokens.

    Raises UserError where the answer is not there as it was given.
    """
    ask, answer = {"role": "user", "content": "question"}, "answer"
    chat = [ask, {"role": "assistant", "content": answer}]
    before = render([ask], False)
    text = render(chat, False)
    begin = _common(before, text)
    start = text.find(answer, begin)
    if start < 0:
        raise UserError(f"the chat template does not write the assistant's words; {_REMEDY}")
    after = text[start + len(answer) :]
    try:
        longer = render([*chat, ask], False)
    except UserError:
        longer = text
    # What follows an answer whether or not more comes, up to the last whole special token.
    shared = after[: _common(after, longer[start + len(answer) :])]
    tokens = list(special.finditer(shared))
    end = shared[: tokens[-1].end()] if tokens else shared
    return TurnShape(text[begin:start], end.rstrip() or after.rstrip())


def prefix_spans(
    render: Render, messages: list[dict], shape: TurnShape, special: re.Pattern[str]
) -> tuple[str, list[Span]]:
    """(text, spans) of a chat: the assistant's turns, each with its end-of-turn token.

    A turn starts where the chat before it, rendered for generation, stops being a prefix of the
    whole, and ends where the chat up to it does; blanks behind the end of the turn are left out.
    special matches the tokenizer's special tokens. Raises UserError where the template renders the
    beginning of the chat in another way once more follows.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] in ASSISTANT]
    if len(turns) > MAX_DERIVED_TURNS:
        raise UserError(
            f"{len(turns)} assistant turns in one chat; the assistant's part of at most "
            f"{MAX_DERIVED_TURNS} is derived from the template; {_REMEDY}"
        )
    text = render(messages, False)
    spans: list[Span] = []
    for i in turns:
        start = _turn_start(render, messages, i, text, shape, special)
        end = _turn_end(render, messages, i, text, start, shape, special)
        if spans and start < spans[-1][1]:
            raise UserError(f"assistant turns overlap in the rendered chat; {_REMEDY}")
        spans.append((start, end))
    return text, spans


def _turn_start(
    render: Render,
    messages: list[dict],
    i: int,
    text: str,
    shape: TurnShape,
    special: re.Pattern[str],
) -> int:
    if i == 0:
        found = text.find(shape.header) if shape.header else -1
        if found < 0:
            raise UserError(f"the chat begins with an answer whose start is not found; {_REMEDY}")
        return found + len(shape.header)
    before, asked = render(messages[:i], False), render(messages[:i], True)
    shared = _common(before, asked)  # a template may write an EOS behind a chat that ends there
    if not text.startswith(asked[:shared]):
        raise UserError(
            f"the chat template renders what comes before message {i} in another way when it "
            f"follows, so the assistant's part is unknown; {_REMEDY}"
        )
    if asked == before:  # no generation prompt: the header is told by the probe
        return shared + (len(shape.header) if text.startswith(shape.header, shared) else 0)
    start = _common(asked, text)
    for token in special.finditer(text, shared):
        if token.start() >= start:
            break
        if start < token.end():  # the two differ inside a token
            return token.start()
    return start


def _turn_end(
    render: Render,
    messages: list[dict],
    i: int,
    text: str,
    start: int,
    shape: TurnShape,
    special: re.Pattern[str],
) -> int:
    upto = render(messages[: i + 1], False)
    if text.startswith(upto) and len(upto) > start:
        turn = text[start : len(upto)]
        end = turn.rfind(shape.end) + len(shape.end) if shape.end in turn else len(turn)
        if _in_message(turn, 0, end):
            end = len(turn)
        # Blanks, and an EOS that ends the whole chat, are no part of the turn.
        return start + (len(turn) if special.sub("", turn[end:]).strip() else end)
    # The last turn of a chat is rendered in another way: the end-of-turn token tells, unless what
    # follows may be written into the same turn.
    follows = messages[i + 1]["role"] if i + 1 < len(messages) else "user"
    known = special.search(shape.end) and follows in ("user", "system", "developer")
    found = _find(text, shape.end, start) if known else -1
    if found < 0:
        raise UserError(
            f"the chat template renders message {i} in another way when more follows, so where it "
            f"ends is unknown; {_REMEDY}"
        )
    return found + len(shape.end)


def answers(messages: list[dict]) -> list[dict]:
    """The assistant's messages."""
    return [message for message in messages if message["role"] in ASSISTANT]


def is_trained(message: dict) -> bool:
    """False for a message that says it is to be left out: `weight` 0 (OpenAI's), `train` false."""
    return message.get("weight") != 0 and message.get("train") is not False


def without_marked(spans: list[Span], messages: list[dict]) -> list[Span]:
    """The spans of those turns that are trained (`is_trained`), of the spans of all.

    Raises UserError where spans and turns are not as many, so that whose is whose is unknown.
    """
    trained = [is_trained(message) for message in answers(messages)]
    if all(trained):
        return spans
    if len(spans) != len(trained):
        raise UserError(
            f"a turn is marked with 'weight': 0 or 'train': false, but the chat template's "
            f"{{% generation %}} marks {len(spans)} stretches in {len(trained)} assistant turns; "
            "let it mark each turn once"
        )
    return [span for span, keep in zip(spans, trained, strict=True) if keep]


def marker_spans(text: str, instruction_part: str, response_part: str) -> list[Span]:
    """Characters behind each response marker, up to the next instruction marker or the end."""
    spans: list[Span] = []
    at = 0
    while (found := _find(text, response_part, at)) >= 0:
        start = found + len(response_part)
        stop = _find(text, instruction_part, start)
        stop = len(text) if stop < 0 else stop
        if stop > start:
            spans.append((start, stop))
        at = max(stop, start)
    return spans


def check_spans(find: Callable[[list[dict]], tuple[str, list[Span]]]) -> str:
    """Find the spans of a probe chat, and hold them against what is known of it.

    find: messages -> (text, spans). Returns the end of a turn as it is trained. Raises UserError
    if an answer is not trained, or a question is.
    """
    answers = ("alpha beta", "gamma delta")
    messages = [
        {"role": "user", "content": "first question"},
        {"role": "assistant", "content": answers[0]},
        {"role": "user", "content": "second question"},
        {"role": "assistant", "content": answers[1]},
    ]
    text, spans = find(messages)
    trained = [text[a:b] for a, b in spans]
    untrained = "".join(
        text[a:b]
        for a, b in zip(
            [0, *(b for _, b in spans)], [*(a for a, _ in spans), len(text)], strict=True
        )
    )
    for answer in answers:
        if not any(answer in piece for piece in trained):
            raise UserError(
                f"in a probe chat the chat template leaves the answer {answer!r} out of the "
                f"assistant's part; {_REMEDY}"
            )
    for question in ("first question", "second question"):
        if question not in untrained:
            raise UserError(
                f"in a probe chat the chat template counts {question!r} of the user as the "
                f"assistant's; {_REMEDY}"
            )
    return trained[-1].rpartition(answers[1])[2]


def _find(text: str, part: str, start: int) -> int:
    """Where the template itself writes `part`, from `start` (outside a message) on; -1: nowhere.

    A special token's string in a message is text.
    """
    found = text.find(part, start)
    while found >= 0 and _in_message(text, start, found):
        found = text.find(part, found + 1)
    return found


def _in_message(text: str, start: int, position: int) -> bool:
    """Whether a special token's string that a message holds is open at `position`."""
    return text.rfind(TEXT_OPEN, start, position) > text.rfind(TEXT_CLOSE, start, position)


def _common(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    if b.startswith(a):
        return len(a)
    low, high = 0, min(len(a), len(b))  # the prefix is at least low, and at most high, long
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low
