"""How others take a result: vLLM's rules for adapters, and the commands that use one."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minisft.config.model import EMBEDDING_NAMES, LINEAR_NAMES

# vLLM 0.11: vllm/config/lora.py, vllm/lora/peft_helper.py, vllm/lora/lora_model.py.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_KNOWN_ENDS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")


def vllm_problems(config: dict[str, Any], keys: Iterable[str] = ()) -> list[str]:
    """Why vLLM would refuse an adapter or compute something else with it, a clause each.

    config: adapter_config.json. keys: the names in adapter_model.safetensors, where there are any.
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
            found.append(f"{name} is ignored: every module would be scaled alike")
    if config.get("trainable_token_indices"):
        found.append("trained token rows are not supported")
    targets = config["target_modules"]
    if isinstance(targets, list):
        known = {*LINEAR_NAMES, *EMBEDDING_NAMES}
        strange = [t for t in targets if t.rsplit(".", 1)[-1] not in known]
        if strange:
            found.append(f"target {strange[0]!r} is no module that vLLM knows")
    strange = [k for k in keys if not k.endswith(_KNOWN_ENDS) and ".base_layer." not in k]
    if strange and not found:
        found.append(f"tensor {strange[0]!r} is no LoRA weight that vLLM knows")
    return found


def vllm_rank(r: int) -> int:
    """The smallest --max-lora-rank that takes an adapter of that rank."""
    return min((rank for rank in VLLM_RANKS if rank >= r), default=VLLM_RANKS[-1])


def commands(
    out: Path, base: str, adapter: dict[str, Any] | None, four_bit: str | None = None
) -> list[str]:
    """Lines to print after training: how to try, serve and merge what lies in `out`.

    adapter: its adapter_config.json, None where `out` is a whole model. four_bit: the compute dtype
    of a run that quantised its base itself, so that others must do the same.
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
        quantized = "--quantization bitsandbytes "  # as it loads: NF4, double quantisation
    load = _python("peft", "AutoPeftModelForCausalLM", arguments)
    problems = vllm_problems(adapter)
    serve = (
        f"vllm serve {shlex.quote(base)} {quantized}--enable-lora "
        f"--max-lora-rank {vllm_rank(adapter['r'])} "
        f"--lora-modules {shlex.quote(f'{out.name}={out}')}"
    )
    merged = shlex.quote(f"{out}-merged")
    merge = f"python scripts/merge.py --adapter {here} --output-dir {merged}"
    if problems:
        serve = f"merge first, then vllm serve {merged} ({'; '.join(problems)})"
    return [
        f"try it:       python scripts/generate.py --adapter {here} --prompt '...'",
        f"chat:         python scripts/generate.py --adapter {here} --interactive",
        f"transformers: {load}",
        f"vLLM:         {serve}",
        f"merge:        {merge}",
    ]


def _python(package: str, kind: str, arguments: str) -> str:
    """A shell command that loads a model; `arguments` as Python spells them."""
    also = "from transformers import BitsAndBytesConfig; " if "BitsAndBytes" in arguments else ""
    load = f"from {package} import {kind}; {also}model = {kind}.from_pretrained({arguments})"
    code = shlex.quote(load) if set(load) & set('"$`\\!') else f'"{load}"'
    return f"python -c {code}"
