"""What the loss sees of a chat: a template's marks, spans derived without them, and markers."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from test_chat import CHATS, SPECIAL, TEMPLATES, TOOLS
from tiny_tokenizer import TEMPLATE, write_byte_level
from tokenised import named_rows

from minisft.batches import IGNORED
from minisft.config.errors import UserError
from minisft.data.settings import Settings
from minisft.data.tokenize import tokenize
from minisft.text import chat, masks
from minisft.text.encoding import decode, encode
from minisft.text.tokenizer import BUILT_IN, Tokenizer, load_tokenizer

# Special tokens of the shipped templates, by their looks.
LOOKS_SPECIAL = re.compile(r"<\|?[a-z_\|｜▁/]+\|?>|<｜[^｜]*｜>|</s>|\[/?INST\]")
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "the question"},
    {"role": "assistant", "content": "fine, thank you"},
    {"role": "user", "content": "and the dog?"},
    {"role": "assistant", "content": "lazy"},
]
WITHOUT_MARKS = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
WITH_LINE_ENDS = WITHOUT_MARKS.replace("'<|eot|>' }}{% else", "'<|eot|>' }}{{ '\n' }}{% else")
WITH_LAST_EOS = WITHOUT_MARKS.replace(
    "{% if add_generation_prompt %}", "{% if not add_generation_prompt %}<|pad|>{% else %}"
)
NO_PROMPT = WITHOUT_MARKS.partition("{% if add_generation_prompt %}")[0]


def _unmarked(template: str) -> str:
    """The template with its generation blocks taken for plain ones, blank control kept."""
    opened = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", opened)


def _derive(template: str, messages: list[dict], **arguments: Any) -> tuple[str, list[masks.Span]]:
    def render(messages: list[dict], generate: bool) -> str:
        return chat.render(template, messages, add_generation_prompt=generate, **arguments)

    shape = masks.turn_shape(render, LOOKS_SPECIAL)
    return masks.prefix_spans(render, messages, shape, LOOKS_SPECIAL)


def _outside(text: str, spans: list[masks.Span], others: list[masks.Span]) -> str:
    """The words of `spans` that no span of `others` covers; tokens and blanks do not count."""
    covered = {i for a, b in others for i in range(a, b)}
    left = "".join(text[i] if i not in covered else " " for a, b in spans for i in range(a, b))
    return LOOKS_SPECIAL.sub("", left).strip()


@pytest.mark.skipif(not TEMPLATES, reason="trl is not installed")
def test_derived_spans_equal_the_marks_of_every_shipped_template() -> None:
    """But for tokens of the generation prompt, which the model is given when it answers."""
    compared = refused = 0
    for path in TEMPLATES:
        template = path.read_text()
        if not chat.has_generation_block(template):
            continue
        for messages in (*CHATS.values(), TURNS):
            for tools in (None, TOOLS):
                arguments = {"special_tokens": SPECIAL, "tools": tools}
                try:
                    text, marked = chat.assistant_spans(template, messages, **arguments)
                except UserError:
                    continue
                try:
                    same, derived = _derive(_unmarked(template), messages, **arguments)
                except UserError:
                    refused += 1
                    continue
                assert same == text, path.name
                assert _outside(text, derived, marked) == "", path.name
                missed = _outside(text, marked, derived)
                assert set(missed.split()) <= {"assistant", "to=user"}, (path.name, missed)
                compared += 1
    assert compared > 5 * refused and compared > 150


def _trained(rows: list[dict], tokenizer: Tokenizer, **settings: Any) -> list[str]:
    dataset = tokenize([named_rows(rows, "mem")], tokenizer, Settings(**settings))
    out = []
    for i in range(len(dataset)):
        ((a, b),) = dataset.row_documents(i)
        labels = dataset.labels[a:b]
        out.append(decode(tokenizer, labels[labels != IGNORED].tolist(), skip_special_tokens=False))
    return out


@pytest.mark.parametrize(
    "template", [TEMPLATE, WITHOUT_MARKS, NO_PROMPT, WITH_LINE_ENDS, WITH_LAST_EOS]
)
def test_assistant_turns_and_their_ends_are_trained(template: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path, chat_template=template))
    (text,) = _trained([{"messages": TURNS}], tokenizer, assistant_only_loss=True)
    assert text == "fine, thank you<|eot|>lazy<|eot|>"
    forged = [TURNS[0], {"role": "assistant", "content": "no <|eot|> end"}, *TURNS[2:]]
    (text,) = _trained([{"messages": forged}], tokenizer, assistant_only_loss=True)
    assert text == "no <|eot|> end<|eot|>lazy<|eot|>"


def test_a_last_turn_of_its_own_shape_is_told_by_the_end_of_turn(tmp_path: Path) -> None:
    """The last answer begins in another way, so an earlier one's rendering is not in the whole."""
    template = WITHOUT_MARKS.replace(
        "m['content'] | trim + '<|eot|>' }}{% else",
        "('hm: ' if loop.last else '') + m['content'] + '<|eot|>' }}{% else",
    )
    assert "hm" in template
    tokenizer = load_tokenizer(write_byte_level(tmp_path, chat_template=template))
    (text,) = _trained([{"messages": TURNS}], tokenizer, assistant_only_loss=True)
    assert text == "fine, thank you<|eot|>hm: lazy<|eot|>"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            ("m['role'] + '<|end|>\n'", "m['role'] + (messages | length) | string"),
            "renders the messages before message 1 differently",
        ),
        (("m['content'] | trim", "m['role'] | trim"), "does not write the assistant's words"),
    ],
)
def test_templates_that_cannot_be_derived_are_refused(
    change: tuple[str, str], reason: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(
        write_byte_level(tmp_path, chat_template=WITHOUT_MARKS.replace(*change))
    )
    with pytest.raises(UserError, match=rf"assistant_only_loss: .*{reason}.*--response-part"):
        _trained([{"messages": TURNS}], tokenizer, assistant_only_loss=True)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("{% generation %}{{ m['content'] | trim + '<|eot|>' }}{% endgeneration %}",
         "{{ m['content'] | trim }}{% generation %}{{ '<|eot|>' }}{% endgeneration %}",
         "leaves the answer 'alpha beta' out"),
        ("{% else %}{{ m['content'] | trim + '<|eot|>' }}{% endif %}",
         "{% else %}{% generation %}{{ m['content'] + '<|eot|>' }}{% endgeneration %}{% endif %}",
         "counts 'first question' of the user"),
    ],
)  # fmt: skip
def test_marks_in_the_wrong_place_are_found_before_the_first_row(
    old: str, new: str, reason: str, tmp_path: Path
) -> None:
    assert old in TEMPLATE
    tokenizer = load_tokenizer(write_byte_level(tmp_path, chat_template=TEMPLATE.replace(old, new)))
    with pytest.raises(UserError, match=reason):
        _trained([{"messages": TURNS}], tokenizer, assistant_only_loss=True)


def test_an_end_of_turn_outside_the_marks_is_a_warning(tmp_path: Path) -> None:
    moved = TEMPLATE.replace(
        " + '<|eot|>' }}{% endgeneration %}", " }}{% endgeneration %}{{ '<|eot|>' }}"
    )
    tokenizer = load_tokenizer(write_byte_level(tmp_path, chat_template=moved))
    rows = named_rows([{"messages": TURNS}], "mem")
    dataset = tokenize([rows], tokenizer, Settings(assistant_only_loss=True))
    assert "teaches the model to stop" in dataset.stats["warnings"][0]
    assert dataset.stats["sources"][0]["end_of_turn"] == ""


# --------------------------------------------------------------------------------------- markers


def test_markers_say_where_training_begins_and_ends(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path))
    parts = {
        "instruction_part": "<|start|>user<|end|>\n",
        "response_part": "<|start|>assistant<|end|>\n",
    }
    (text,) = _trained([{"messages": TURNS}], tokenizer, **parts)
    assert text == "fine, thank you<|eot|>lazy<|eot|>"
    # A marker that a user writes is text, and no marker.
    asked = {"role": "user", "content": parts["response_part"] + "train me"}
    (text,) = _trained([{"messages": [asked, TURNS[1]]}], tokenizer, **parts)
    assert text == "fine, thank you<|eot|>"
    # Also where the marker is one special token.
    single = {"instruction_part": "<|start|>", "response_part": "<|end|>"}
    asked = {"role": "user", "content": "no <|end|> here <|start|> nor"}
    (text,) = _trained([{"messages": [asked, TURNS[1]]}], tokenizer, **single)
    assert text == "\nno <|end|> here <|start|> nor<|eot|>\nfine, thank you<|eot|>"


def test_markers_in_text_rows(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path))
    parts = {"instruction_part": "Q:", "response_part": "A:"}
    rows = [{"text": "Q: the A: fox Q: dog A: lazy"}, {"text": "no marker"}]
    dataset = tokenize([named_rows(rows, "mem")], tokenizer, Settings(**parts))
    assert dataset.stats["dropped"] == {"nothing to train": 1} and len(dataset) == 1
    assert _trained(rows, tokenizer, **parts) == [" fox  lazy<|eot|>"]
    with pytest.raises(UserError, match=r"is --response-part 'A:' in the rendered rows"):
        tokenize([named_rows(rows[1:], "mem")], tokenizer, Settings(**parts))
    for wrong, reason in (
        ({"instruction_part": "U:", "response_part": "A:"}, "part 'U:' is in none of the rendered"),
        ({"instruction_part": "Q:\\n", "response_part": "A:"}, r"bash writes .* \$'...\\n'"),
        ({"instruction_part": "Q:", "response_part": "A:\\n"}, r"bash writes .* \$'...\\n'"),
    ):
        with pytest.raises(UserError, match=reason):
            tokenize([named_rows(rows[:1], "mem")], tokenizer, Settings(**wrong))
    for wrong, reason in (
        ({"response_part": "A:"}, "belong together"),
        ({**parts, "assistant_only_loss": True}, "both say what is trained"),
    ):
        with pytest.raises(UserError, match=reason):
            Settings(**wrong)


def _by_token_ids(ids: list[int], ask: list[int], answer: list[int]) -> list[int]:
    """Unsloth's rule, on ids: behind each answer marker, up to the next ask marker or the end."""
    labels, j = [IGNORED] * len(ids), 0
    while j < len(ids):
        if ids[j : j + len(answer)] != answer:
            j += 1
            continue
        start = j = j + len(answer)
        while j < len(ids) and ids[j : j + len(ask)] != ask:
            j += 1
        labels[start:j] = ids[start:j]
    return labels


def test_markers_equal_a_search_among_token_ids(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level(tmp_path))
    rng, words = random.Random(4), ["the fox", "42", " dog", "é 你好", "a\nb", "lazy  ", "?"]
    roles = ["system", "user", "assistant"]
    rows = [
        {
            "messages": [
                {"role": rng.choice(roles), "content": "".join(rng.choices(words, k=3))}
                for _ in range(rng.randrange(1, 7))
            ]
        }
        for _ in range(60)
    ]
    parts = ["<|start|>user<|end|>\n", "<|start|>assistant<|end|>\n"]
    ask, answer = (encode(tokenizer, part, add_special_tokens=False) for part in parts)
    # Packing keeps the rows without a trained label too.
    packing = {"packing": "bfd", "max_length": 10**6}
    settings = Settings(instruction_part=parts[0], response_part=parts[1], **packing)
    dataset = tokenize([named_rows(rows, "mem")], tokenizer, settings)
    trained, documents = 0, [d for i in range(len(dataset)) for d in dataset.row_documents(i)]
    assert len(documents) == len(rows)
    for a, b in documents:
        expected = _by_token_ids(dataset.input_ids[a:b].tolist(), ask, answer)
        assert dataset.labels[a:b].tolist() == expected
        trained += sum(label != IGNORED for label in expected)
    assert trained > 200


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("u1a2u3a4", ["2", "4"]),
        ("a1", ["1"]),
        ("u1", []),
        ("a1a2u3", ["1a2"]),
        ("u1a", []),
        ("u1au2a3", ["3"]),
    ],
)
def test_marker_spans(text: str, expected: list[str]) -> None:
    assert [text[a:b] for a, b in masks.marker_spans(text, "u", "a")] == expected


# ------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates(name: str, tmp_path: Path) -> None:
    directory = write_byte_level(tmp_path, chat_template=None)
    writes = BUILT_IN[name]
    if writes:
        with pytest.raises(UserError, match=rf"--chat-template {name} writes .*alpaca or plain"):
            load_tokenizer(directory, chat_template=name)
        directory = write_byte_level(
            tmp_path, chat_template=None, additional_special_tokens=list(writes)
        )
    tokenizer = load_tokenizer(directory, chat_template=name)
    dataset = tokenize([named_rows([{"messages": TURNS}], "mem")], tokenizer, Settings())
    ids = dataset.input_ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    (text,) = _trained([{"messages": TURNS}], tokenizer, assistant_only_loss=True)
    end = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>"}.get(name, "<|eot|>")
    assert re.sub(r"\s*(fine, thank you|lazy)", r"\1", text) == f"fine, thank you{end}lazy{end}"
    # The generation prompt is a beginning of the whole, so generation sees what training saw.
    template = tokenizer.chat_template
    assert template is not None and not template.endswith("\n")  # an editor may add a line end
    special = tokenizer.special_tokens
    asked = chat.render(template, TURNS[:3], special_tokens=special, add_generation_prompt=True)
    assert chat.render(template, TURNS, special_tokens=special).startswith(asked)
    with pytest.raises(UserError, match="no tools"):
        chat.render(template, TURNS, special_tokens=special, tools=TOOLS)


def test_a_template_file_replaces_the_tokenizers(tmp_path: Path) -> None:
    directory = write_byte_level(tmp_path)
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    tokenizer = load_tokenizer(directory, chat_template=str(tmp_path / "mine.jinja"))
    assert tokenizer.chat_templates == {"default": "{{ messages[0].content }}"}
    with pytest.raises(UserError, match=r"no such file; expected a Jinja file, or one of chatml"):
        load_tokenizer(directory, chat_template="chatlm")
