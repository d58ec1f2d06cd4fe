"""Ask a model, with or without an adapter:

python scripts/generate.py --model BASE --adapter outputs --prompt "What is the capital of Peru?"
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minisft.adapter import base_in_4bit, load_adapter, read_adapter_config
from minisft.chat import render
from minisft.cli import parse_flags, run_main
from minisft.config import UserError
from minisft.demo import demo_model
from minisft.generate import Sampling, generate, stop_ids
from minisft.llama import Compute
from minisft.model import resolve_device, resolve_dtype
from minisft.tokenizer import decode, encode, encode_chat, load_tokenizer, mark_special_text
from minisft.weights import (
    four_bit_names,
    load_model_config,
    open_checkpoint,
    place,
    resolve_model,
    stream_weights,
)


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt; with a chat template, the prompt is a user's message."""

    model: str = ""
    """Base model: a directory or a hub id; left out, the adapter's own base, else the demo."""
    adapter: str = ""
    """A PEFT adapter directory, such as a run's output directory."""
    prompt: tuple[str, ...] = ()
    """One or more prompts."""
    system: str = ""
    """A system message before the prompt."""
    chat: bool = True
    """Render the prompt with the chat template, where there is one."""
    max_new_tokens: int = 256
    """Stop after this many tokens."""
    temperature: float = 0.0
    """0 is greedy; above, the next token is sampled."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that make up this share."""
    seed: int = 0
    """Seed of sampling."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: str = "auto"
    """auto, bfloat16, float16 or float32."""
    load_in_4bit: str = "auto"
    """true, false, or auto: a base in 4 bits (NF4) for an adapter that was trained on one, and for
    a checkpoint that is stored so."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags, load, answer each prompt on stdout, and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv

    def run() -> None:
        config = parse_flags(GenerateConfig, argv, prog="generate.py", default=GenerateConfig())
        for text in answers(config):
            print(text, flush=True)

    return run_main(run, {})


def answers(config: GenerateConfig) -> list[str]:
    """The continuation of each prompt, special tokens removed."""
    if not config.prompt:
        raise UserError("--prompt is missing: give the text to continue")
    if config.temperature < 0 or not 0 < config.top_p <= 1 or config.max_new_tokens < 1:
        raise UserError(
            "expected --temperature 0 or more, --top-p in (0, 1], --max-new-tokens 1 or more"
        )
    base = config.model
    if not base and config.adapter:
        base = str(read_adapter_config(config.adapter).get("base_model_name_or_path") or "")
    if config.load_in_4bit not in ("auto", "true", "false"):
        raise UserError(f"--load-in-4bit is {config.load_in_4bit!r}; expected auto, true or false")
    directory = resolve_model(base or demo_model(), config.revision)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    checkpoint = open_checkpoint(directory, load_model_config(directory))
    cfg = checkpoint.cfg
    trainable, scaling, tokenizer_from = {}, 1.0, directory
    in_4bit = bool(checkpoint.four_bit)
    if config.adapter:
        lora, tensors = load_adapter(config.adapter, cfg)
        trainable = {n: t.to(device) for n, t in tensors.items()}
        scaling = lora.scaling
        in_4bit = in_4bit or bool(base_in_4bit(config.adapter))
        if (Path(config.adapter) / "tokenizer.json").exists():
            tokenizer_from = Path(config.adapter)
    tokenizer = load_tokenizer(tokenizer_from)
    if config.load_in_4bit != "auto":
        in_4bit = config.load_in_4bit == "true"
    four_bit = four_bit_names(checkpoint, in_4bit)
    frozen = {
        name: place(name, weight, device, dtype, name in four_bit)
        for name, weight in stream_weights(checkpoint)
        if name not in trainable
    }
    prompts = [prompt_ids(tokenizer, config, text) for text in config.prompt]
    new = generate(
        trainable,
        frozen,
        prompts,
        Compute(cfg, dtype, lora_scaling=scaling),
        max_new_tokens=config.max_new_tokens,
        stop_ids=stop_ids(tokenizer, cfg),
        sampling=Sampling(config.temperature, config.top_p, config.seed),
        device=torch.device(device),
    )
    return [decode(tokenizer, ids, skip_special_tokens=True).strip() for ids in new]


def prompt_ids(tokenizer, config: GenerateConfig, text: str) -> list[int]:
    """The prompt's tokens, through the same template code as training (special tokens spelled out
    in the prompt stay text)."""
    if not (config.chat and tokenizer.chat_template):
        ids = encode(tokenizer, text, add_special_tokens=True)
    else:
        messages = [{"role": "system", "content": config.system}] if config.system else []
        messages.append({"role": "user", "content": text})
        rendered = render(
            tokenizer.chat_template,
            mark_special_text(tokenizer, messages),
            special_tokens=tokenizer.special_tokens,
            add_generation_prompt=True,
        )
        ids = encode_chat(tokenizer, rendered)
    if not ids:
        raise UserError("--prompt is empty; give at least one token of text")
    return ids


if __name__ == "__main__":
    sys.exit(main())
