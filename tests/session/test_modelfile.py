"""The Modelfile: its template renders what the chat template does, its stops end a turn."""

import re

import pytest
from runs import write_model

from minisft.files.weights import load_model_config
from minisft.session.serving import go_template, serving_files
from minisft.text.chat import render
from minisft.text.tokenizer import load_tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% set ms = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set ms = messages %}{% endif %}"
    "{% for m in ms %}{% if m.role == 'user' %}[INST] {{ s + m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<t>{{ m.role }}\n{{ m.content }}</t>\n{% endfor %}"
    "{% if add_generation_prompt %}<t>assistant\n{% endif %}"
)
BACKWARDS = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
BRACES = "{% for m in messages %}{{ '{{' }}{{ m.content }}{% endfor %}"


def tokenizer_with(tmp_path, template):
    directory = write_model(tmp_path / "model")
    (directory / "chat_template.jinja").write_text(template)
    return load_tokenizer(directory), load_model_config(directory)


def go(template, system, prompt, response):
    """Go's text/template, as far as such a Modelfile uses it."""
    conditional = r"\{\{ if \.System \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}"
    text = re.sub(conditional, lambda m: m[1] if system else m[2], template, flags=re.S)
    values = {"System": system, "Prompt": prompt, "Response": response}
    return re.sub(r"\{\{ \.(\w+) \}\}", lambda m: values[m[1]], text)


@pytest.mark.parametrize("template", [LLAMA3, LLAMA2, NO_SYSTEM])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_it_renders_what_the_chat_template_does(tmp_path, template, system):
    tokenizer, _ = tokenizer_with(tmp_path, template)
    messages = [{"role": "system", "content": system}] if system else []
    if system and template == NO_SYSTEM:
        return
    messages.append({"role": "user", "content": "Who?"})
    messages.append({"role": "assistant", "content": "Me."})
    want = render(template, messages, special_tokens=tokenizer.special_tokens)
    bos = tokenizer.special_tokens["bos_token"]
    got = go(go_template(tokenizer), system, "Who?", "Me.")
    if template == LLAMA2:  # the space that it puts before an answer only
        want = want.replace("[/INST] Me.", "[/INST]Me.")
    assert got == want.removeprefix(bos)


@pytest.mark.parametrize("template", [BACKWARDS, BRACES])
def test_a_template_that_cannot_be_carried_over_is_said(tmp_path, template):
    tokenizer, cfg = tokenizer_with(tmp_path, template)
    assert go_template(tokenizer) is None
    text = serving_files("FROM .", tokenizer, cfg)["Modelfile"].decode()
    assert "# The chat template could not be converted" in text
    assert 'TEMPLATE """{{ .Prompt }}"""' in text


def test_stops_are_the_tokens_that_end_a_turn(tmp_path):
    tokenizer, cfg = tokenizer_with(tmp_path, LLAMA2)
    lines = serving_files("FROM .", tokenizer, cfg)["Modelfile"].decode().splitlines()
    assert lines[0] == "FROM ."
    eos = tokenizer.special_tokens["eos_token"]
    assert f'PARAMETER stop "{eos}"' in lines
