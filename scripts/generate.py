"""Generate text with a model, with or without an adapter:

python scripts/generate.py --model BASE --adapter outputs --prompt "What is the capital of Peru?"
"""

import io
import math
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from minisft.config.errors import UserError
from minisft.config.flags import parse_flags, run_main
from minisft.demo import demo_model
from minisft.files.adapter import base_in_4bit, load_adapter, other_4bit
from minisft.files.adapter_config import read_adapter_config
from minisft.files.device import resolve_device, resolve_dtype
from minisft.files.weights import (
    four_bit_names,
    kinds_of,
    load_model_config,
    open_checkpoint,
    resolve_model,
)
from minisft.session.generate import (
    InferenceModel,
    Sampling,
    generate,
    load_for_inference,
    stop_ids,
)
from minisft.session.signals import Preempted, stop_signals
from minisft.text.chat import render
from minisft.text.encoding import decode, encode, encode_chat, mark_special_text
from minisft.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_of


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt. With a chat template, the prompt is sent as a user message."""

    model: str = ""
    """Base model: a directory or a hub id. Default: the adapter's base, or the demo."""
    adapter: str = ""
    """A PEFT adapter directory, such as a run's output directory."""
    prompt: tuple[str, ...] = ()
    """One or more prompts."""
    interactive: bool = False
    """Chat: each line of stdin is a user message. /reset clears the conversation, /exit or the end
    of the input quits."""
    system: str = ""
    """System message to put before the prompt."""
    chat: bool = True
    """Render the prompt with the model's chat template, if it has one."""
    max_new_tokens: int = 256
    """Maximum number of generated tokens."""
    temperature: float = 0.0
    """0: greedy decoding. Above 0: sample, with the logits divided by this."""
    top_p: float = 1.0
    """Nucleus sampling: sample from the most likely tokens whose probabilities sum to this."""
    seed: int = 0
    """Random seed for sampling."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: str = "auto"
    """Compute dtype: auto, bfloat16, float16 or float32."""
    load_in_4bit: str = "auto"
    """Load the base in 4 bits (NF4): true, false or auto. auto: if the adapter was trained on a
    4-bit base, or the checkpoint is stored in 4 bits."""
    device: str = "auto"
    """Device: auto, cpu, cuda or cuda:N."""


class Loaded(NamedTuple):
    """A model on its device and the tokenizer that encodes its prompts."""

    model: InferenceModel
    tokenizer: Tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags, load the model, print the answer to each prompt, and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv

    def run() -> None:
        config = parse_flags(GenerateConfig, argv, prog="generate.py", default=GenerateConfig())
        check(config)
        with stop_signals("before all answers were generated"):
            loaded = load(config)
            prompts = [
                prompt_ids(loaded.tokenizer, config, [{"role": "user", "content": text}])
                for text in config.prompt
            ]
            for text in answers(config, loaded, prompts) if prompts else ():
                print(text, flush=True)
        if config.interactive:
            # Ctrl-C is the normal way to leave a chat, so do not report it as an interruption.
            with suppress(KeyboardInterrupt):
                converse(config, loaded)

    return run_main(run, {Preempted: 75})


def check(config: GenerateConfig) -> None:
    """Raise UserError for invalid or contradictory settings."""
    if config.prompt and config.interactive:
        raise UserError("--prompt and --interactive: give one of the two")
    if not config.prompt and not config.interactive:
        raise UserError("--prompt is missing: give the text to continue, or --interactive to chat")
    if config.system and not config.chat:
        raise UserError("--system has no effect with --no-chat; put it into the prompt")
    if not 0 <= config.temperature < math.inf:
        raise UserError(f"--temperature is {config.temperature}; expected 0 or more, and finite")
    if not 0 < config.top_p <= 1:
        raise UserError(f"--top-p is {config.top_p}; expected above 0, at most 1")
    if config.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {config.max_new_tokens}; expected 1 or more")
    if not 0 <= config.seed < 2**63:
        raise UserError(f"--seed is {config.seed}; expected 0 to 2**63 - 1")
    if config.load_in_4bit not in ("auto", "true", "false"):
        raise UserError(f"--load-in-4bit is {config.load_in_4bit!r}; expected auto, true or false")
    for name, texts in (("prompt", config.prompt), ("system", (config.system,))):
        for text in texts:
            check_text(text, f"--{name}")


def check_text(text: str, what: str) -> None:
    """Raise UserError if `text` has lone surrogates, which stand for bytes of invalid UTF-8.

    what: the name of the text in the message. A terminal in another encoding sends invalid UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise UserError(
            f"{what}: character {e.start} is not valid Unicode ({text[e.start]!r}); use UTF-8"
        ) from None


def load(config: GenerateConfig) -> Loaded:
    """Load base model, adapter and tokenizer, and move the weights to the device.

    Warns if the adapter was trained on a 4-bit base and this base is 16-bit, or the reverse.
    """
    base, revision = config.model, config.revision
    if not base and config.adapter:
        raw = read_adapter_config(config.adapter)
        base = str(raw.get("base_model_name_or_path") or "")
        if not Path(base).is_dir():
            revision = revision or raw.get("revision")
    directory = resolve_model(base or demo_model(), revision)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    checkpoint = open_checkpoint(directory, load_model_config(directory))
    adapter, tokenizer_from, in_4bit = None, directory, bool(checkpoint.four_bit)
    if config.adapter:
        adapter = load_adapter(config.adapter, checkpoint.cfg)
        in_4bit = in_4bit or bool(base_in_4bit(config.adapter))
        tokenizer_from = tokenizer_of(Path(config.adapter), directory)
    tokenizer = load_tokenizer(tokenizer_from)
    if config.load_in_4bit != "auto":
        in_4bit = config.load_in_4bit == "true"
    four_bit = four_bit_names(checkpoint, in_4bit)
    if config.adapter and (other := other_4bit(config.adapter, kinds_of(checkpoint, four_bit))):
        warnings.warn(other, stacklevel=2)
    return Loaded(load_for_inference(checkpoint, dtype, device, four_bit, adapter), tokenizer)


def answers(config: GenerateConfig, loaded: Loaded, prompts: list[list[int]]) -> list[str]:
    """Return the continuation of each prompt as text without special tokens.

    prompts: token ids, one list per prompt.
    """
    new = generate(
        loaded.model,
        prompts,
        max_new_tokens=config.max_new_tokens,
        stop_ids=stop_ids(loaded.tokenizer, loaded.model.compute.model),
        sampling=Sampling(config.temperature, config.top_p, config.seed),
    )
    return [decode(loaded.tokenizer, ids, skip_special_tokens=True).strip() for ids in new]


def converse(config: GenerateConfig, loaded: Loaded) -> None:
    """Answer each line of stdin as a chat until EOF or /exit; /reset clears the conversation.

    Raises UserError if there is no chat template.
    """
    if not (config.chat and loaded.tokenizer.chat_template):
        raise UserError("--interactive needs a model with a chat template; use --prompt")
    messages: list[dict[str, str]] = []
    prompt = "> " if sys.stdin.isatty() else ""
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Decode invalid UTF-8 to surrogates, which check_text reports; else input() would raise.
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            text = input(prompt).strip()
        except EOFError:
            return
        if text == "/exit":
            return
        if text == "/reset":
            messages = []
        elif re.match(r"/[a-z]+(\s|$)", text):
            command = text.split()[0]
            notify(f"unknown command {command}; /reset clears the conversation, /exit quits")
        elif text:
            try:
                check_text(text, "the message")
            except UserError as e:
                notify(f"{e}; the message is ignored")
                continue
            messages.append({"role": "user", "content": text})
            (reply,) = answers(config, loaded, [prompt_ids(loaded.tokenizer, config, messages)])
            messages.append({"role": "assistant", "content": reply})
            print(reply, flush=True)


def notify(line: str) -> None:
    """Print a line to stderr, so that stdout contains only answers."""
    print(line, file=sys.stderr, flush=True)


def prompt_ids(
    tokenizer: Tokenizer, config: GenerateConfig, messages: list[dict[str, str]]
) -> list[int]:
    """Return the token ids of the messages as a prompt.

    The chat template is rendered as in training, so the text of a special token inside a message is
    encoded as plain text. Without a chat template, only the last message is encoded. Raises
    UserError if there are no tokens.
    """
    if not (config.chat and tokenizer.chat_template):
        ids = encode(tokenizer, messages[-1]["content"], add_special_tokens=True)
    else:
        system = [{"role": "system", "content": config.system}] if config.system else []
        rendered = render(
            tokenizer.chat_template,
            mark_special_text(tokenizer, system + messages),
            special_tokens=tokenizer.special_tokens,
            add_generation_prompt=True,
        )
        ids = encode_chat(tokenizer, rendered)
    if not ids:
        raise UserError("--prompt is empty; give at least one token of text")
    return ids


if __name__ == "__main__":
    sys.exit(main())
