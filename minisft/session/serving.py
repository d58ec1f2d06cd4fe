"""Serving a result in other programs: Ollama's Modelfile, vLLM's limits, commands to copy."""

import shlex
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from minisft.config.errors import UserError
from minisft.config.model import EMBEDDING_NAMES, LINEAR_NAMES, ModelConfig
from minisft.session.generate import stop_ids
from minisft.text.chat import render
from minisft.text.tokenizer import Tokenizer, export_tokenizer_files

# Message contents for probing chat templates: unlikely in a template, unchanged by strip().
_CONTENTS = {role: f"\u27e8{role}\u27e9" for role in ("system", "user", "assistant")}
# Limits from vLLM 0.11: vllm/config/lora.py, vllm/lora/peft_helper.py, vllm/lora/lora_model.py.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_KNOWN_ENDS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")


def serving_files(source: str, tokenizer: Tokenizer, cfg: ModelConfig) -> dict[str, bytes]:
    """Returns name -> content of the files to serve a result: tokenizer, template, Modelfile.

    source: the FROM line of Ollama's Modelfile (and its ADAPTER line); paths are relative to that
    file. If no chat template can be converted, the Modelfile passes prompts through unchanged.
    """
    lines, template = [source], go_template(tokenizer)
    if template is None:
        lines.append("# The chat template could not be converted: pass the whole text as prompt.")
        template = "{{ .Prompt }}"
    lines.append(f'TEMPLATE """{template}"""')
    names = sorted(tokenizer.backend.id_to_token(i) or "" for i in stop_ids(tokenizer, cfg))
    lines += [f'PARAMETER stop "{name}"' for name in names if name and '"' not in name]
    return export_tokenizer_files(tokenizer) | {"Modelfile": "\n".join([*lines, ""]).encode()}


def go_template(tokenizer: Tokenizer) -> str | None:
    """Convert the chat template of one turn to Go's syntax, with .System, .Prompt and .Response.

    Returns None without a template, or if it does more than put text around each message. Ollama
    applies the result to every turn and adds the beginning-of-text token itself.
    """
    template, special = tokenizer.chat_template, tokenizer.special_tokens
    if not template:
        return None

    def text(*roles: str, prompt: bool) -> str:
        messages = [{"role": role, "content": _CONTENTS[role]} for role in roles]
        chat = render(template, messages, special_tokens=special, add_generation_prompt=prompt)
        return chat.removeprefix(special.get("bos_token", ""))

    try:
        before, after = text("user", prompt=True).split(_CONTENTS["user"])
        turn = text("user", "assistant", prompt=False)
        open_turn, end = turn.split(_CONTENTS["assistant"])
    except (UserError, ValueError):
        return None
    # Ignore trailing spaces: in generation, the model produces the space before an answer.
    if open_turn.rstrip() != (before + _CONTENTS["user"] + after).rstrip():
        return None
    head, literal = before, before + after + end
    with suppress(UserError, ValueError):  # a template without a system role
        opening, rest = text("system", "user", prompt=True).split(_CONTENTS["system"])
        middle, rest = rest.split(_CONTENTS["user"])
        literal += opening + middle
        if rest == after:
            system = "{{ if .System }}" + opening + "{{ .System }}" + middle
            head = system + "{{ else }}" + before + "{{ end }}"
    # Go would parse `{{` in the text as a template action; `"""` would end the TEMPLATE value.
    if "{{" in literal or '"""' in literal:
        return None
    return head + "{{ .Prompt }}" + after + "{{ .Response }}" + end


def vllm_problems(config: dict[str, Any], keys: Iterable[str] = ()) -> list[str]:
    """Returns the reasons why vLLM would reject or miscompute an adapter; [] if there are none.

    config: parsed adapter_config.json. keys: tensor names in adapter_model.safetensors, if known.
    """
    missing = [name for name in ("r", "lora_alpha", "target_modules") if config.get(name) is None]
    if missing:
        return [f"{name} is missing" for name in missing]
    r, bias, copies = config["r"], config.get("bias", "none"), config.get("modules_to_save")
    same_scaling = "is ignored: all modules would get the same scaling"
    rules = (
        (r > VLLM_RANKS[-1], f"r={r} is above vLLM's largest rank, {VLLM_RANKS[-1]}"),
        (copies, f"trained copies ({', '.join(copies or ())}) are not loaded from an adapter"),
        (config.get("use_dora"), "DoRA is not supported"),
        (bias != "none", f"bias={bias!r} is not supported"),
        (config.get("rank_pattern"), f"rank_pattern {same_scaling}"),
        (config.get("alpha_pattern"), f"alpha_pattern {same_scaling}"),
        (config.get("trainable_token_indices"), "trained token rows are not supported"),
    )
    found = [problem for broken, problem in rules if broken]
    targets = config["target_modules"]
    if isinstance(targets, list):
        known = {*LINEAR_NAMES, *EMBEDDING_NAMES}
        unknown = [t for t in targets if t.rsplit(".", 1)[-1] not in known]
        if unknown:
            found.append(f"target {unknown[0]!r} is not a module that vLLM knows")
    unknown = [k for k in keys if not k.endswith(_KNOWN_ENDS) and ".base_layer." not in k]
    # Unknown tensors usually result from a setting reported above, so do not report them twice.
    if unknown and not found:
        found.append(f"tensor {unknown[0]!r} is not a LoRA weight that vLLM knows")
    return found


def commands(
    out: Path, base: str, adapter: dict[str, Any] | None, four_bit: str | None = None
) -> list[str]:
    """Returns lines to print after training: how to try, serve and merge the result in `out`.

    adapter: parsed adapter_config.json; None if `out` holds a full model. four_bit: compute dtype,
    if training quantised a 16-bit base to 4 bits, which other programs must then do too.
    """
    here, merged = shlex.quote(str(out)), shlex.quote(f"{out}-merged")
    package, kind = "peft", "AutoPeftModelForCausalLM"
    if adapter is None:
        package, kind = "transformers", "AutoModelForCausalLM"
    imports, arguments, quantized = f"from {package} import {kind}", repr(str(out)), ""
    if four_bit:
        imports += "; from transformers import BitsAndBytesConfig"
        arguments += (
            ", quantization_config=BitsAndBytesConfig(load_in_4bit=True, "
            "bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True, "
            f"bnb_4bit_compute_dtype={four_bit!r})"
        )
        quantized = "--quantization bitsandbytes "  # quantises on loading: NF4, double quantisation
    code = f"{imports}; model = {kind}.from_pretrained({arguments})"
    # Double quotes leave single-quoted Python strings readable, but the shell expands these.
    code = shlex.quote(code) if set(code) & set('"$`\\!') else f'"{code}"'
    if adapter is None:
        return [
            f"try it:       python scripts/generate.py --model {here} --prompt '...'",
            f"transformers: python -c {code}",
            f"vLLM:         vllm serve {here}",
        ]
    if problems := vllm_problems(adapter):
        serve = f"merge first, then vllm serve {merged} ({'; '.join(problems)})"
    else:
        rank = next(rank for rank in VLLM_RANKS if rank >= adapter["r"])
        modules = shlex.quote(f"{out.name}={out}")
        serve = (
            f"vllm serve {shlex.quote(base)} {quantized}--enable-lora "
            f"--max-lora-rank {rank} --lora-modules {modules}"
        )
    return [
        f"try it:       python scripts/generate.py --adapter {here} --prompt '...'",
        f"chat:         python scripts/generate.py --adapter {here} --interactive",
        f"transformers: python -c {code}",
        f"vLLM:         {serve}",
        f"merge:        python scripts/merge.py --adapter {here} --output-dir {merged}",
    ]
