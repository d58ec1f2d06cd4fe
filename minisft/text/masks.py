"""Find the character spans of a rendered chat that are trained: the assistant's turns.

There are three ways: the template's `{% generation %}` blocks (`chat.assistant_spans`); for a
template without these blocks, rendering prefixes of the chat (`prefix_spans`); or the text from a
response marker to the next instruction marker (`marker_spans`).
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from minisft.config.errors import UserError
from minisft.text.encoding import TEXT_CLOSE, TEXT_OPEN, Span

ASSISTANT = ("assistant", "model")
Chat = list[dict]
Render = Callable[[Chat, bool], str]  # (messages, add_generation_prompt) -> text
Special = re.Pattern[str]  # matches the tokenizer's special tokens
MAX_DERIVED_TURNS = 200  # each one needs three renderings of the chat so far
_REMEDY = (
    "mark the assistant's part with {% generation %} in a --chat-template of your own, or use "
    "--instruction-part and --response-part"
)


class TurnShape(NamedTuple):
    """The strings that a template writes around an answer, inferred from a probe chat."""

    header: str  # between the end of the user's turn and the answer
    end: str  # the end-of-turn token or text after the answer, without trailing whitespace


def turn_shape(render: Render, special: Special) -> TurnShape:
    """Infer what the template writes around an answer by rendering a probe chat.

    Raises UserError if the template does not write the answer unchanged.
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
    # A template may write an EOS at the end of the chat (Phi-3), which is not part of the turn. So
    # use only text that is also written before a next message, up to its last special token.
    shared = after[: _common(after, longer[start + len(answer) :])]
    tokens = list(special.finditer(shared))
    end = shared[: tokens[-1].end()] if tokens else shared
    return TurnShape(text[begin:start], end.rstrip() or after.rstrip())


def prefix_spans(
    render: Render, messages: Chat, shape: TurnShape, special: Special
) -> tuple[str, list[Span]]:
    """Render a chat and return (text, spans of the assistant's turns with end-of-turn tokens).

    A turn starts where the full text first differs from the preceding messages rendered with the
    generation prompt. It ends where the rendering of the messages up to and including it ends,
    without whitespace after the end-of-turn token.
    Raises UserError if a turn has no clear span because its text depends on later messages.
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
    render: Render, chat: Chat, i: int, text: str, shape: TurnShape, special: Special
) -> int:
    """Return the position of the first character of answer chat[i] in the full chat's text."""
    if i == 0:
        found = text.find(shape.header) if shape.header else -1
        if found < 0:
            raise UserError(f"the chat begins with an answer whose start is not found; {_REMEDY}")
        return found + len(shape.header)
    before, asked = render(chat[:i], False), render(chat[:i], True)
    # Use the common prefix, not all of `before`, which may end with an EOS that `asked` lacks.
    shared = _common(before, asked)
    if not text.startswith(asked[:shared]):
        raise UserError(
            f"the chat template renders the messages before message {i} differently when it "
            f"follows, so the assistant's part is unknown; {_REMEDY}"
        )
    # The template has no generation prompt, so use the header that the probe chat showed.
    if asked == before:
        return shared + (len(shape.header) if text.startswith(shape.header, shared) else 0)
    start = _common(asked, text)
    for token in special.finditer(text, shared):
        if token.start() >= start:
            break
        # `asked` and `text` differ inside this token, so the turn starts with the token.
        if start < token.end():
            return token.start()
    return start


def _turn_end(
    render: Render, chat: Chat, i: int, text: str, start: int, shape: TurnShape, special: Special
) -> int:
    """Return the end of answer chat[i], which starts at `start`, in the full chat's text."""
    upto = render(chat[: i + 1], False)
    if text.startswith(upto) and len(upto) > start:
        turn = text[start : len(upto)]
        end = turn.rfind(shape.end) + len(shape.end) if shape.end in turn else len(turn)
        if _in_message(turn, 0, end):
            end = len(turn)
        # Exclude whitespace after the turn, and an EOS that the template writes after the chat.
        return start + (len(turn) if special.sub("", turn[end:]).strip() else end)
    # The template renders the last turn of a chat differently, so search for the next end-of-turn
    # token, unless the next message (a tool's, for example) may be written into the same turn.
    follows = chat[i + 1]["role"] if i + 1 < len(chat) else "user"
    known = special.search(shape.end) and follows in ("user", "system", "developer")
    found = _find(text, shape.end, start) if known else -1
    if found < 0:
        raise UserError(
            f"the chat template renders message {i} differently when more follows, so where it "
            f"ends is unknown; {_REMEDY}"
        )
    return found + len(shape.end)


def answers(messages: Chat) -> Chat:
    """Return the messages of a chat that the assistant wrote."""
    return [message for message in messages if message["role"] in ASSISTANT]


def is_trained(message: dict) -> bool:
    """Return False if a message has `weight` 0 (OpenAI's format) or `train` false, else True."""
    return message.get("weight") != 0 and message.get("train") is not False


def without_marked(spans: list[Span], messages: Chat) -> list[Span]:
    """Drop the spans of answers that opt out of training (`is_trained`). spans: one per answer.

    Raises UserError if an answer opts out and the counts of spans and answers differ.
    """
    trained = [is_trained(message) for message in answers(messages)]
    if all(trained):
        return spans
    if len(spans) != len(trained):
        raise UserError(
            f"a turn is marked with 'weight': 0 or 'train': false, but the chat template's "
            f"{{% generation %}} marks {len(spans)} spans in {len(trained)} assistant turns; "
            "mark each turn once in the template"
        )
    return [span for span, keep in zip(spans, trained, strict=True) if keep]


def marker_spans(text: str, instruction_part: str, response_part: str) -> list[Span]:
    """Return the spans of text from each response marker to the next instruction marker or end."""
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


def check_spans(find: Callable[[Chat], tuple[str, list[Span]]]) -> str:
    """Check on a probe chat that the answers are trained and the questions are not.

    find: messages -> (text, spans). Returns the trained text after the last answer (the end of
    turn). Raises UserError if an answer is not trained or a question is.
    """
    questions, replies = ("first question", "second question"), ("alpha beta", "gamma delta")
    messages = []
    for question, reply in zip(questions, replies, strict=True):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": reply})
    text, spans = find(messages)
    trained = [text[a:b] for a, b in spans]
    gaps = zip([0, *(b for _, b in spans)], [*(a for a, _ in spans), len(text)], strict=True)
    untrained = "".join(text[a:b] for a, b in gaps)
    for reply in replies:
        if not any(reply in piece for piece in trained):
            raise UserError(
                f"in a probe chat the chat template leaves the answer {reply!r} out of the "
                f"assistant's part; {_REMEDY}"
            )
    for question in questions:
        if question not in untrained:
            raise UserError(
                f"in a probe chat the chat template counts {question!r} of the user as the "
                f"assistant's; {_REMEDY}"
            )
    return trained[-1].rpartition(replies[1])[2]


def _find(text: str, part: str, start: int) -> int:
    """Return the first position >= start of `part` outside marked message text, or -1."""
    found = text.find(part, start)
    while found >= 0 and _in_message(text, start, found):
        found = text.find(part, found + 1)
    return found


def _in_message(text: str, start: int, position: int) -> bool:
    """Return whether a position is inside a message's marked text (TEXT_OPEN to TEXT_CLOSE)."""
    return text.rfind(TEXT_OPEN, start, position) > text.rfind(TEXT_CLOSE, start, position)


def _common(a: str, b: str) -> int:
    """Return the length of the longest common prefix of two strings, by binary search."""
    if b.startswith(a):
        return len(a)
    low, high = 0, min(len(a), len(b))  # low <= length <= high
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low
