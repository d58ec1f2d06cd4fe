"""Encode text and rendered chats to token ids, map character spans to tokens, and decode.

A user may write "<|eot_id|>" in a message, and this must not become a control token. So
`mark_special_text` wraps such strings before rendering. The text around a wrapped string, up to
the nearest real special tokens, is encoded with special tokens switched off. A chat without such
strings is encoded in one call.
"""

import itertools
import re
from collections.abc import Iterator
from operator import itemgetter
from typing import Any, NamedTuple

from tokenizers import Encoding

from minisft.config.errors import UserError
from minisft.text.tokenizer import Tokenizer

Span = tuple[int, int]  # (start, end) in characters of a text, end exclusive
# Private-use marks around a special token's string in a message; Unicode never assigns them.
TEXT_OPEN, TEXT_CLOSE = "\U0010fdd0", "\U0010fdd1"
PART_CHARS = 2_000_000  # encoded in one call, which takes about 100 bytes per character


def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Return a string's token ids. add_special_tokens: add what tokenizer.json asks for (a BOS)."""
    return tokenizer.backend.encode(text, add_special_tokens=add_special_tokens).ids


def decode(tokenizer: Tokenizer, ids: list[int], *, skip_special_tokens: bool) -> str:
    """Decode token ids to text; special tokens appear as their strings unless skipped."""
    return tokenizer.backend.decode(ids, skip_special_tokens=skip_special_tokens)


def _parts(texts: list[str]) -> Iterator[list[str]]:
    """Split texts into lists of at most PART_CHARS characters; a longer text is a list alone."""
    part: list[str] = []
    room = PART_CHARS
    for text in texts:
        if part and len(text) > room:
            yield part
            part, room = [], PART_CHARS
        part.append(text)
        room -= len(text)
    if part:
        yield part


def mark_special_text(tokenizer: Tokenizer, value: Any) -> Any:
    """Wrap each special token in the strings of a JSON value in TEXT_OPEN and TEXT_CLOSE.

    Dict keys are not searched. Raises UserError if a string contains one of the two characters.
    """
    if isinstance(value, str):
        if TEXT_OPEN in value or TEXT_CLOSE in value:
            raise UserError(
                "a message contains U+10FDD0 or U+10FDD1; these private-use characters are "
                "reserved, remove them from the row"
            )
        return tokenizer.special_text.sub(rf"{TEXT_OPEN}\g<0>{TEXT_CLOSE}", value)
    if isinstance(value, dict):
        return {k: mark_special_text(tokenizer, v) for k, v in value.items()}
    if isinstance(value, list):
        return [mark_special_text(tokenizer, v) for v in value]
    return value


def encode_chat(tokenizer: Tokenizer, rendered: str) -> list[int]:
    """Return the token ids of a rendered chat. No BOS is added, because templates write it.

    Text between TEXT_OPEN and TEXT_CLOSE never becomes a special token.
    """
    return encode_batch(tokenizer, [(rendered, None)], add_special_tokens=False)[0][0]


def encode_batch(
    tokenizer: Tokenizer, texts: list[tuple[str, list[Span] | None]], *, add_special_tokens: bool
) -> list[tuple[list[int], list[int] | None]]:
    """Encode texts on all cores: (text, spans) -> (ids, mask), in order, without truncation.

    mask is 1 on tokens inside the spans; it is None if spans is None. As in transformers, a span
    whose start has no token is ignored with all later spans; a span whose end has no token extends
    to the end of the text. add_special_tokens: run the post-processor; False for rendered chats.
    """
    # encode_batch_fast does not track character offsets, which only spans need.
    fast = all(spans is None for _, spans in texts)
    encode = tokenizer.backend.encode_batch_fast if fast else tokenizer.backend.encode_batch
    plain = [t for t, _ in texts if add_special_tokens or TEXT_OPEN not in t]
    batch = (
        encoding
        for part in _parts(plain)
        for encoding in encode(part, add_special_tokens=add_special_tokens)
    )
    out = []
    for text, spans in texts:
        if not add_special_tokens and TEXT_OPEN in text:
            pieces = _encode_pieces(tokenizer, text)
        else:
            pieces = [_Piece(0, len(text), next(batch), 0)]
        ids = [i for piece in pieces for i in piece.encoding.ids[piece.skip :]]
        out.append((ids, None if spans is None else _mask(pieces, text, spans, len(ids))))
    return out


class _Piece(NamedTuple):
    """A piece of a chat that is encoded in one call."""

    start: int  # its first character in the chat without TEXT_OPEN and TEXT_CLOSE
    stop: int
    encoding: Encoding
    skip: int  # tokens at the start of `encoding` that are not part of the chat


def _encode_pieces(tokenizer: Tokenizer, rendered: str) -> list[_Piece]:
    backend, pieces, start = tokenizer.backend, [], 0
    for text, as_text in _split_marked(tokenizer, rendered):
        # With prepend_scheme "first", the backend would add a word boundary to a piece from the
        # middle of the chat. A newline before the piece prevents this; its tokens are skipped.
        anchored = start > 0 and getattr(backend.pre_tokenizer, "prepend_scheme", "") == "first"
        lead = "\n" if anchored and as_text else ""
        backend.encode_special_tokens = as_text  # True: encode their strings as ordinary text
        try:
            skip = len(backend.encode(lead, add_special_tokens=False).ids) if lead else 0
            encoding = backend.encode(lead + text, add_special_tokens=False)
        finally:
            backend.encode_special_tokens = False
        pieces.append(_Piece(start, start + len(text), encoding, skip))
        start += len(text)
    return pieces


def _split_marked(tokenizer: Tokenizer, rendered: str) -> list[tuple[str, bool]]:
    """Split a rendered chat at its real special tokens: [(text without marks, as_text)].

    as_text: the text contained a mark. Adjacent pieces with equal as_text are joined.
    """
    marked = re.compile(
        f"(?P<text>{TEXT_OPEN}.*?{TEXT_CLOSE})|(?P<special>{tokenizer.special_text.pattern})",
        flags=re.DOTALL,
    )
    pieces: list[tuple[str, bool]] = []
    begin = 0  # of the text since the last real special token
    for match in [*marked.finditer(rendered), None]:
        if match is not None and match["special"] is None:
            continue
        text = rendered[begin : match.start() if match else len(rendered)]
        # A template that slices a message may leave only one mark of a pair; one mark is enough.
        as_text = TEXT_OPEN in text or TEXT_CLOSE in text
        pieces.append((text.replace(TEXT_OPEN, "").replace(TEXT_CLOSE, ""), as_text))
        if match is not None:
            pieces.append((match["special"], False))
            begin = match.end()
    groups = itertools.groupby(filter(itemgetter(0), pieces), key=itemgetter(1))
    return [("".join(text for text, _ in group), as_text) for as_text, group in groups]


def _mask(pieces: list[_Piece], text: str, spans: list[Span], length: int) -> list[int]:
    """Return the 0/1 mask of a text's `length` tokens: 1 inside the spans (see `encode_batch`)."""
    mask = [0] * length
    for start, end in spans:
        first = _token_at(pieces, _unmarked(text, start))
        last = _token_at(pieces, _unmarked(text, end) - 1)
        if first is None:
            break
        # As transformers does: a span that ends at token 0 extends to the end of the text.
        stop = last + 1 if last else length
        mask[first:stop] = [1] * (stop - first)
    return mask


def _unmarked(text: str, position: int) -> int:
    """Convert a position in the marked text to the matching position in the same text with
    TEXT_OPEN and TEXT_CLOSE removed."""
    before = text[:position]
    return position - before.count(TEXT_OPEN) - before.count(TEXT_CLOSE)


def _token_at(pieces: list[_Piece], char: int) -> int | None:
    """Return the index in the chat of the token that covers character `char`, or None."""
    offset = 0
    for piece in pieces:
        if piece.start <= char < piece.stop:
            # A skipped newline shifts the characters of the encoding by one.
            token = piece.encoding.char_to_token(char - piece.start + (1 if piece.skip else 0))
            return None if token is None else offset + token - piece.skip
        offset += len(piece.encoding.ids) - piece.skip
    return None
