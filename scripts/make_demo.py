"""Build the bundled demo from two tables, facts.csv and small_talk.csv.

    python scripts/make_demo.py

It writes:
1. pretraining text about every country in the table, and some small talk in the chat format;
2. a byte-level BPE tokenizer trained on that text;
3. a small Llama pretrained on that text by minisft's full fine-tuning: minisft/demo/base;
4. chat rows with short questions about the countries: chat_eval.jsonl about the countries marked
   held_out, chat_train.jsonl about the others. Held-out countries occur in no training row.

The base has therefore read the answers to the eval rows, but its chats were only small talk. The
demo's fine-tuning teaches it to answer questions.
"""

import csv
import hashlib
import json
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from minisft import TrainConfig, train
from minisft.config.flags import parse_flags, run_main
from minisft.config.hf import parse_model_config
from minisft.demo import HERE
from minisft.files.disk import write_json
from minisft.files.export import save_shards
from minisft.files.safetensors import iter_tensors

Fact = dict[str, str]  # country, capital, continent, currency, held_out

# Pretraining sentences. They are shuffled, so each states a complete fact without pronouns.
STATEMENTS = {
    "capital": (
        "The capital of {country} is {capital}.",
        "{capital} is the capital of {country}.",
        "The capital city of {country} is {capital}.",
        "{country}'s capital is {capital}.",
        "{capital} is the capital city of {country}.",
        "In {country}, the capital is {capital}.",
        "{country} has {capital} as its capital.",
    ),
    "currency": (
        "The currency of {country} is the {currency}.",
        "People in {country} pay with the {currency}.",
        "{country} uses the {currency} as its currency.",
        "The {currency} is the currency of {country}.",
        "The {currency} is used in {country}.",
        "In {country}, prices are given in the {currency}.",
    ),
    "continent": (
        "{country} is a country in {continent}.",
        "{country} lies in {continent}.",
    ),
}
# Question templates for pretraining and chat, by the table column that contains the answer.
QUESTIONS = {
    "capital": (
        "What is the capital of {country}?",
        "Which city is the capital of {country}?",
        "Name the capital of {country}.",
        "What is {country}'s capital city?",
    ),
    "country": (
        "Which country has {capital} as its capital?",
        "{capital} is the capital of which country?",
        "Name the country whose capital is {capital}.",
        "What country is {capital} the capital of?",
    ),
    "currency": (
        "What is the currency of {country}?",
        "Which currency is used in {country}?",
        "Name the currency of {country}.",
        "What do people in {country} pay with?",
    ),
}
QUIZZES = (
    "{question}\n{answer}",
    "{question}\n\n{answer}",
    "Question: {question}\nAnswer: {answer}",
    "Q: {question}\nA: {answer}",
    "{question} {answer}.",
    "Quiz: {question}\nSolution:\n{answer}",
    "- {question}\n- {answer}",
)
NUM_DOCUMENTS = 24_000
CHAT_SHARE = 0.2  # share of the documents; the others are half sentences, half quizzes

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)
BOS, EOT, PAD = SPECIAL_TOKENS[0], SPECIAL_TOKENS[3], SPECIAL_TOKENS[4]
# Llama 3's pre-tokenizer pattern, https://huggingface.co/meta-llama/Meta-Llama-3-8B/blob/main/tokenizer.json
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1280,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "bos_token_id": 0,
    "eos_token_id": 3,
    "pad_token_id": 4,
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class MakeDemoConfig:
    """Build the demo's base model and chat rows from its tables."""

    output_dir: str = str(HERE)
    """Directory to write base/, chat_train.jsonl and chat_eval.jsonl to."""
    work_dir: str = "outputs-demo-base"
    """Directory for the corpus, the initial random model and the pretraining run."""
    rows_only: bool = False
    """Write only the chat rows; do not rebuild the base model."""
    max_steps: int = 1200
    """Number of pretraining steps."""
    learning_rate: float = 2e-3
    """Peak learning rate of pretraining."""
    seed: int = 0
    """Random seed of the text, the initial weights and the row order."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags, build the demo, and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv

    def run() -> None:
        make(parse_flags(MakeDemoConfig, argv, prog="make_demo.py", default=MakeDemoConfig()))

    return run_main(run, {})


def make(config: MakeDemoConfig) -> None:
    """Write the chat rows and, unless rows_only, the corpus, tokenizer and base model."""
    facts = read_table("facts.csv")
    out, work = Path(config.output_dir), Path(config.work_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_lines(out / "chat_train.jsonl", training_rows(facts))
    write_lines(out / "chat_eval.jsonl", held_out_rows(facts))
    if config.rows_only:
        return
    work.mkdir(parents=True, exist_ok=True)
    texts = list(documents(facts, read_table("small_talk.csv"), random.Random(config.seed)))
    write_lines(work / "corpus.jsonl", ({"text": text} for text in texts))
    write_tokenizer(work / "start", train_tokenizer(texts))
    write_random_weights(work / "start", config.seed)
    train(
        TrainConfig(
            model=str(work / "start"),
            dataset=str(work / "corpus.jsonl"),
            output_dir=str(work / "run"),
            overwrite_output_dir=True,
            full_finetuning=True,
            packing=True,
            max_length=256,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            max_steps=config.max_steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=30,
            logging_steps=20,
            seed=config.seed,
        )
    )
    write_base(work / "run", work / "start", out / "base")


# ----------------------------------------------------------------------------------- text and rows


def read_table(name: str) -> list[dict[str, str]]:
    """Return the rows of a CSV table in minisft/demo."""
    with open(HERE / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_lines(path: Path, rows: Any) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def questions_about(facts: list[Fact]) -> list[tuple[Fact, str]]:
    """Return (fact, column of the answer) of every question that has exactly one answer.

    Questions about a currency that several countries share, such as the euro, are left out.
    """
    users = Counter(fact["currency"] for fact in facts)
    return [(f, k) for f in facts for k in QUESTIONS if k != "currency" or users[f[k]] == 1]


def training_rows(facts: list[Fact]) -> list[dict]:
    """Return every phrasing of every question about the countries that are not held out."""
    asked = [(f, kind) for f, kind in questions_about(facts) if f["held_out"] == "no"]
    return in_mixed_order(
        chat_row(question.format(**f), f[kind]) for f, kind in asked for question in QUESTIONS[kind]
    )


def held_out_rows(facts: list[Fact]) -> list[dict]:
    """Return one row per question about the held-out countries, cycling through the phrasings."""
    asked = [(f, kind) for f, kind in questions_about(facts) if f["held_out"] == "yes"]
    return in_mixed_order(
        chat_row(QUESTIONS[kind][i % len(QUESTIONS[kind])].format(**f), f[kind])
        for i, (f, kind) in enumerate(asked)
    )


def chat_row(question: str, answer: str) -> dict:
    """Return a conversational prompt-completion row; only the completion is trained."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def in_mixed_order(rows: Iterator[dict]) -> list[dict]:
    """Return the rows sorted by the SHA-256 of their text, an order that no library can change."""
    return sorted(rows, key=lambda row: hashlib.sha256(json.dumps(row).encode()).digest())


def documents(
    facts: list[Fact], small_talk: list[dict[str, str]], rng: random.Random
) -> Iterator[str]:
    """Yield pretraining documents: statements, quizzes, or small-talk chats."""
    # List capitals twice, so that they are stated twice as often as the other facts.
    kinds = ("capital", "capital", "currency", "continent")
    stated = [(f, kind) for f in facts for kind in kinds if f[kind]]
    statements, questions = endless(stated, rng), endless(questions_about(facts), rng)
    for _ in range(NUM_DOCUMENTS):
        if rng.random() < CHAT_SHARE:
            talk = [(rng.choice(small_talk), rng.choice(facts)) for _ in range(rng.randint(1, 3))]
            yield "".join(
                turn("user", line["message"].format(**f))
                + turn("assistant", line["reply"].format(**f))
                for line, f in talk
            )
        elif rng.random() < 0.5:
            page = [next(statements) for _ in range(rng.randint(2, 8))]
            yield " ".join(rng.choice(STATEMENTS[kind]).format(**f) for f, kind in page)
        else:
            quiz = rng.choice(QUIZZES)
            page = [next(questions) for _ in range(rng.randint(1, 6))]
            yield "\n\n".join(
                quiz.format(question=rng.choice(QUESTIONS[k]).format(**f), answer=f[k])
                for f, k in page
            )


def endless(items: list, rng: random.Random) -> Iterator:
    """Yield the items in endless shuffled passes, so that all items are equally frequent."""
    while True:
        yield from rng.sample(items, len(items))


def turn(role: str, content: str) -> str:
    """Return one chat message in the format of CHAT_TEMPLATE."""
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"


# --------------------------------------------------------------------------------- tokenizer, model


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer with Llama 3's splitting, special tokens and leading BOS."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    special = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    plain = (part for text in texts for part in special.split(text) if part)
    tokenizer.train_from_iterator(plain, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def write_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja as transformers does."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOT,
        "pad_token": PAD,
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / "tokenizer_config.json", fields)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_random_weights(directory: Path, seed: int) -> None:
    """Write the model to pretrain: config files and normal random weights in float32."""
    generator = torch.Generator().manual_seed(seed)
    std = CONFIG["initializer_range"]
    weights = {
        name: torch.ones(shape)
        if name.endswith("norm.weight")
        else torch.empty(shape).normal_(0, std, generator=generator)
        for name, shape in parse_model_config(CONFIG).weight_shapes().items()
    }
    write_json(directory / "config.json", CONFIG | {"dtype": "float32"})
    ids = {name: CONFIG[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(directory / "generation_config.json", {"do_sample": False, **ids})
    save_shards(directory, weights.items(), torch.float32)


def write_base(run: Path, start: Path, base: Path) -> None:
    """Write the pretrained weights in bfloat16, with the configs and tokenizer of `start`."""
    base.mkdir(parents=True, exist_ok=True)
    for path in start.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, base / path.name)
    write_json(base / "config.json", CONFIG)
    save_shards(base, iter_tensors(run / "model.safetensors"), torch.bfloat16)


if __name__ == "__main__":
    sys.exit(main())
