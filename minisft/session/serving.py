"""How other programs use a result: the Ollama Modelfile, vLLM's rules, commands to copy."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minisft.config.errors import UserError
from minisft.config.model import EMBEDDING_NAMES, LINEAR_NAMES, ModelConfig
from minisft.session.generate import stop_ids
from minisft.text.chat import render
from minisft.text.tokenizer import Tokenizer, export_tokenizer_files

# Placeholders for message contents, unlikely in any template. A template may strip them.
_SYSTEM, _USER, _ANSWER = "\u27e8system\u27e9", "\u27e8user\u27e9", "\u27e8answer\u27e9"
# vLLM 0.11: vllm/config/lora.py, vllm/lora/peft_helper.py, vllm/lora/lora_model.py.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_KNOWN_ENDS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")


def serving_files(source: str, tokenizer: Tokenizer, cfg: ModelConfig) -> dict[str, bytes]:
    """Returns name -> content of the files to serve a result: tokenizer, template, Modelfile.

    source: see `modelfile`.
    """
    return export_tokenizer_files(tokenizer) | {
        "Modelfile": modelfile(source, tokenizer, cfg).encode()
    }


def modelfile(source: str, tokenizer: Tokenizer, cfg: ModelConfig) -> str:
    """Returns the text of an Ollama Modelfile: weights, chat template in Go's syntax, stop tokens.

    source: its FROM line (and ADAPTER line); paths are relative to the file. If there is no chat
    template, or it cannot be converted, prompts are passed through and a comment says so.
    """
    lines = [source]
    template = go_template(tokenizer)
    if template is None:
        lines.append("# The chat template could not be converted: pass the whole text as prompt.")
        template = "{{ .Prompt }}"
    lines.append(f'TEMPLATE """{template}"""')
    names = sorted(tokenizer.backend.id_to_token(i) or "" for i in stop_ids(tokenizer, cfg))
    lines += [f'PARAMETER stop "{name}"' for name in names if name and '"' not in name]
    return "\n".join(lines) + "\n"


def go_template(tokenizer: Tokenizer) -> str | None:
    """Returns the chat template with .System, .Prompt and .Response for one turn, or None.

    None: no template, or one that does more than put text before and after each message. Ollama
    repeats the result for every turn and adds the beginning-of-text token itself.
    """

    def text(*messages: tuple[str, str], prompt: bool) -> str:
        assert tokenizer.chat_template is not None
        return render(
            tokenizer.chat_template,
            [{"role": role, "content": content} for role, content in messages],
            special_tokens=tokenizer.special_tokens,
            add_generation_prompt=prompt,
        ).removeprefix(tokenizer.special_tokens.get("bos_token", ""))

    if not tokenizer.chat_template:
        return None
    user, answer = ("user", _USER), ("assistant", _ANSWER)
    try:
        before, after = text(user, prompt=True).split(_USER)
        open_turn, end = text(user, answer, prompt=False).split(_ANSWER)
    except (UserError, ValueError):
        return None
    # In generation the model itself produces the space before an answer.
    if open_turn.rstrip() != (before + _USER + after).rstrip():
        return None
    head = before
    try:
        with_system = text(("system", _SYSTEM), user, prompt=True)
        opening, rest = with_system.split(_SYSTEM)
        middle, rest = rest.split(_USER)
        if rest == after:
            head = (
                f"{{{{ if .System }}}}{opening}{{{{ .System }}}}{middle}"
                f"{{{{ else }}}}{before}{{{{ end }}}}"
            )
    except (UserError, ValueError):  # a template without a system role
        opening = middle = ""
    # Go would read braces in the text as template actions; `"""` would end the TEMPLATE value.
    literal = before + after + end + opening + middle
    if "{{" in literal or '"""' in literal:
        return None
    return f"{head}{{{{ .Prompt }}}}{after}{{{{ .Response }}}}{end}"


def vllm_problems(config: dict[str, Any], keys: Iterable[str] = ()) -> list[str]:
    """Returns why vLLM would reject or miscompute an adapter, one clause each; [] if it would not.

    config: content of adapter_config.json. keys: tensor names in adapter_model.safetensors, if
    known.
    """
    found = [f"{name} is missing" for name in ("r", "lora_alpha", "target_modules")
             if config.get(name) is None]  # fmt: skip
    if found:
        return found
    if config["r"] > VLLM_RANKS[-1]:
        found.append(f"r={config['r']} is above vLLM's largest rank, {VLLM_RANKS[-1]}")
    if config.get("modules_to_save"):
        names = ", ".join(config["modules_to_save"])
        found.append(f"trained copies ({names}) are not loaded from an adapter")
    if config.get("use_dora"):
        found.append("DoRA is not supported")
    if config.get("bias", "none") != "none":
        found.append(f"bias={config['bias']!r} is not supported")
    for name in ("rank_pattern", "alpha_pattern"):
        if config.get(name):
            found.append(f"{name} is ignored: all modules would get the same scaling")
    if config.get("trainable_token_indices"):
        found.append("trained token rows are not supported")
    targets = config["target_modules"]
    if isinstance(targets, list):
        known = {*LINEAR_NAMES, *EMBEDDING_NAMES}
        unknown = [t for t in targets if t.rsplit(".", 1)[-1] not in known]
        if unknown:
            found.append(f"target {unknown[0]!r} is not a module that vLLM knows")
    unknown = [k for k in keys if not k.endswith(_KNOWN_ENDS) and ".base_layer." not in k]
    # Tensors with other names usually follow from a setting that is reported already.
    if unknown and not found:
        found.append(f"tensor {unknown[0]!r} is not a LoRA weight that vLLM knows")
    return found


def vllm_rank(r: int) -> int:
    """Returns the smallest --max-lora-rank that accepts an adapter of rank r."""
    return min((rank for rank in VLLM_RANKS if rank >= r), default=VLLM_RANKS[-1])


def commands(
    out: Path, base: str, adapter: dict[str, Any] | None, four_bit: str | None = None
) -> list[str]:
    """Returns lines to print after training: how to try, serve and merge the result in `out`.

    adapter: content of its adapter_config.json; None if `out` is a whole model. four_bit: the
    compute dtype of a run that quantised its base itself, so that other programs must do so too.
    """
    here = shlex.quote(str(out))
    if adapter is None:
        load = _python("transformers", "AutoModelForCausalLM", repr(str(out)))
        return [
            f"try it:       python scripts/generate.py --model {here} --prompt '...'",
            f"transformers: {load}",
            f"vLLM:         vllm serve {here}",
        ]
    arguments, quantized = repr(str(out)), ""
    if four_bit:
        arguments += (
            ", quantization_config=BitsAndBytesConfig(load_in_4bit=True, "
            "bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True, "
            f"bnb_4bit_compute_dtype={four_bit!r})"
        )
        quantized = "--quantization bitsandbytes "  # quantises on loading: NF4, double quantisation
    load = _python("peft", "AutoPeftModelForCausalLM", arguments)
    problems = vllm_problems(adapter)
    serve = (
        f"vllm serve {shlex.quote(base)} {quantized}--enable-lora "
        f"--max-lora-rank {vllm_rank(adapter['r'])} "
        f"--lora-modules {shlex.quote(f'{out.name}={out}')}"
    )
    merged = shlex.quote(f"{out}-merged")
    if problems:
        serve = f"merge first, then vllm serve {merged} ({'; '.join(problems)})"
    return [
        f"try it:       python scripts/generate.py --adapter {here} --prompt '...'",
        f"chat:         python scripts/generate.py --adapter {here} --interactive",
        f"transformers: {load}",
        f"vLLM:         {serve}",
        f"merge:        python scripts/merge.py --adapter {here} --output-dir {merged}",
    ]


def _python(package: str, kind: str, arguments: str) -> str:
    """Returns a shell command that loads a model; `arguments` in Python syntax."""
    also = "from transformers import BitsAndBytesConfig; " if "BitsAndBytes" in arguments else ""
    load = f"from {package} import {kind}; {also}model = {kind}.from_pretrained({arguments})"
    # Double quotes keep the single-quoted Python strings readable; these characters rule them out.
    code = shlex.quote(load) if set(load) & set('"$`\\!') else f'"{load}"'
    return f"python -c {code}"
