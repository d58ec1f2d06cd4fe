"""Tokenizer directories small enough to train inside a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is 12 + 30? The answer is 42.",
    "user: hello there, how are you today?\nassistant: I am fine, thank you very much!",
    "  leading blanks, trailing blanks  \n\n\ttabs and\nnew lines; naïve café, 你好, 🙂🙂",
] * 3
SPECIALS = ["<|bos|>", "<|eot|>", "<|start|>", "<|end|>", "<|pad|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|eot|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] | trim + '<|eot|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n' }}{% endif %}"
)


def write_byte_level(directory: Path, *, adds_bos: bool = True, **config: Any) -> Path:
    """A Llama-3 style tokenizer; config overrides tokenizer_config.json, None removes a key."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 0)]
        )
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eot|>",
        "pad_token": "<|pad|>",
        "chat_template": TEMPLATE,
    }
    return _write(directory, backend, fields | config)


def write_llama2(directory: Path, **config: Any) -> Path:
    """A Llama-2 style tokenizer: blanks as ▁, bytes as a fallback, normalizer in the file."""
    alphabet = sorted(set("".join(CORPUS).replace(" ", "▁")) - set("你好🙂\n\t"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *alphabet]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("i", "s"), ("▁", "▁"), ("o", "u")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    fields = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    return _write(directory, backend, fields | config)


def _write(directory: Path, backend: Tokenizer, config: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {key: value for key, value in config.items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory
