"""Token arrays against TRL: SFTTrainer's prepared dataset and pack_dataset, equal to the token."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_tokenizer import write_byte_level, write_llama2  # noqa: E402
from tokenised import named_rows, tokenize_rows  # noqa: E402

from minisft.batches import (  # noqa: E402
    RowSchedule,
    TokenizedDataset,
)
from minisft.data.readers import read_rows  # noqa: E402
from minisft.data.settings import Settings  # noqa: E402
from minisft.data.tokenize import tokenize  # noqa: E402
from minisft.text.tokenizer import load_tokenizer  # noqa: E402

SHARED = Path(__file__).parents[3] / "shared"
SYSTEM = {"role": "system", "content": "Be kind."}
ASK = {"role": "user", "content": " What is 12 + 30? "}
TELL = {"role": "assistant", "content": "The answer is 42."}
THINK = {"role": "assistant", "content": "Fine", "reasoning_content": "how are you"}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}

TEXT = [
    {"text": t} for t in ("the fox", "ends<|eot|>", "<|bos|>twice", "é 你好 🙂", "0123456789" * 9)
]
PROMPTS = [
    {"prompt": "What is", "completion": " the answer"},
    {"prompt": "th", "completion": "e fox"},  # merges into one token across the boundary
    {"prompt": "What is ", "completion": "42<|eot|>"},
    {"prompt": "0123456789" * 9, "completion": "masked by truncation"},
    {"prompt": "", "completion": "no prompt"},
    {"prompt": "cut in the completion", "completion": "0123456789" * 9},
]
CHATS = [
    {"messages": [ASK, TELL]},
    {"messages": [SYSTEM, ASK, TELL, ASK, THINK]},
    {"messages": [TELL]},
    {"messages": [ASK, TELL, ASK]},
]
TEMPLATE_WITH_ALL = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{{ style }}"
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|end|>' }}"
    "{% if m.reasoning_content %}{{ m.reasoning_content }}{% endif %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|eot|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>{% endif %}"
)
# The prompt alone ends in a thought that the whole chat drops.
TEMPLATE_NOT_A_PREFIX = TEMPLATE_WITH_ALL.replace(
    "<|start|>assistant<|end|>{% endif %}", "<|start|>assistant<|end|>thought{% endif %}"
)
LLAMA3 = (Path(trl.__file__).parent / "chat_templates/llama3.jinja").read_text()
LLAMA3_TOKENS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHAT_PROMPTS = [
    {"prompt": [ASK], "completion": [TELL]},
    {"prompt": [SYSTEM, ASK, TELL, ASK], "completion": [THINK]},
    {"prompt": [ASK], "completion": [TELL, ASK, TELL]},
]
TOKENS = [
    {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1], "assistant_masks": [1, 1, 1, 0]},
    {"input_ids": [9, 10], "completion_mask": [0, 1], "assistant_masks": [0, 1]},
    {"input_ids": [11, 12], "completion_mask": [1, 1], "assistant_masks": [0, 0]},
    {"input_ids": list(range(40)), "completion_mask": [1] * 40, "assistant_masks": [1] * 40},
]
CASES: dict[str, tuple[list[dict], dict[str, Any], dict[str, Any]]] = {
    # name: rows, settings of both sides, tokenizer_config.json
    "text": (TEXT, {}, {}),
    "text without bos": (TEXT, {}, {"adds_bos": False, "bos_token": None}),
    "another text column": (
        [{"body": row["text"], "id": 1} for row in TEXT],
        {"dataset_text_field": "body"},
        {},
    ),
    "prompts": (PROMPTS, {}, {}),
    "prompts, no truncation": (PROMPTS, {"max_length": None}, {}),
    "prompts, all trained": (PROMPTS, {"completion_only_loss": False}, {}),
    "chats": (CHATS, {}, {}),
    "chats, a flag without effect": (CHATS, {"completion_only_loss": True}, {}),
    "chats, assistant only": (CHATS, {"assistant_only_loss": True}, {}),
    "chats, no truncation": (
        CHATS,
        {"assistant_only_loss": True, "max_length": None},
        {"chat_template": TEMPLATE_WITH_ALL},
    ),
    "chats with tools and variables": (
        [
            {
                **row,
                "tools": json.dumps([TOOL]) if i % 2 else None,
                "chat_template_kwargs": {"style": f"s{i}"},
            }
            for i, row in enumerate(CHATS)
        ],
        {},
        {"chat_template": TEMPLATE_WITH_ALL},
    ),
    "from and value": (
        [
            {"conversations": [{"from": m["role"], "value": m["content"]} for m in row["messages"]]}
            for row in CHATS
        ],
        {},
        {},
    ),
    "chat prompts": (CHAT_PROMPTS, {}, {}),
    "chat prompts, all trained": (CHAT_PROMPTS, {"completion_only_loss": False}, {}),
    "chat prompts, assistant only": (
        CHAT_PROMPTS,
        {"assistant_only_loss": True, "max_length": None},
        {},
    ),
    "chat prompt that is no prefix": (
        CHAT_PROMPTS,
        {"max_length": None},
        {"chat_template": TEMPLATE_NOT_A_PREFIX},
    ),
    "chat prompts with tools": (
        [{**row, "tools": [TOOL], "chat_template_kwargs": {"style": "s"}} for row in CHAT_PROMPTS],
        {"max_length": None, "assistant_only_loss": True},
        {"chat_template": TEMPLATE_WITH_ALL},
    ),
    "chats through a template with markers, wide": (
        CHATS,
        {"assistant_only_loss": True, "max_length": 40},
        {"chat_template": TEMPLATE_WITH_ALL},
    ),
    # TRL knows this template by its text and marks it; here the marks are derived.
    "chats, derived masks": (
        [row for row in CHATS if row["messages"][0]["role"] != "assistant"],
        {"assistant_only_loss": True, "max_length": None},
        {"chat_template": LLAMA3, "additional_special_tokens": LLAMA3_TOKENS},
    ),
    "a template of the run's own": (
        CHATS,
        {"max_length": None, "chat_template": TEMPLATE_WITH_ALL},
        {"chat_template": TEMPLATE_NOT_A_PREFIX},
    ),
    "chats and a tokenizer without bos": (CHATS, {}, {"adds_bos": False}),
    "prompts and a tokenizer without bos": (PROMPTS, {}, {"adds_bos": False, "bos_token": None}),
    "prompts, overlong and all trained": (
        PROMPTS,
        {"completion_only_loss": False, "max_length": 8},
        {},
    ),
    "text that merges with EOS": ([{"text": "a<|eo"}, {"text": " <|eot|> "}], {}, {}),
    "tokens": (TOKENS, {}, {}),
    "tokens, completion only": (TOKENS, {"completion_only_loss": True}, {}),
    "tokens with labels": (
        [{"input_ids": [5, 6, 7], "labels": [-100, 6, 9]}, {"input_ids": [5], "labels": [-100]}],
        {},
        {},
    ),
    "packed": (PROMPTS, {"packing": True}, {}),
    "packed and split": (PROMPTS, {"packing": True, "packing_strategy": "bfd_split"}, {}),
    "wrapped": (CHATS, {"packing": True, "packing_strategy": "wrapped"}, {}),
    "packed chats": (CHATS, {"packing": True, "assistant_only_loss": True}, {}),
    "packed tokens": (TOKENS, {"packing": True, "packing_strategy": "bfd_split"}, {}),
}


@pytest.fixture(scope="module")
def model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=400,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    return transformers.LlamaForCausalLM(config)


def _theirs(rows: list[dict], settings: dict, directory: Path, model: Any, out: Path) -> Any:
    if "chat_template" in settings:
        (out / "run.jinja").write_text(settings["chat_template"])
        settings = settings | {"chat_template_path": str(out / "run.jinja")}
        del settings["chat_template"]
    arguments = trl.SFTConfig(
        output_dir=str(out),
        report_to="none",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        disable_tqdm=True,
        **({"max_length": 24} | settings),
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(directory),
    )
    return trainer.train_dataset


def _ours(rows: list[dict], settings: dict, directory: Path) -> TokenizedDataset:
    settings = {"max_length": 24, "dataset_text_field": "text"} | settings
    packing = settings.get("packing", False)
    template = str(directory.parent / "run.jinja") if "chat_template" in settings else ""
    return tokenize_rows(
        rows,
        load_tokenizer(directory, chat_template=template),
        text_field=settings["dataset_text_field"],
        max_length=settings["max_length"],
        completion_only_loss=settings.get("completion_only_loss"),
        assistant_only_loss=settings.get("assistant_only_loss", False),
        packing=settings.get("packing_strategy", "bfd") if packing else None,
    )


def _rows(dataset: TokenizedDataset) -> list[dict[str, list[int]]]:
    rows = []
    for i in range(len(dataset)):
        documents = dataset.row_documents(i)
        a, b = documents[0][0], documents[-1][1]
        rows.append(
            {
                "input_ids": dataset.input_ids[a:b].tolist(),
                "labels": dataset.labels[a:b].tolist(),
                "seq_lengths": [stop - start for start, stop in documents],
            }
        )
    return rows


def _assert_equal(ours: TokenizedDataset, theirs: Any) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(_rows(ours), theirs, strict=True):
        assert mine["input_ids"] == other["input_ids"]
        assert mine["labels"] == other["labels"]
        if "seq_lengths" in other:
            assert mine["seq_lengths"] == other["seq_lengths"]


@pytest.mark.parametrize("name", CASES)
def test_rows_equal_sft_trainer(name: str, model: Any, tmp_path: Path) -> None:
    rows, settings, config = CASES[name]
    directory = write_byte_level(tmp_path / "tokenizer", **config)
    theirs = _theirs(rows, settings, directory, model, tmp_path)
    _assert_equal(_ours(rows, settings, directory), theirs)


@pytest.mark.parametrize("name", ["chats", "packed", "wrapped", "prompts"])
def test_one_pass_equals_sft_trainer(name: str, model: Any, tmp_path: Path) -> None:
    """`tokenize` with everything in one go, as a run does it."""
    rows, settings, config = CASES[name]
    directory = write_byte_level(tmp_path / "tokenizer", **config)
    packing = settings.get("packing_strategy", "bfd") if settings.get("packing") else None
    ours = tokenize(
        [named_rows(rows, "rows")],
        load_tokenizer(directory),
        Settings(max_length=24, packing=packing),
    )
    _assert_equal(ours, _theirs(rows, settings, directory, model, tmp_path))


@pytest.mark.parametrize(("rows", "size"), [(11, 2), (16, 4), (3, 8)])
def test_order_of_every_epoch_equals_trainer(
    rows: int, size: int, model: Any, tmp_path: Path
) -> None:
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=size, seed=5, report_to="none",
        use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"row": list(range(rows))}),
        data_collator=lambda batch: {"row": [example["row"] for example in batch]},
    )
    loader = trainer.get_train_dataloader()
    schedule = RowSchedule(num_rows=rows, batch_size=size, accumulation=1, seed=5)
    per_epoch = schedule.steps_per_epoch
    assert len(loader) == per_epoch
    for epoch in range(3):
        loader.set_epoch(epoch)
        theirs = [batch["row"] for batch in loader]
        ours = [schedule.rows(epoch * per_epoch + step)[0] for step in range(per_epoch)]
        assert ours == theirs


@pytest.mark.parametrize("legacy", [True, False])
def test_llama2_tokenizer_equals_sft_trainer(legacy: bool, model: Any, tmp_path: Path) -> None:
    directory = write_llama2(tmp_path / "tokenizer", legacy=legacy)
    rows = [
        {"prompt": "the", "completion": " answer"},
        {"prompt": "the ", "completion": "answer</s>"},
        {"prompt": " is</s> the", "completion": "  you"},
    ]
    _assert_equal(_ours(rows, {}, directory), _theirs(rows, {}, directory, model, tmp_path))


def test_real_rows_equal_sft_trainer(model: Any, tmp_path: Path) -> None:
    directory, source = SHARED / "models/llama-16m", SHARED / "data/gsm8k_test.jsonl"
    if not (directory.exists() and source.exists()):
        pytest.skip(f"{directory} or {source} is not there")
    rows = list(read_rows(str(source), columns={"prompt": "question", "completion": "answer"}))
    rows = rows[:200]
    settings = {"max_length": 200}
    ours = _ours(rows, settings, directory)
    assert ours.stats["truncated"] > 0
    _assert_equal(ours, _theirs(rows, settings, directory, model, tmp_path))


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_pack_equals_pack_dataset(strategy: str, tmp_path: Path) -> None:
    rng = random.Random(1)
    rows = []
    for _ in range(3000):
        n = rng.choice([0, 1, rng.randrange(2, 40), rng.randrange(2, 40), rng.randrange(90, 400)])
        ids = [rng.randrange(1000) for _ in range(n)]
        rows.append({"input_ids": ids, "labels": [i if i % 3 else -100 for i in ids]})
    tokenizer = load_tokenizer(write_byte_level(tmp_path))
    for max_length in (64, 100):
        expected = trl.pack_dataset(datasets.Dataset.from_list(rows), max_length, strategy)
        packed = tokenize_rows(rows, tokenizer, packing=strategy, max_length=max_length)
        _assert_equal(packed, expected)
        assert 0.5 < packed.stats["packing_efficiency"] <= 1
