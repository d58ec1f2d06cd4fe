"""Text to token ids: a tokenizer directory read without transformers, with the same ids.

`tokenizer.json` is the ground truth; tokenizer_config.json adds named special tokens, tokens that
the file lacks, chat templates, and, for the Llama-2 kind, another pre-tokenizer (`pipeline`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Encoding, pre_tokenizers

from minisft.config.errors import UserError
from minisft.files.disk import load_json_object
from minisft.text.templates import BUILT_IN, built_in_template

SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Around a special-token string that came from a message: plane-16 private use, never assigned.
TEXT_OPEN, TEXT_CLOSE = "\U0010fdd0", "\U0010fdd1"
PART_CHARS = 2_000_000  # encoded together
_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_TEMPLATE, _TEMPLATE_DIR = "chat_template.jinja", "additional_chat_templates"


@dataclass(frozen=True, eq=False, repr=False)
class Tokenizer:
    """A `tokenizers` pipeline with the names, templates and files that belong to it."""

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]  # "bos_token" -> "<s>"; only those defined
    chat_templates: dict[str, str]  # "default", "tool_use", ...
    files: dict[str, bytes]  # relative name -> content, as found

    @property
    def bos_token_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The pad token's id, else the eos token's: padding is masked by length, not by id."""
        pad = self._id("pad_token")
        return self.eos_token_id if pad is None else pad

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; the embedding needs at least as many rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.get("default")

    def template_for(self, tools: list | None) -> str:
        """The template that a chat with these tools renders through; UserError if there is none."""
        if tools is not None and "tool_use" in self.chat_templates:
            return self.chat_templates["tool_use"]
        if self.chat_template is None:
            raise UserError(
                f"the tokenizer has no default chat template (has: {sorted(self.chat_templates)}); "
                f"chat rows need one: give --chat-template {' or '.join(BUILT_IN)} or a file, put "
                f"{_TEMPLATE} beside tokenizer.json, or use text columns"
            )
        return self.chat_template

    @cached_property
    def special_text(self) -> re.Pattern[str]:
        """Matches any special token as it stands in text, with the blanks that it absorbs."""
        special = [t for t in self.backend.get_added_tokens_decoder().values() if t.special]
        special.sort(key=lambda t: len(t.content), reverse=True)  # a token before those inside it
        return re.compile(
            "|".join(
                (r"\s*" if t.lstrip else "") + re.escape(t.content) + (r"\s*" if t.rstrip else "")
                for t in special
            )
            or "(?!)"
        )

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens."""
        decoder = self.backend.get_added_tokens_decoder()
        return frozenset(i for i, token in decoder.items() if token.special)

    def _id(self, name: str) -> int | None:
        content = self.special_tokens.get(name)
        return None if content is None else self.backend.token_to_id(content)


# --------------------------------------------------------------------------------------- loading


def tokenizer_of(adapter: Path, base: Path) -> Path:
    """Where an adapter's tokenizer lies: beside it, beside its checkpoints, or with the base.

    It may hold another chat template than the base's.
    """
    run = [adapter.parent] if adapter.name.startswith("checkpoint-") else []
    return next((p for p in (adapter, *run) if (p / "tokenizer.json").exists()), base)


def load_tokenizer(directory: Path, *, pipeline: str = "hf5", chat_template: str = "") -> Tokenizer:
    """Read tokenizer.json and the small files beside it.

    chat_template: a template file, or the name of one in minisft/text/templates.py, in place of the
    directory's own templates.
    pipeline "hf5" gives the ids of transformers v5 (a Llama-2 style file loses its own normalizer
    and pre-tokenizer there); "raw" gives what tokenizer.json alone says.
    Raises UserError for a missing or malformed file, or an added token whose id does not fit.
    """
    directory = Path(directory)
    if pipeline not in ("hf5", "raw"):
        raise UserError(f"tokenizer pipeline is {pipeline!r}; expected 'hf5' or 'raw'")
    files = _read_files(directory)
    if "tokenizer.json" not in files:
        remedy = "is this a model directory? A tokenizer.model alone must be converted first"
        raise UserError(f"{directory}: no tokenizer.json; expected a fast tokenizer ({remedy})")
    try:
        backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    except Exception as e:  # the Rust side raises a bare Exception
        reason = " ".join(str(e).split())
        raise UserError(
            f"{directory / 'tokenizer.json'}: cannot be read ({reason}); copy or download it again"
        ) from None
    backend.no_truncation()
    backend.no_padding()
    config = load_json_object(directory / _CONFIG) if _CONFIG in files else {}
    if _MAP in files and "added_tokens_decoder" not in config:
        config = config | load_json_object(directory / _MAP)
    special_tokens = {n: _content(config[n]) for n in SPECIAL_NAMES if config.get(n)}
    if pipeline == "hf5" and _is_llama2_style(config, files["tokenizer.json"]):
        backend.normalizer = None  # type: ignore[assignment]
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement="▁", prepend_scheme=_prepend_scheme(config), split=False
        )
        defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        special_tokens = {n: c for n, c in defaults.items() if n not in config} | special_tokens
    _add_tokens(backend, config, special_tokens, directory / _CONFIG)
    templates = _templates(files, config, directory)
    if chat_template:
        special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
        templates = {"default": _chosen_template(chat_template, special)}
    return Tokenizer(backend, special_tokens, templates, files)


def _chosen_template(name: str, special: set[str]) -> str:
    """--chat-template: a file, or a built-in one; special: the special tokens there are."""
    if name in BUILT_IN:
        return built_in_template(name, special)
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"--chat-template {name}: no such file; expected a Jinja file, or one of "
            f"{', '.join(BUILT_IN)}"
        )
    try:
        return _decode_utf8(path.read_bytes(), path)
    except OSError as e:
        raise UserError(f"--chat-template {name}: cannot be read ({e.strerror})") from None


def _read_files(directory: Path) -> dict[str, bytes]:
    names = ["tokenizer.json", _CONFIG, _MAP, _TEMPLATE, "chat_template.json"]
    names += [
        f"{_TEMPLATE_DIR}/{p.name}" for p in sorted(directory.glob(f"{_TEMPLATE_DIR}/*.jinja"))
    ]
    try:
        return {n: (directory / n).read_bytes() for n in names if (directory / n).is_file()}
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be read ({e.strerror})") from None


def _content(token: Any) -> str:
    """A special token is stored as its string or as an AddedToken object."""
    return token["content"] if isinstance(token, dict) else str(token)


def _is_llama2_style(config: dict, tokenizer_json: bytes) -> bool:
    declared = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    return declared == "LlamaTokenizer" and b'"ByteLevel"' not in tokenizer_json


def _prepend_scheme(config: dict) -> str:
    if config.get("add_prefix_space") is False:
        return "never"
    return "always" if config.get("legacy") else "first"


def _add_tokens(
    backend: tokenizers.Tokenizer, config: dict, special_tokens: dict[str, str], source: Path
) -> None:
    """Append what the config declares and tokenizer.json lacks: by id, then the named ones."""
    present = backend.get_added_tokens_decoder()
    declared = {int(i): t for i, t in (config.get("added_tokens_decoder") or {}).items()}
    for index, token in sorted(declared.items()):
        fields = {k: v for k, v in token.items() if not k.startswith("__")}
        added = AddedToken(**fields)
        if index in present and repr(present[index]) == repr(added):
            continue
        backend.add_tokens([added])
        if (actual := backend.token_to_id(added.content)) != index:
            raise UserError(
                f"{source}: added_tokens_decoder puts {added.content!r} at id {index}, but "
                f"tokenizer.json makes it {actual}; the two files belong to different tokenizers"
            )
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    known = {t.content for t in backend.get_added_tokens_decoder().values()}
    for content in [*special_tokens.values(), *map(_content, extra)]:
        if content not in known:
            backend.add_tokens([AddedToken(content, special=True)])
            known.add(content)


def _templates(files: dict[str, bytes], config: dict, directory: Path) -> dict[str, str]:
    """Template files win over the config key, which is a string or a list of {name, template}."""
    found = {}
    for name in files:
        if name.endswith(".jinja"):
            key = "default" if name == _TEMPLATE else Path(name).stem
            found[key] = _decode_utf8(files[name], directory / name)
    stored = config.get("chat_template")
    if not found and stored is None and "chat_template.json" in files:
        stored = load_json_object(directory / "chat_template.json").get("chat_template")
    if found or stored is None:
        return found
    if isinstance(stored, str):
        return {"default": stored}
    if isinstance(stored, dict):
        return dict(stored)
    return {entry["name"]: entry["template"] for entry in stored}


def _decode_utf8(data: bytes, path: Path) -> str:
    try:
        # Like a file opened as text: the line ends of a template are "\n" whatever is stored.
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 at byte {e.start}") from None


def export_tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files to write beside an adapter or a merged model: relative name -> content.

    AutoTokenizer.from_pretrained reads them alone, without a config.json. Chat templates become
    chat_template.jinja and additional_chat_templates/NAME.jinja, and leave tokenizer_config.json.
    """
    kept = ("tokenizer.json", _CONFIG, _MAP)
    out = {name: data for name, data in tokenizer.files.items() if name in kept}
    config = json.loads(out.get(_CONFIG, b"{}"))
    for name, content in tokenizer.special_tokens.items():
        config.setdefault(name, content)
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    config.pop("chat_template", None)
    config.pop("auto_map", None)  # names Python files that do not travel along
    out[_CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    for name, text in tokenizer.chat_templates.items():
        path = _TEMPLATE if name == "default" else f"{_TEMPLATE_DIR}/{name}.jinja"
        out[path] = text.encode("utf-8")
    return out


# -------------------------------------------------------------------------------------- encoding


def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of one string. add_special_tokens inserts what the file's post-processor says."""
    return tokenizer.backend.encode(text, add_special_tokens=add_special_tokens).ids


def encode_batch(
    tokenizer: Tokenizer, texts: list[str], *, add_special_tokens: bool
) -> list[list[int]]:
    """Token ids of many strings, on all cores, in order; no padding and no truncation."""
    ids: list[list[int]] = []
    for part in _parts(texts):
        batch = tokenizer.backend.encode_batch_fast(part, add_special_tokens=add_special_tokens)
        ids += [encoding.ids for encoding in batch]
    return ids


def _parts(texts: list[str]) -> Iterator[list[str]]:
    """Consecutive strings of at most PART_CHARS together (or one longer): an encoding takes about
    100 bytes a character while it is made."""
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


def decode(tokenizer: Tokenizer, ids: list[int], *, skip_special_tokens: bool) -> str:
    """The text of token ids; special tokens appear as their strings unless skipped."""
    return tokenizer.backend.decode(ids, skip_special_tokens=skip_special_tokens)


# A user may write "<|eot_id|>" in a message. The template must not turn that into a control token:
# such strings are wrapped before rendering, and the stretch of text that holds one is encoded with
# special tokens switched off. A chat without any takes the plain path, with the same ids.


def mark_special_text(tokenizer: Tokenizer, value: Any) -> Any:
    """Wrap special-token strings inside the strings of a JSON value with TEXT_OPEN, TEXT_CLOSE.

    Dict keys are left alone; the value is copied only where something is wrapped. Raises UserError
    if a string already holds one of the two private-use characters.
    """
    if isinstance(value, str):
        if TEXT_OPEN in value or TEXT_CLOSE in value:
            raise UserError(
                "a message holds U+10FDD0 or U+10FDD1; these private-use characters are reserved, "
                "remove them from the row"
            )
        return tokenizer.special_text.sub(rf"{TEXT_OPEN}\g<0>{TEXT_CLOSE}", value)
    if isinstance(value, dict):
        return {k: mark_special_text(tokenizer, v) for k, v in value.items()}
    if isinstance(value, list):
        return [mark_special_text(tokenizer, v) for v in value]
    return value


def encode_chat(tokenizer: Tokenizer, rendered: str) -> list[int]:
    """Token ids of a rendered chat; no BOS is inserted, the template writes its own.

    Text between TEXT_OPEN and TEXT_CLOSE never becomes a special token.
    """
    if TEXT_OPEN not in rendered and TEXT_CLOSE not in rendered:
        return encode(tokenizer, rendered, add_special_tokens=False)
    return [i for piece in _encode_pieces(tokenizer, rendered) for i in piece.ids]


def encode_chat_spans(
    tokenizer: Tokenizer, rendered: str, spans: list[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """(ids, mask) of a rendered chat: mask is 1 on the tokens that the character spans cover.

    spans index `rendered`. A span whose start falls on no token ends the marking; one whose end
    falls on none marks to the end of the row.
    """
    return _mask_pieces(_encode_pieces(tokenizer, rendered), rendered, spans)


def encode_spans(
    tokenizer: Tokenizer,
    texts: list[tuple[str, list[tuple[int, int]]]],
    *,
    add_special_tokens: bool,
) -> list[tuple[list[int], list[int]]]:
    """`encode_chat_spans` of many (text, spans), on all cores and in order.

    add_special_tokens: the texts are no chats, and get what the file's post-processor inserts.
    """
    plain = [t for t, _ in texts if add_special_tokens or TEXT_OPEN not in t]
    batch = (
        encoding
        for part in _parts(plain)
        for encoding in tokenizer.backend.encode_batch(part, add_special_tokens=add_special_tokens)
    )
    out = []
    for text, spans in texts:
        if not add_special_tokens and TEXT_OPEN in text:
            out.append(encode_chat_spans(tokenizer, text, spans))
        else:
            out.append(_mask_pieces([_Piece(0, len(text), next(batch), 0)], text, spans))
    return out


def _mask_pieces(
    pieces: list[_Piece], rendered: str, spans: list[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    ids = [i for piece in pieces for i in piece.ids]
    mask = [0] * len(ids)
    for start, end in spans:
        first = _token_at(pieces, _unmarked(rendered, start))
        last = _token_at(pieces, _unmarked(rendered, end) - 1)
        if first is None:
            break
        stop = last + 1 if last else len(ids)
        mask[first:stop] = [1] * (stop - first)
    return ids, mask


class _Piece(NamedTuple):
    """Part of a chat that is encoded in one go; `skip` anchor tokens lead it and are dropped."""

    start: int  # its first character in the unmarked chat
    stop: int
    encoding: Encoding
    skip: int

    @property
    def ids(self) -> list[int]:
        return self.encoding.ids[self.skip :]


def _encode_pieces(tokenizer: Tokenizer, rendered: str) -> list[_Piece]:
    backend, pieces, start = tokenizer.backend, [], 0
    for text, as_text in _split_marked(tokenizer, rendered):
        # "first" puts a word boundary at the start of what is encoded; a piece from the middle of
        # the chat has none, so it is encoded behind a newline whose tokens are then dropped.
        anchored = start > 0 and getattr(backend.pre_tokenizer, "prepend_scheme", "") == "first"
        lead = "\n" if anchored and as_text else ""
        backend.encode_special_tokens = as_text
        try:
            skip = len(backend.encode(lead, add_special_tokens=False).ids) if lead else 0
            encoding = backend.encode(lead + text, add_special_tokens=False)
        finally:
            backend.encode_special_tokens = False
        pieces.append(_Piece(start, start + len(text), encoding, skip))
        start += len(text)
    return pieces


def _split_marked(tokenizer: Tokenizer, rendered: str) -> list[tuple[str, bool]]:
    """[(text, as_text)]: a stretch between real special tokens that holds a marker is as_text."""
    if TEXT_OPEN not in rendered and TEXT_CLOSE not in rendered:
        return [(rendered, False)]
    marked = re.compile(
        f"(?P<text>{TEXT_OPEN}.*?{TEXT_CLOSE})|(?P<special>{tokenizer.special_text.pattern})",
        flags=re.DOTALL,
    )
    stretches: list[tuple[str, bool]] = []
    begin = 0  # of the stretch that is open
    for match in [*marked.finditer(rendered), None]:
        if match is not None and match["special"] is None:
            continue
        stretch = rendered[begin : match.start() if match else len(rendered)]
        # A template that slices a message may leave one marker alone: still text.
        as_text = TEXT_OPEN in stretch or TEXT_CLOSE in stretch
        stretches.append((stretch.replace(TEXT_OPEN, "").replace(TEXT_CLOSE, ""), as_text))
        if match is not None:
            stretches.append((match["special"], False))
            begin = match.end()
    joined: list[tuple[str, bool]] = []
    for text, as_text in stretches:
        if joined and not as_text and not joined[-1][1]:
            joined[-1] = (joined[-1][0] + text, False)
        elif text:
            joined.append((text, as_text))
    return joined


def _unmarked(rendered: str, position: int) -> int:
    before = rendered[:position]
    return position - before.count(TEXT_OPEN) - before.count(TEXT_CLOSE)


def _token_at(pieces: list[_Piece], char: int) -> int | None:
    """Index among all tokens of the one that covers this character, or None."""
    offset = 0
    for piece in pieces:
        if piece.start <= char < piece.stop:
            token = piece.encoding.char_to_token(char - piece.start + (1 if piece.skip else 0))
            return None if token is None else offset + token - piece.skip
        offset += len(piece.encoding.ids) - piece.skip
    return None
