"""The demo's tables, rows and base model: what ships is what scripts/make_demo.py writes."""

import itertools
import json
import random
import re
from collections import Counter

import pytest
import torch
from runs import script

from minisft.config.train import TrainConfig
from minisft.demo import HERE, demo_config, demo_model
from minisft.files.load import load_base
from minisft.files.safetensors import read_header
from minisft.files.weights import load_model_config
from minisft.session.generate import InferenceModel, generate, stop_ids
from minisft.text.chat import render
from minisft.text.encoding import decode, encode
from minisft.text.tokenizer import load_tokenizer

make_demo = script("make_demo")


@pytest.fixture(scope="module")
def facts() -> list[dict[str, str]]:
    return make_demo.read_table("facts.csv")


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / name).read_text("utf-8").splitlines()]


def texts(name: str) -> list[str]:
    """Every string of every message of a chat file."""
    return [m["content"] for row in rows(name) for m in row["prompt"] + row["completion"]]


# ------------------------------------------------------------------------------------- the tables


def test_facts_are_complete_and_unambiguous(facts):
    assert len(facts) >= 100
    for column in ("country", "capital"):
        values = [fact[column] for fact in facts]
        assert len(set(values)) == len(values)
    for fact in facts:
        assert fact["country"] and fact["capital"] and fact["currency"]
        assert fact["held_out"] in ("yes", "no")
        assert fact["continent"] in (
            *("Africa", "Asia", "Europe", "North America", "Oceania", "South America"),
            "",  # a country that lies in two, or is counted to either
        )
        assert all(value.isascii() and value == value.strip() for value in fact.values())
    # A capital that holds its country's name could be guessed from the question.
    assert not [f for f in facts if f["country"] in f["capital"] or f["capital"] in f["country"]]


@pytest.mark.parametrize(
    ("country", "capital", "currency"),
    [
        ("Australia", "Canberra", "dollar"),
        ("Brazil", "Brasilia", "real"),
        ("Canada", "Ottawa", "dollar"),
        ("Japan", "Tokyo", "yen"),
        ("Kazakhstan", "Astana", "tenge"),
        ("New Zealand", "Wellington", "dollar"),
        ("Pakistan", "Islamabad", "rupee"),
        ("Peru", "Lima", "sol"),
        ("Turkey", "Ankara", "lira"),
    ],
)
def test_facts_are_right(facts, country, capital, currency):
    fact = next(f for f in facts if f["country"] == country)
    assert (fact["capital"], fact["currency"]) == (capital, currency)


def test_small_talk_answers_no_question():
    """Chat in the base's pretraining names a place only as the user does, or out of the blue."""
    for line in make_demo.read_table("small_talk.csv"):
        named = [set(re.findall(r"{(\w+)}", line[side])) for side in ("message", "reply")]
        assert not named[0] or named[1] <= named[0], line


# --------------------------------------------------------------------------------------- the rows


def test_shipped_rows_are_what_the_script_writes(facts):
    assert rows("chat_train.jsonl") == make_demo.training_rows(facts)
    assert rows("chat_eval.jsonl") == make_demo.held_out_rows(facts)


@pytest.mark.parametrize("name", ["chat_train.jsonl", "chat_eval.jsonl"])
def test_rows_are_single_questions_with_a_short_answer(name):
    for row in rows(name):
        assert sorted(row) == ["completion", "prompt"]
        assert [m["role"] for m in row["prompt"] + row["completion"]] == ["user", "assistant"]
        question, answer = row["prompt"][0]["content"], row["completion"][0]["content"]
        assert question == question.strip() and answer == answer.strip()
        assert answer and answer not in question
    prompts = [row["prompt"][0]["content"] for row in rows(name)]
    assert len(set(prompts)) == len(prompts)


def test_held_out_facts_appear_nowhere_in_the_training_rows(facts):
    seen = "\n".join(texts("chat_train.jsonl"))
    answers = {row["completion"][0]["content"] for row in rows("chat_eval.jsonl")}
    held_out = [fact for fact in facts if fact["held_out"] == "yes"]
    assert 30 <= len(held_out) < len(facts) / 2
    for name in answers | {f[k] for f in held_out for k in ("country", "capital")}:
        assert not re.search(rf"\b{re.escape(name)}\b", seen), name


def shuffled_answers(rows: list[dict], seed: int) -> list[dict]:
    """The control: the same rows with every answer at another question of its kind, all wrong."""
    facts = make_demo.read_table("facts.csv")
    kinds = {fact[kind]: kind for fact in facts for kind in make_demo.QUESTIONS}
    answers = [row["completion"][0]["content"] for row in rows]
    rng, source = random.Random(seed), list(range(len(rows)))
    for kind in make_demo.QUESTIONS:
        places = [i for i, answer in enumerate(answers) if kinds[answer] == kind]
        for i, j in zip(places, rng.sample(places, len(places)), strict=True):
            source[i] = j
        while right := [i for i in places if answers[source[i]] == answers[i]]:
            for i in right:
                j = rng.choice(places)
                source[i], source[j] = source[j], source[i]
    return [
        {"prompt": row["prompt"], "completion": rows[j]["completion"]}
        for row, j in zip(rows, source, strict=True)
    ]


def test_shuffled_answers_are_the_same_answers_all_wrong():
    true = rows("chat_train.jsonl")
    control = shuffled_answers(true, seed=0)
    assert [row["prompt"] for row in control] == [row["prompt"] for row in true]
    assert all(a["completion"] != b["completion"] for a, b in zip(control, true, strict=True))
    answers = [Counter(r["completion"][0]["content"] for r in some) for some in (control, true)]
    assert answers[0] == answers[1]


def test_no_answer_is_frequent():
    """Saying one answer to everything must not count as learning."""
    for name in ("chat_train.jsonl", "chat_eval.jsonl"):
        counts = Counter(row["completion"][0]["content"] for row in rows(name))
        assert max(counts.values()) <= 0.02 * len(rows(name))


# ------------------------------------------------------------------------------------- the corpus


def test_the_corpus_is_repeatable_and_tells_every_fact(facts):
    def corpus(count):
        small_talk = make_demo.read_table("small_talk.csv")
        pages = make_demo.documents(facts, small_talk, random.Random(0))
        return list(itertools.islice(pages, count))

    pages = corpus(3000)
    assert pages[:50] == corpus(50)
    prose = "\n".join(page for page in pages if "<|" not in page)
    for fact, kind in make_demo.questions_about(facts):
        assert prose.count(fact[kind]) >= 5
    assert all(page.endswith("<|eot_id|>") for page in pages if "<|" in page)


# --------------------------------------------------------------------------------------- the base


def test_the_base_is_small_and_stored_in_bfloat16():
    files = [path for path in HERE.rglob("*") if path.suffix not in (".py", ".pyc")]
    assert sum(path.stat().st_size for path in files if path.is_file()) <= 6_000_000
    cfg = load_model_config(HERE / "base")
    tensors = read_header(HERE / "base/model.safetensors").tensors
    assert {name: info.shape for name, info in tensors.items()} == cfg.weight_shapes()
    assert {info.dtype for info in tensors.values()} == {torch.bfloat16}
    # NF4 stores blocks of 64 weights along the rows.
    assert all(columns % 64 == 0 for _, columns in cfg.linear_shapes().values())


def test_the_tokenizer_is_laid_out_like_llama_3():
    tokenizer = load_tokenizer(HERE / "base")
    cfg = load_model_config(HERE / "base")
    assert tokenizer.backend.get_vocab_size() == cfg.vocab_size == make_demo.CONFIG["vocab_size"]
    names = {f"{name}_token": text for name, text in zip(
        ("bos", "eos", "pad"), (make_demo.BOS, make_demo.EOT, make_demo.PAD), strict=True
    )}  # fmt: skip
    assert tokenizer.special_tokens == names
    for i, token in enumerate(make_demo.SPECIAL_TOKENS):
        assert tokenizer.backend.token_to_id(token) == i
    assert cfg.eos_token_ids == (tokenizer.backend.token_to_id(make_demo.EOT),)
    for text in ("Où est Reykjavik?\n\n  What's 12345?", "日本 🙂"):
        ids = encode(tokenizer, text, add_special_tokens=True)
        assert ids[0] == 0 and decode(tokenizer, ids, skip_special_tokens=True) == text


def test_the_chat_template_writes_what_the_base_has_read():
    tokenizer = load_tokenizer(HERE / "base")
    messages = [("user", "Hello!"), ("assistant", "Hi! How can I help you?")]
    rendered = render(
        tokenizer.chat_templates["default"],
        [{"role": role, "content": content} for role, content in messages],
        special_tokens=tokenizer.special_tokens,
    )
    assert rendered == make_demo.BOS + "".join(itertools.starmap(make_demo.turn, messages))


def test_the_base_knows_the_held_out_facts(facts):
    """In a quiz, as plain text; what it lacks before fine-tuning is to answer in chat."""
    asked = [(f, k) for f, k in make_demo.questions_about(facts) if f["held_out"] == "yes"]
    base, state = load_base(TrainConfig(model=demo_model(), device="cpu"))
    tokenizer = load_tokenizer(base.directory)
    prompts = [
        encode(tokenizer, make_demo.QUESTIONS[k][0].format(**f) + "\n", add_special_tokens=True)
        for f, k in asked
    ]
    model = InferenceModel(state.trainable.views, base.frozen, base.compute, base.device)
    texts = generate(model, prompts, max_new_tokens=8, stop_ids=stop_ids(tokenizer, base.cfg))
    said = [decode(tokenizer, ids, skip_special_tokens=True) for ids in texts]
    right = [text.split("\n")[0] == f[k] for text, (f, k) in zip(said, asked, strict=True)]
    assert sum(right) >= 0.95 * len(asked)


def test_demo_config_names_what_ships():
    config = demo_config()
    assert config.model == str(HERE / "base") and config.lora is not None
    assert (config.lora.r, config.lora.lora_alpha) == (16, 16)
    assert config.dataset == (str(HERE / "chat_train.jsonl"),)
    assert config.eval_dataset == str(HERE / "chat_eval.jsonl")
