"""Tokenizer directories: the ids, names and templates of AutoTokenizer, without it."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import tokenizers
from tiny_tokenizer import CORPUS, SPECIALS, TEMPLATE, write_byte_level, write_llama2
from tokenised import encode_texts

from minisft.config.errors import UserError
from minisft.text import chat
from minisft.text.encoding import (
    TEXT_CLOSE,
    TEXT_OPEN,
    decode,
    encode,
    encode_batch,
    encode_chat,
    mark_special_text,
)
from minisft.text.tokenizer import export_tokenizer_files, load_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
LLAMA_16M = Path(__file__).parents[3] / "shared/models/llama-16m"


def _token(content: str, **flags: bool) -> dict:
    base = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"content": content, "special": True} | base | flags


def _named(content: str, **flags: bool) -> dict:
    return {"__type": "AddedToken"} | _token(content, **flags)


def _strings(specials: list[str], seed: int = 0) -> list[str]:
    """Random text with the hard parts: double blanks, specials in the middle, other scripts."""
    rng = random.Random(seed)
    parts = [" ", "  ", "\n", "\n\n", "the", " is", "T", "42", "é", "你", "🙂", "\0", *specials]
    return ["".join(rng.choices(parts, k=rng.randrange(0, 12))) for _ in range(1000)] + CORPUS


CASES = {
    "byte-level": lambda d: write_byte_level(d),
    "no bos": lambda d: write_byte_level(d, adds_bos=False, bos_token=None),
    "byte-level declared Llama": lambda d: write_byte_level(d, tokenizer_class="LlamaTokenizer"),
    "no class": lambda d: write_byte_level(d, tokenizer_class=None),
    "special as object": lambda d: write_byte_level(
        d, eos_token=_named("<|eot|>"), pad_token=_named("<|pad|>", lstrip=True)
    ),
    "added by id": lambda d: write_byte_level(
        d,
        added_tokens_decoder={
            "381": _token("<|b|>"),
            "380": _token("<|a|>", special=False, normalized=True),
            "1": _token("<|eot|>"),
        },
    ),
    "named but absent": lambda d: write_byte_level(d, unk_token="<|unk|>"),
    "extra tokens": lambda d: write_byte_level(d, additional_special_tokens=["<|x|>", "<|y|>"]),
    "extra tokens v5": lambda d: write_byte_level(d, extra_special_tokens=["<|x|>", "<|y|>"]),
    "changed flags": lambda d: write_byte_level(
        d, added_tokens_decoder={"3": _token("<|end|>", rstrip=True)}
    ),
    "llama-2": lambda d: write_llama2(d),
    "llama-2 legacy": lambda d: write_llama2(d, legacy=True),
    "llama-2 not legacy": lambda d: write_llama2(d, legacy=False),
    "llama-2 no prefix": lambda d: write_llama2(d, add_prefix_space=False),
    "llama-2 fast class": lambda d: write_llama2(d, tokenizer_class="LlamaTokenizerFast"),
    "llama-2 bare": lambda d: write_llama2(d, bos_token=None, eos_token=None),
    "llama-2 other class": lambda d: write_llama2(d, tokenizer_class="PreTrainedTokenizerFast"),
    "ignored flags": lambda d: write_llama2(d, add_bos_token=False, add_eos_token=True),
}


@pytest.mark.parametrize("case", CASES)
def test_ids_and_names_equal_auto_tokenizer(case: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    directory = CASES[case](tmp_path)
    expected = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer = load_tokenizer(directory)
    specials = [*tokenizer.special_tokens.values(), "<|a|>", "<|b|>", "<|x|>", "<|y|>", "<|end|>"]
    strings = _strings(specials)
    for add in (False, True):
        theirs = expected(strings, add_special_tokens=add)["input_ids"]
        assert encode_texts(tokenizer, strings, add_special_tokens=add) == theirs
    assert encode(tokenizer, strings[7], add_special_tokens=True) == expected(strings[7]).input_ids
    assert tokenizer.special_tokens == expected.special_tokens_map
    assert tokenizer.backend.get_vocab_size(with_added_tokens=True) == len(expected)
    assert tokenizer.bos_token_id == expected.bos_token_id
    assert tokenizer.eos_token_id == expected.eos_token_id
    assert tokenizer.chat_template == expected.chat_template


def test_llama2_ids_differ_from_those_of_the_file_alone(tmp_path: Path) -> None:
    """So that the comparison with AutoTokenizer above can fail."""
    directory = write_llama2(tmp_path)
    raw = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = "  two blanks"
    ids = encode(load_tokenizer(directory), text, add_special_tokens=False)
    assert raw.encode(text, add_special_tokens=False).ids != ids
    assert raw.normalizer is not None


def test_real_tokenizer_equals_auto_tokenizer() -> None:
    transformers = pytest.importorskip("transformers")
    if not LLAMA_16M.exists():
        pytest.skip(f"{LLAMA_16M} is not there")
    expected = transformers.AutoTokenizer.from_pretrained(LLAMA_16M)
    tokenizer = load_tokenizer(LLAMA_16M)
    strings = _strings(list(tokenizer.special_tokens.values()))
    theirs = expected(strings)["input_ids"]
    assert encode_texts(tokenizer, strings, add_special_tokens=True) == theirs
    assert tokenizer.eos_token_id == expected.eos_token_id
    assert decode(tokenizer, theirs[5], skip_special_tokens=True) == expected.decode(
        theirs[5], skip_special_tokens=True
    )


def test_special_tokens_map_fills_in(tmp_path: Path) -> None:
    directory = write_byte_level(tmp_path, eos_token=None, pad_token=None)
    (directory / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": _token("<|end|>"), "pad_token": "<|pad|>"})
    )
    tokenizer = load_tokenizer(directory)
    assert tokenizer.special_tokens["eos_token"] == "<|end|>"
    assert tokenizer.special_tokens["pad_token"] == "<|pad|>"


def test_an_absent_eos_is_none(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "a"))
    assert tokenizer.eos_token_id == 1
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "b", eos_token=None))
    assert tokenizer.eos_token_id is None and "eos_token" not in tokenizer.special_tokens


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    directory = write_byte_level(tmp_path)
    stored = json.loads((directory / "tokenizer.json").read_text())
    stored["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    stored["padding"] = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 4,
        "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }
    (directory / "tokenizer.json").write_text(json.dumps(stored))
    rows = encode_texts(load_tokenizer(directory), ["a", "0123456789"], add_special_tokens=False)
    assert len(rows[0]) == 1 and len(rows[1]) > 4


# ------------------------------------------------------------------------------------ templates


def _with_templates(directory: Path, form: str) -> Path:
    other = "{{ 'other' }}"
    if form == "string":
        return write_byte_level(directory)
    if form == "list":
        named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": other}]
        return write_byte_level(directory, chat_template=named)
    write_byte_level(directory, chat_template=other)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    if form == "files":
        (directory / "additional_chat_templates").mkdir()
        (directory / "additional_chat_templates/tool_use.jinja").write_text(other)
    return directory


@pytest.mark.parametrize("form", ["string", "list", "file wins", "files"])
def test_templates_are_found_in_every_form(form: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    directory = _with_templates(tmp_path, form)
    tokenizer = load_tokenizer(directory)
    expected = transformers.AutoTokenizer.from_pretrained(directory).chat_template
    if isinstance(expected, str):
        expected = {"default": expected}
    assert tokenizer.chat_templates == expected
    assert tokenizer.chat_template == TEMPLATE
    with_tools = tokenizer.template_for([{"type": "function"}])
    assert with_tools == expected.get("tool_use", TEMPLATE)
    assert tokenizer.template_for(None) == TEMPLATE


def test_legacy_template_file_is_the_last_resort(tmp_path: Path) -> None:
    directory = write_byte_level(tmp_path, chat_template=None)
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    assert load_tokenizer(directory).chat_template == TEMPLATE
    write_byte_level(tmp_path, chat_template="{{ 'config' }}")
    assert load_tokenizer(directory).chat_template == "{{ 'config' }}"


def test_no_template_is_a_user_error(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path, chat_template=None))
    assert tokenizer.chat_template is None
    with pytest.raises(UserError, match=r"chat_template\.jinja"):
        tokenizer.template_for(None)


# ----------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("case", ["byte-level", "no class", "added by id", "llama-2"])
def test_export_loads_in_transformers(case: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = load_tokenizer(CASES[case](tmp_path / "in"))
    for name, data in export_tokenizer_files(source).items():
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = load_tokenizer(tmp_path / "out")
    strings = _strings(list(source.special_tokens.values()))
    ids = encode_texts(source, strings, add_special_tokens=True)
    stored = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert stored["tokenizer_class"]  # older transformers cannot do without
    assert theirs(strings)["input_ids"] == ids
    assert encode_texts(ours, strings, add_special_tokens=True) == ids
    assert theirs.chat_template == ours.chat_template == source.chat_template
    assert theirs.eos_token == source.special_tokens["eos_token"]


def test_export_writes_named_templates_as_files(tmp_path: Path) -> None:
    files = export_tokenizer_files(load_tokenizer(_with_templates(tmp_path, "list")))
    assert files["chat_template.jinja"].decode() == TEMPLATE
    assert files["additional_chat_templates/tool_use.jinja"].decode() == "{{ 'other' }}"
    assert "chat_template" not in json.loads(files["tokenizer_config.json"])


# ----------------------------------------------------------------------------------------- errors


def test_missing_tokenizer_names_directory_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path}: no tokenizer\.json.*converted"):
        load_tokenizer(tmp_path)


def test_malformed_files_are_named(tmp_path: Path) -> None:
    directory = write_byte_level(tmp_path)
    (directory / "tokenizer_config.json").write_text('{"bos_token": \n oops}')
    with pytest.raises(UserError, match=r"tokenizer_config\.json:2: malformed JSON"):
        load_tokenizer(directory)
    (directory / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: expected a JSON object"):
        load_tokenizer(directory)
    (directory / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(directory)


def test_added_token_at_another_id_is_refused(tmp_path: Path) -> None:
    directory = write_byte_level(tmp_path, added_tokens_decoder={"777": _token("<|far|>")})
    with pytest.raises(UserError, match=r"'<\|far\|>' at id 777, but tokenizer\.json makes it 380"):
        load_tokenizer(directory)


def test_template_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    directory = write_byte_level(tmp_path)
    (directory / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"chat_template\.jinja: not UTF-8 at byte 3"):
        load_tokenizer(directory)


# -------------------------------------------------------------------- special tokens in messages


def _render(tokenizer, template: str, content: str) -> str:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "ok"}]
    marked = mark_special_text(tokenizer, messages)
    return chat.render(template, marked, special_tokens=tokenizer.special_tokens)


@pytest.mark.parametrize(
    "template", [TEMPLATE, TEMPLATE.replace("m['content'] | trim", "m['content'][2:]")]
)
def test_special_strings_in_content_stay_text(template: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path))
    content = "".join(SPECIALS) + " mid<|eot|>dle <|eot|>"
    plain = encode_chat(tokenizer, _render(tokenizer, template, "harmless"))
    ids = encode_chat(tokenizer, _render(tokenizer, template, content))
    control = [i for i in ids if i < len(SPECIALS)]
    assert control == [i for i in plain if i < len(SPECIALS)]
    text = _render(tokenizer, template, content).replace(TEXT_OPEN, "").replace(TEXT_CLOSE, "")
    assert decode(tokenizer, ids, skip_special_tokens=False) == text
    # Without the marks the same text does make control tokens: the test can fail.
    assert sum(i < len(SPECIALS) for i in encode(tokenizer, text, add_special_tokens=False)) > len(
        control
    )


@pytest.mark.parametrize("legacy", [True, False])
def test_special_strings_stay_text_behind_a_prefix_blank(legacy: bool, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_llama2(tmp_path, legacy=legacy))
    template = "{{ '<s>' }}{% for m in messages %}{{ m['content'] }}{{ '</s>' }}{% endfor %}"
    ids = encode_chat(tokenizer, _render(tokenizer, template, "the </s> is"))
    # No special string, but the same characters save one: all other tokens must agree.
    twin = encode_chat(tokenizer, _render(tokenizer, template, "the <-s> is"))
    assert ids.count(2) == twin.count(2) == 2
    assert [a == b for a, b in zip(ids, twin, strict=True)].count(False) == 1


def test_chat_without_special_strings_takes_the_plain_path(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path))
    rendered = _render(tokenizer, TEMPLATE, "nothing <|here")
    assert TEXT_OPEN not in rendered
    ids = encode_chat(tokenizer, rendered)
    assert ids == encode(tokenizer, rendered, add_special_tokens=False)
    assert ids.count(tokenizer.bos_token_id) == 1  # the template's, not one more


def test_special_tokens_are_back_after_a_chat_that_ends_in_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path))
    assert 1 not in encode_chat(tokenizer, f"the {TEXT_OPEN}<|eot|>{TEXT_CLOSE}")
    assert encode(tokenizer, "<|eot|>", add_special_tokens=False) == [1]


def test_reserved_characters_in_a_message_are_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path))
    with pytest.raises(UserError, match=r"U\+10FDD0"):
        mark_special_text(tokenizer, [{"content": f"x{TEXT_CLOSE}"}])


def test_spans_cover_the_same_tokens_with_and_without_special_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path))
    for content in ("harmless", "<|eot|> in the question", "é<|bos|>"):
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": "the answer is " + content},
        ]
        text, spans = chat.assistant_spans(
            TEMPLATE,
            mark_special_text(tokenizer, messages),
            special_tokens=tokenizer.special_tokens,
        )
        ((ids, mask),) = encode_batch(tokenizer, [(text, spans)], add_special_tokens=False)
        assert ids == encode_chat(tokenizer, text)
        trained = [i for i, m in zip(ids, mask, strict=True) if m]
        assert decode(tokenizer, trained, skip_special_tokens=False) == (
            "the answer is " + content + "<|eot|>"
        )
