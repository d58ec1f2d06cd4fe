"""Load and export tokenizer directories without transformers, but with the same token ids.

tokenizer.json defines the ids. tokenizer_config.json adds named special tokens, tokens missing in
tokenizer.json, chat templates and, for Llama-2 style tokenizers, a different pre-tokenizer.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, pre_tokenizers

from minisft.config.errors import UserError
from minisft.files.disk import load_json_object

SPECIAL_NAMES = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_TEMPLATE, _TEMPLATE_DIR = "chat_template.jinja", "additional_chat_templates"
# Built-in chat templates, for base models without one: name of a file in templates/ -> special
# tokens that the template writes and the tokenizer must have. `alpaca` and `plain` write only the
# tokenizer's BOS and EOS, so they work with every base model.
BUILT_IN: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "alpaca": (),
    "plain": (),
}


@dataclass(frozen=True, eq=False, repr=False)
class Tokenizer:
    """A tokenizer: the `tokenizers` pipeline, special tokens, chat templates and source files."""

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]  # "bos_token" -> "<s>"; only those that are defined
    chat_templates: dict[str, str]  # "default", "tool_use", ...
    files: dict[str, bytes]  # relative name -> content, as read

    @property
    def bos_token_id(self) -> int | None:
        """The id of the beginning-of-text token, or None."""
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id of the end-of-text token, or None."""
        return self._id("eos_token")

    @property
    def chat_template(self) -> str | None:
        """The text of the default chat template, or None."""
        return self.chat_templates.get("default")

    def template_for(self, tools: list | None) -> str:
        """Return the template for a chat with these tools; raises UserError if there is none."""
        if tools is not None and "tool_use" in self.chat_templates:
            return self.chat_templates["tool_use"]
        if self.chat_template is None:
            raise UserError(
                f"the tokenizer has no default chat template (has: {sorted(self.chat_templates)}); "
                f"chat rows need one: use --chat-template {' or '.join(BUILT_IN)} or a file, put "
                f"{_TEMPLATE} next to tokenizer.json, or use text columns"
            )
        return self.chat_template

    @cached_property
    def special_text(self) -> re.Pattern[str]:
        """A pattern that matches any special token, with the whitespace that the token absorbs."""
        special = [t for t in self.backend.get_added_tokens_decoder().values() if t.special]
        # A regular expression takes the first alternative that matches, so longer tokens go first.
        special.sort(key=lambda t: len(t.content), reverse=True)
        return re.compile(
            "|".join(
                (r"\s*" if t.lstrip else "") + re.escape(t.content) + (r"\s*" if t.rstrip else "")
                for t in special
            )
            or "(?!)"  # matches nothing
        )

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of all special tokens."""
        decoder = self.backend.get_added_tokens_decoder()
        return frozenset(i for i, token in decoder.items() if token.special)

    def _id(self, name: str) -> int | None:
        content = self.special_tokens.get(name)
        return None if content is None else self.backend.token_to_id(content)


def tokenizer_of(adapter: Path, base: Path) -> Path:
    """Return the first directory with a tokenizer.json: adapter, its run, or else the base.

    The adapter is tried first because its chat template may differ from the base's.
    """
    run = [adapter.parent] if adapter.name.startswith("checkpoint-") else []
    return next((p for p in (adapter, *run) if (p / "tokenizer.json").exists()), base)


def load_tokenizer(directory: Path | str, *, chat_template: str = "") -> Tokenizer:
    """Load a tokenizer from tokenizer.json and the small files next to it.

    chat_template: a file or a built-in template's name, which replaces the directory's templates.
    Raises UserError for a missing or malformed file, or an added token with conflicting ids.
    """
    directory = Path(directory)
    files = _read_files(directory)
    backend = _load_backend(files, directory)
    config = load_json_object(directory / _CONFIG) if _CONFIG in files else {}
    # transformers too reads special_tokens_map.json only next to the older form of the config.
    if _MAP in files and "added_tokens_decoder" not in config:
        config = config | load_json_object(directory / _MAP)
    special_tokens = {n: _content(config[n]) for n in SPECIAL_NAMES if config.get(n)}
    # For Llama-2 style tokenizers, transformers v5 ignores the normalizer and pre-tokenizer of
    # tokenizer.json, which changes the ids of, for example, text that starts with two spaces.
    if _is_llama2_style(config, files["tokenizer.json"]):
        scheme = "always" if config.get("legacy") else "first"
        scheme = "never" if config.get("add_prefix_space") is False else scheme
        backend.normalizer = None  # type: ignore[assignment]
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
        defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        special_tokens = {n: c for n, c in defaults.items() if n not in config} | special_tokens
    _add_tokens(backend, config, special_tokens, directory / _CONFIG)
    templates = _templates(files, config, directory)
    if chat_template:
        special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
        templates = {"default": _chosen_template(chat_template, special)}
    return Tokenizer(backend, special_tokens, templates, files)


def _load_backend(files: dict[str, bytes], directory: Path) -> tokenizers.Tokenizer:
    """Parse tokenizer.json, with its truncation and padding switched off."""
    if "tokenizer.json" not in files:
        remedy = "is this a model directory? A tokenizer.model alone must be converted first"
        raise UserError(f"{directory}: no tokenizer.json; expected a fast tokenizer ({remedy})")
    try:
        backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    except Exception as e:  # the Rust library raises a bare Exception
        reason = " ".join(str(e).split())
        raise UserError(
            f"{directory / 'tokenizer.json'}: cannot be read ({reason}); copy or download it again"
        ) from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _chosen_template(name: str, special: set[str]) -> str:
    """Return the text of the template that --chat-template names. special: the special tokens."""
    path = Path(name)
    if name in BUILT_IN:
        # A token that is not special would be split into text, and would not stop generation.
        if missing := [token for token in BUILT_IN[name] if token not in special]:
            raise UserError(
                f"--chat-template {name} writes {', '.join(missing)}, which this tokenizer does "
                "not have as special tokens; use alpaca or plain, which end a turn with its own EOS"
            )
        # Do not reformat the template files or add a final newline: runs save the text, and the
        # cache key of tokenised rows depends on its bytes.
        return (Path(__file__).parent / "templates" / f"{name}.jinja").read_bytes().decode()
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
    templates = sorted(directory.glob(f"{_TEMPLATE_DIR}/*.jinja"))
    names += [f"{_TEMPLATE_DIR}/{path.name}" for path in templates]
    try:
        return {n: (directory / n).read_bytes() for n in names if (directory / n).is_file()}
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be read ({e.strerror})") from None


def _content(token: Any) -> str:
    """Return the string of a special token, which is stored as a string or an AddedToken dict."""
    return token["content"] if isinstance(token, dict) else str(token)


def _is_llama2_style(config: dict, tokenizer_json: bytes) -> bool:
    """Return whether transformers v5 rebuilds this tokenizer from its vocabulary and merges.

    transformers does so for LlamaTokenizer, except for byte-level tokenizers such as Llama-3's.
    """
    declared = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    return declared == "LlamaTokenizer" and b'"ByteLevel"' not in tokenizer_json


def _add_tokens(
    backend: tokenizers.Tokenizer, config: dict, special_tokens: dict[str, str], source: Path
) -> None:
    """Add tokens that the config declares and tokenizer.json lacks: first those with an id."""
    present = backend.get_added_tokens_decoder()
    declared = {int(i): t for i, t in (config.get("added_tokens_decoder") or {}).items()}
    for index, token in sorted(declared.items()):
        fields = {k: v for k, v in token.items() if not k.startswith("__")}
        added = AddedToken(**fields)
        # Compare repr(), which shows the content and all flags; replace a token that differs.
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
    """Return the chat templates of a tokenizer directory: name -> text.

    Template files override chat_template in the config: a string or a list of {name, template}.
    """
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
        # Convert line ends to "\n", as transformers does by reading templates in text mode.
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 at byte {e.start}") from None


def export_tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the tokenizer files of an adapter or merged model: relative name -> content.

    AutoTokenizer.from_pretrained loads them without a config.json. Chat templates are written to
    chat_template.jinja and additional_chat_templates/NAME.jinja, not to tokenizer_config.json.
    """
    copied = ("tokenizer.json", _CONFIG, _MAP)
    out = {name: data for name, data in tokenizer.files.items() if name in copied}
    config = json.loads(out.get(_CONFIG, b"{}"))
    for name, content in tokenizer.special_tokens.items():
        config.setdefault(name, content)
    # Older versions of transformers cannot load a directory without a tokenizer class.
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    config.pop("chat_template", None)
    config.pop("auto_map", None)  # refers to Python files that are not exported
    out[_CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    for name, text in tokenizer.chat_templates.items():
        path = _TEMPLATE if name == "default" else f"{_TEMPLATE_DIR}/{name}.jinja"
        out[path] = text.encode("utf-8")
    return out
