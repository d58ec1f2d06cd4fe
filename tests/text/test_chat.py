"""Chat templates: transformers' text and masks, inside a sandbox that ends."""

from __future__ import annotations

import copy
import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import TEMPLATE, write_byte_level

from minisft.config.errors import UserError
from minisft.text.chat import assistant_spans, has_generation_block, render
from minisft.text.encoding import encode_batch
from minisft.text.sandbox import MAX_CHARS
from minisft.text.tokenizer import load_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eot|>", "pad_token": "<|pad|>"}
USER = [{"role": "user", "content": "hi"}]
CALL = {"type": "function", "id": "call12345", "function": {"name": "f", "arguments": {"a": "é"}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": "What <it> does",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "string", "description": "q"}},
                "required": ["a"],
            },
        },
    }
]
CHATS: dict[str, list[dict[str, Any]]] = {
    "turns": [
        {"role": "system", "content": "Be <brief> & 'kind'."},
        {"role": "user", "content": " What? é 你好 \n"},
        {"role": "assistant", "content": "  That.  "},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Nothing."},
    ],
    "reasoning": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning": "because"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "b", "thinking": "hm"},
    ],
    "tools": [
        {"role": "user", "content": "use f"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "f", "tool_call_id": "call12345", "content": "42"},
        {"role": "assistant", "content": "It is 42.", "name": None},
    ],
    "unicode": [
        {"role": "system", "content": "שלום \u202e é́ \u2028 \x00"},
        {"role": "user", "content": "🧑‍🧑‍🧒 你好\r\n\ttab  "},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\n🙂 {{ not }} {% a tag %}"},
    ],
    "none keys": [
        {"role": "user", "content": "q", "name": None, "tool_calls": None, "thinking": None},
        {"role": "assistant", "content": "a", "tool_calls": None, "reasoning_content": None},
    ],
    "roles repeat": [
        {"role": "user", "content": "q"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": ""},
    ],
    "assistant first": [
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "q"},
    ],
    "two calls": [
        {"role": "developer", "content": "short"},
        {"role": "user", "content": "use f twice"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "must",
            "tool_calls": [CALL, CALL],
        },
        {"role": "tool", "name": "f", "tool_call_id": "call12345", "content": '{"é": 1}'},
        {"role": "tool", "name": "f", "tool_call_id": "call12345", "content": "2"},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "Welcome.", "reasoning_content": "polite"},
    ],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "look"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "seen"}]},
    ],
}


def _shipped_templates() -> list[Path]:
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        return []
    return sorted(Path(found.origin).parent.glob("chat_templates/*.jinja"))


TEMPLATES = _shipped_templates()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def reference(directory: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(directory)


@pytest.mark.skipif(not TEMPLATES, reason="trl is not installed")
@pytest.mark.parametrize("name", CHATS)
def test_render_equals_transformers(name: str, reference: Any) -> None:
    compared = 0
    for path in TEMPLATES:
        template = path.read_text()
        for tools in (None, TOOLS):
            for generate in (False, True):
                arguments = {"tools": tools, "add_generation_prompt": generate}
                try:
                    expected = reference.apply_chat_template(
                        CHATS[name], chat_template=template, tokenize=False, **arguments
                    )
                except Exception:  # of many types; ours must refuse the chat too
                    with pytest.raises(UserError):
                        render(template, CHATS[name], special_tokens=SPECIAL, **arguments)
                    continue
                actual = render(template, CHATS[name], special_tokens=SPECIAL, **arguments)
                assert actual == expected, path.name
                compared += 1
    refusing = ("roles repeat", "assistant first", "two calls")  # to many templates
    assert compared > (1 if name in refusing else 2) * len(TEMPLATES)


@pytest.mark.skipif(not TEMPLATES, reason="trl is not installed")
@pytest.mark.parametrize("name", CHATS)
def test_masks_equal_transformers(name: str, reference: Any, directory: Path) -> None:
    tokenizer, compared = load_tokenizer(directory), 0
    for path in TEMPLATES:
        template = path.read_text()
        if not has_generation_block(template):
            continue
        for tools in (None, TOOLS):
            try:
                expected = reference.apply_chat_template(
                    CHATS[name],
                    tools=tools,
                    chat_template=template,
                    return_dict=True,
                    return_assistant_tokens_mask=True,
                )
            except Exception:  # of many types; ours must refuse the chat too
                with pytest.raises(UserError):
                    assistant_spans(template, CHATS[name], special_tokens=SPECIAL, tools=tools)
                continue
            given = {"special_tokens": SPECIAL, "tools": tools}
            text, spans = assistant_spans(template, CHATS[name], **given)
            assert text == render(template, CHATS[name], **given)
            ((ids, mask),) = encode_batch(tokenizer, [(text, spans)], add_special_tokens=False)
            assert ids == expected["input_ids"], path.name
            assert mask == expected["assistant_masks"], path.name
            compared += 0 < sum(mask) < len(mask)
    assert compared > 20


def test_spans_are_the_assistant_texts() -> None:
    text, spans = assistant_spans(TEMPLATE, CHATS["turns"], special_tokens=SPECIAL)
    assert [text[a:b] for a, b in spans] == ["That.<|eot|>", "Nothing.<|eot|>"]


def test_spans_need_a_generation_block() -> None:
    with pytest.raises(UserError, match="generation"):
        assistant_spans("{{ messages }}", USER, special_tokens={})


def test_spans_cannot_be_forged_by_a_message() -> None:
    with pytest.raises(UserError, match=r"U\+10FDD2"):
        assistant_spans(
            TEMPLATE, [{"role": "user", "content": "\U0010fdd2"}], special_tokens=SPECIAL
        )


def test_names_assigned_inside_a_generation_block_stay_inside() -> None:
    template = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    assert render(template, USER, special_tokens={}) == "21"
    assert assistant_spans(template, USER, special_tokens={}) == ("21", [(0, 1)])


def test_variables_win_over_special_tokens_and_inputs_stay(reference: Any) -> None:
    template = "{{ bos_token }}{{ flag }}{{ documents }}{{ messages[0] | tojson(indent=1) }}"
    messages = [{"role": "user", "content": "<é>", "name": None, "extra": {"a": [1, None]}}]
    before = copy.deepcopy(messages)
    arguments = {"documents": [{"title": "t", "text": "x"}]}
    expected = reference.apply_chat_template(
        messages, chat_template=template, tokenize=False, bos_token="B", flag=True, **arguments
    )
    actual = render(
        template,
        messages,
        special_tokens=SPECIAL,
        variables={"bos_token": "B", "flag": True},
        **arguments,
    )
    assert actual == expected and actual.startswith("BTrue[{'title'") and "<é>" in actual
    assert messages == before


def test_only_defined_special_tokens_are_visible() -> None:
    template = "{{ unk_token is defined }} {{ pad_token }}"
    assert render(template, USER, special_tokens=SPECIAL) == "False <|pad|>"


def test_rich_objects_become_inert_text() -> None:
    messages = [{"role": "user", "content": "x", "image": Path("/etc/passwd")}]
    template = "{{ messages[0].image }}{{ messages[0].image.read_text is defined }}"
    assert render(template, messages, special_tokens={}) == "<PosixPath>False"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{% if %}", "line 1"),
        ("{{ messages[0].content.missing.deeper }}", "missing"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_template_errors_are_one_line_user_errors(template: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        render(template, USER, special_tokens={})
    assert "\n" not in str(caught.value)


def test_empty_conversation_is_refused() -> None:
    with pytest.raises(UserError, match="conversation is empty"):
        render(TEMPLATE, [], special_tokens=SPECIAL)


HOSTILE = {
    "class walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ ''|attr('__class__') }}{{ (''|attr('__class__')).mro() }}",
    "format walk": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "function globals": "{{ raise_exception.__globals__['json'].codecs }}",
    "environment": "{{ namespace.__init__.__globals__ }}",
    "mutation": "{{ messages.append(1) }}",
    "mutation of a message": "{{ messages[0].update({'content': 'x'}) }}",
    "underscore namespace": "{% set ns = namespace(_x=1) %}",
    "underscore assignment": "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as o %}",
    "range": "{% for i in range(1000000000) %}x{% endfor %}",
    "repetition": "{{ 'a' * 100000000 }}",
    "list repetition": "{{ ([0] * 100000000) | length }}",
    "power": "{{ 10 ** 100000000 }}",
    "padding": "{{ 'a'.ljust(10000000000000) }}",
    "percent": "{{ '%10000000000000d' % 1 }}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "block doubling": "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "macro doubling": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}"
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = m(ns.x) %}{% endfor %}",
    "adding": "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "nested loops": "{% set r = range(90000) %}"
    "{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "center": "{{ 'a' | center(10000000000) }}",
    "indent": "{{ 'a\nb' | indent(10000000000) }}",
    "indent of many lines": "{{ ('a\n' * 100000) | indent(100000) }}",
    "indent by text": "{{ ('a\n' * 1000000) | indent('x' * 1000000) }}",
    "replace": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "replace method": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "join": "{{ ['a'] * 1000000 | join('b' * 1000000) }}",
    "join of many": "{{ (['a'] * 1000000) | join('b' * 1000000) }}",
    "join method": "{{ ('b' * 1000000).join(['a'] * 1000000) }}",
    "format filter": "{{ '%10000000000d' | format(1) }}",
    "format method": "{{ '{:>10000000000}'.format(1) }}",
    "nested format": "{{ '{:>{}}'.format(1, 9999999) }}{{ '{:{}}'.format(1, 10000000000) }}",
    "tabs": "{{ ('\t' * 1000000).expandtabs(1000000) }}",
    "json indent": "{{ messages | tojson(indent=1000000000) }}",
    "power of powers": "{% set x = 10 ** 900 %}{% set y = x ** 900 %}{{ (y ** 900) % 7 }}",
    "squares": "{% set ns = namespace(x=10) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}"
    "{% endfor %}{{ ns.x % 7 }}",
    "slow steps": "{% set x = 'a' * 9000000 %}{% for i in range(90000) %}{% if 'ab' in x %}y"
    "{% endif %}{% endfor %}",
    "long output": "{% for i in range(90000) %}" + "x" * 1000 + "{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_refused_in_bounded_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "slow steps":
        monkeypatch.setattr("minisft.text.sandbox.MAX_SECONDS", 0.5)
    messages = [{"role": "user", "content": "hi"}]
    started = time.perf_counter()
    try:
        text = render(HOSTILE[name], messages, special_tokens={})
    except UserError:
        pass
    else:  # jinja2 renders what is unsafe to name as nothing
        assert text == "" and name in ("class walk", "attr filter"), text[:100]
    assert time.perf_counter() - started < 20
    assert messages == [{"role": "user", "content": "hi"}]


def test_steps_count_for_one_rendering_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisft.text.sandbox.MAX_STEPS", 50)
    template = "{% for i in range(40) %}{{ i }}{% endfor %}"
    assert len({render(template, USER, special_tokens={}) for _ in range(3)}) == 1
    with pytest.raises(UserError, match="more than 50 steps"):
        render(template.replace("40", "60"), USER, special_tokens={})


def test_a_long_chat_within_the_limits_renders() -> None:
    messages = [{"role": "user", "content": "x" * 10}] * 20_000
    assert len(render(TEMPLATE, messages, special_tokens=SPECIAL)) > 20_000 * 10
    with pytest.raises(UserError, match="10,000,000 characters"):
        render("{{ messages[0].content }}x", [{"content": "y" * MAX_CHARS}], special_tokens={})
