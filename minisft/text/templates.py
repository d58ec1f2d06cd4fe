"""Chat templates for bases that ship none, by name; the assistant's turns are marked in each.

Where a template writes special tokens, the tokenizer must have them. `alpaca` and `plain` write
none but the tokenizer's own BOS and EOS, so they fit every base.
"""

from __future__ import annotations

from minisft.config.errors import UserError

_CHECKS = (
    "{%- if tools %}{{ raise_exception('this template writes no tools') }}{% endif %}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('this template has no role ' + message['role']) }}{% endif %}"
    "{%- if message['content'] is not string %}"
    "{{- raise_exception('this template takes content that is one string') }}{% endif %}"
    "{%- endfor %}"
)
_CHATML = (
    _CHECKS + "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{% endif %}"
    "{{- '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3 = (
    _CHECKS + "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_ALPACA = (
    _CHECKS + "{{- bos_token }}"
    "{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}"
    "{%- else %}{{- 'Below is an instruction that describes a task. Write a response that '"
    " + 'appropriately completes the request.' }}{% endif %}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}{{- '\n\n### Response:\n' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{%- elif message['role'] == 'user' %}"
    "{{- '\n\n### Instruction:\n' + message['content'] }}"
    "{%- elif not loop.first %}"
    "{{- raise_exception('this template takes a system message at the start only') }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '\n\n### Response:\n' }}{% endif %}"
)
_PLAIN = (
    _CHECKS + "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if not loop.first %}{{- '\n' }}{% endif %}"
    "{%- if message['role'] == 'assistant' %}{{- 'Assistant:' }}"
    "{% generation %}{{ ' ' + message['content'] | trim + eos_token }}{% endgeneration %}"
    "{%- elif message['role'] == 'user' %}{{- 'User: ' + message['content'] | trim }}"
    "{%- else %}{{- message['content'] | trim + '\n' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '\nAssistant:' }}{% endif %}"
)
# name -> (template, tokens that it writes by their string)
BUILT_IN: dict[str, tuple[str, tuple[str, ...]]] = {
    "chatml": (_CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama-3": (_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "alpaca": (_ALPACA, ()),
    "plain": (_PLAIN, ()),
}


def built_in_template(name: str, special: set[str]) -> str:
    """The template of that name; special: the special-token strings that the tokenizer has.

    Raises UserError where the template writes a token that the tokenizer lacks: it would become
    several tokens of text, and the end of a turn none that stops generation.
    """
    template, writes = BUILT_IN[name]
    if missing := [token for token in writes if token not in special]:
        raise UserError(
            f"--chat-template {name} writes {', '.join(missing)}, which this tokenizer does not "
            "have as special tokens; use alpaca or plain, which end a turn with its own EOS"
        )
    return template
