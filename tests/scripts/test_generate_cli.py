"""scripts/generate.py: answers with minisft's and PEFT's adapters, and errors."""

import io
import json
import os
import shutil
import signal
import warnings

import pytest
import torch
from runs import call, flags, pairs, read, script, train, write_model, write_rows
from safetensors.torch import load_file, save_file

from minisft.text.tokenizer import tokenizer_of

PROMPTS = ["What is 1 + 1?", "The answer", "hello there, how are you today? I am fine"]
WORDS = 24


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def rows():
    """Chats to memorise."""
    return [
        {
            "messages": [
                {"role": "user", "content": r["prompt"]},
                {"role": "assistant", "content": r["completion"].strip()},
            ]
        }
        for r in pairs(4)
    ]


@pytest.fixture(scope="module")
def trained(base, rows, tmp_path_factory):
    """The output directory of a run that memorised four answers."""
    place = tmp_path_factory.mktemp("trained")
    train(
        model=base,
        dataset=write_rows(place / "rows.jsonl", rows),
        output_dir=place / "out",
        modules_to_save=["embed_tokens", "lm_head"],
        learning_rate=1e-2,
        load_in_4bit=False,  # PEFT is given the base as it is
        gradient_accumulation_steps=2,
        max_steps=120,
        max_length=96,
        save_steps=1000,
    )
    return place / "out"


@pytest.fixture(scope="module")
def peft_adapter(base, tmp_path_factory):
    """An adapter that PEFT wrote, with random non-zero B."""
    return write_with_peft(base, tmp_path_factory.mktemp("peft"))


def write_with_peft(base, directory, **changes):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    given = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    config = LoraConfig(**given | changes, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modules_to_save" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(directory)
    return directory


def answers(**settings):
    """The lines of one call, which must succeed; settings as flags."""
    outcome = call("generate", flags(**settings))
    assert outcome.code == 0, outcome.err
    return outcome.out


def refusal(**settings):
    outcome = call("generate", flags(**settings))
    assert outcome.code == 2 and outcome.out == "", outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    return outcome.err


def peft_greedy(base, adapter, text, chat):
    """The continuation by transformers and PEFT, special tokens removed."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    if chat:
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=not chat, return_tensors="pt")
    with torch.no_grad():
        new = model.generate(**ids, max_new_tokens=WORDS, do_sample=False, pad_token_id=4)
    return tokenizer.decode(new[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_an_adapter_answers_what_its_run_learnt(base, trained, rows):
    for row in rows:
        question, answer = (m["content"] for m in row["messages"])
        assert answers(model=base, adapter=trained, prompt=question) == f"{answer}\n"
        assert answers(model=base, prompt=question, max_new_tokens=WORDS) != f"{answer}\n"


def test_several_prompts_are_answered_side_by_side_as_alone(base, trained, rows):
    questions = [row["messages"][0]["content"] for row in rows]
    together = answers(model=base, adapter=trained, prompt=questions)
    alone = [answers(model=base, adapter=trained, prompt=question) for question in questions]
    assert together == "".join(alone)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("which", ["none", "peft", "minisft"])
def test_greedy_text_equals_that_of_transformers_and_peft(
    base, trained, peft_adapter, which, chat, recwarn
):
    adapter = {"none": "", "peft": peft_adapter, "minisft": trained}[which]
    for prompt in PROMPTS:
        ours = answers(model=base, adapter=adapter, prompt=prompt, max_new_tokens=WORDS, chat=chat)
        assert ours == peft_greedy(base, adapter, prompt, chat) + "\n"


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"target_modules": "all-linear"},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["rslora", "all_linear", "modules_to_save"],
)
def test_adapters_that_peft_wrote_give_its_text(base, peft_adapter, tmp_path, changes):
    write_with_peft(base, tmp_path, **changes)
    theirs = peft_greedy(base, tmp_path, PROMPTS[0], chat=False)
    given = {"model": base, "prompt": PROMPTS[0], "max_new_tokens": WORDS, "chat": False}
    assert answers(**given, adapter=tmp_path) == theirs + "\n"
    assert answers(**given, adapter=peft_adapter) != theirs + "\n"


def test_the_base_is_the_adapters_own_if_none_is_named(base, trained, rows):
    question = rows[0]["messages"][0]["content"]
    assert read(trained / "adapter_config.json")["base_model_name_or_path"] == str(base)
    assert answers(adapter=trained, prompt=question) == answers(
        model=base, adapter=trained, prompt=question
    )


def test_a_full_model_that_a_run_exported_answers(base, rows, tmp_path):
    settings = {"full_finetuning": True, "learning_rate": 3e-3, "max_steps": 120}
    train(
        **settings,
        model=base,
        dataset=write_rows(tmp_path / "rows.jsonl", rows),
        output_dir=tmp_path / "out",
        gradient_accumulation_steps=2,
        max_length=96,
        save_steps=1000,
    )
    question, answer = (m["content"] for m in rows[1]["messages"])
    assert answers(model=tmp_path / "out", prompt=question) == f"{answer}\n"


def test_a_system_message_and_no_chat_change_the_prompt(base, trained, rows):
    question = rows[0]["messages"][0]["content"]
    given = {"model": base, "adapter": trained, "prompt": question, "max_new_tokens": WORDS}
    texts = {
        answers(**given),
        answers(**given, system="the lazy dog jumps over the quick brown fox"),
        answers(**given, chat=False),
    }
    assert len(texts) == 3


def test_a_checkpoint_s_prompt_is_its_run_s(base, trained, rows, tmp_path):
    """Use the template of the run, next to the checkpoints, not that of the base."""
    run = shutil.copytree(trained, tmp_path / "run")
    (checkpoint,) = list(run.glob("checkpoint-*"))[-1:]
    assert tokenizer_of(checkpoint, base) == run and tokenizer_of(run, base) == run
    elsewhere = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    assert tokenizer_of(elsewhere, base) == base
    shutil.move(elsewhere, run / "other")
    assert tokenizer_of(run / "other", base) == base


def test_max_new_tokens_bounds_the_answer(base):
    short = answers(model=base, prompt="a", max_new_tokens=3, chat=False)
    long = answers(model=base, prompt="a", max_new_tokens=12, chat=False)
    assert long.startswith(short.rstrip("\n�")) and len(long) > len(short)


def test_sampling_repeats_under_a_seed(base):
    given = {"model": base, "prompt": "a", "max_new_tokens": 16, "chat": False}
    hot = [answers(**given, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert hot[0] == hot[1] != hot[2]
    assert answers(**given, temperature=1.0, top_p=1e-6, seed=5) == answers(**given)
    assert hot[0] != answers(**given)


# ---------------------------------------------------------------------------------- what is refused


def changed_config(trained, place, **changes):
    shutil.copytree(trained, place)
    path = place / "adapter_config.json"
    path.write_text(json.dumps(read(path) | changes))
    return place


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    other = write_model(tmp_path / "other", hidden_size=48, num_hidden_layers=1)
    write_with_peft(other, tmp_path / "adapter")
    message = refusal(model=base, adapter=tmp_path / "adapter", prompt="a")
    assert "adapter_model.safetensors" in message or "adapter_config.json" in message
    assert "lora_" in message or "layers" in message


def test_settings_that_were_changed_after_the_run_are_refused(base, trained, tmp_path):
    for name, value in {"lora_alpha": 32, "use_rslora": True}.items():
        place = changed_config(trained, tmp_path / name, **{name: value})
        assert name in refusal(model=base, adapter=place, prompt="a")


def test_damaged_and_incomplete_adapters_are_refused(base, peft_adapter, tmp_path):
    def copy(name):
        shutil.copytree(peft_adapter, tmp_path / name)
        return tmp_path / name, tmp_path / name / "adapter_model.safetensors"

    place, file = copy("truncated")
    file.write_bytes(file.read_bytes()[:-20])
    assert "adapter_model.safetensors" in refusal(model=base, adapter=place, prompt="a")

    place, file = copy("missing_tensor")
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    save_file(tensors, file, {"format": "pt"})
    message = refusal(model=base, adapter=place, prompt="a")
    assert "layers.1.self_attn.v_proj.lora_B.weight" in message

    place, file = copy("pickle")
    file.rename(place / "adapter_model.bin")
    message = refusal(model=base, adapter=place, prompt="a")
    assert "adapter_model.bin" in message and "never opened" in message

    place, file = copy("no_config")
    (place / "adapter_config.json").unlink()
    assert "adapter_config.json: no such file" in refusal(model=base, adapter=place, prompt="a")

    place = changed_config(peft_adapter, tmp_path / "dora", use_dora=True)
    assert "lora_magnitude_vector' is missing" in refusal(model=base, adapter=place, prompt="a")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "a", "system": "b", "chat": False}, "--system has no effect with --no-chat"),
        ({}, "--prompt is missing"),
        ({"prompt": "", "chat": False, "model": "no_bos"}, "--prompt is empty"),
        ({"prompt": "a", "interactive": True}, "--prompt and --interactive: give one of the two"),
        ({"prompt": "a", "temperature": -1}, "--temperature is -1.0; expected 0 or more"),
        ({"prompt": "a", "temperature": "nan"}, "--temperature is nan; expected 0 or more"),
        ({"prompt": "a", "temperature": "inf"}, "--temperature is inf; expected 0 or more"),
        ({"prompt": "a", "top_p": 0}, "--top-p is 0.0; expected above 0, at most 1"),
        ({"prompt": "a", "top_p": "nan"}, "--top-p is nan; expected above 0, at most 1"),
        ({"prompt": "a", "max_new_tokens": 0}, "--max-new-tokens is 0; expected 1 or more"),
        ({"prompt": "a", "seed": 2**63}, "expected 0 to 2**63 - 1"),
        ({"prompt": "a", "seed": -1}, "--seed is -1; expected 0 to 2**63 - 1"),
        ({"prompt": "a\udcff"}, "--prompt: character 1 is not valid Unicode"),
        ({"prompt": "a", "system": "\ud800"}, "--system: character 0 is not valid Unicode"),
        ({"prompt": "a", "device": "cuda:9"}, "use --device cpu"),
        ({"prompt": "a", "dtype": "int8"}, "--dtype is 'int8'; expected one of"),
        ({"prompt": "a", "adaptor": "x"}, "did you mean --adapter?"),
        ({"prompt": "a", "model": "/nowhere"}, "--model '/nowhere' does not exist"),
        ({"prompt": "a", "adapter": "/nowhere"}, "/nowhere/adapter_config.json: no such file"),
    ],
)
def test_bad_flags_are_reported_in_one_line(base, tmp_path, settings, message):
    if settings.get("model") == "no_bos":
        from tiny_tokenizer import write_byte_level

        shutil.copytree(base, tmp_path / "no_bos")
        write_byte_level(tmp_path / "no_bos", adds_bos=False)
        settings = settings | {"model": tmp_path / "no_bos"}
    assert message in refusal(**{"model": base} | settings)


def test_interactive_keeps_the_conversation(base, trained, rows, monkeypatch, tmp_path):
    """Each line is a message, answered with those before it; /reset forgets them."""
    seen = []
    module = script("generate")
    original = module.prompt_ids

    def prompt_ids(tokenizer, config, messages):
        seen.append([m["content"] for m in messages])
        return original(tokenizer, config, messages)

    monkeypatch.setattr(module, "prompt_ids", prompt_ids)
    lines = "first\n\nsecond\n/reset\nthird\n/exit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    outcome = call("generate", flags(model=base, interactive=True, max_new_tokens=3))
    assert outcome.code == 0, outcome.err
    replies = outcome.out.splitlines()
    assert [messages[-1] for messages in seen] == ["first", "second", "third"]
    assert [len(messages) for messages in seen] == [1, 3, 1]
    assert len(replies) == 3
    monkeypatch.setattr("sys.stdin", io.StringIO("first\n"))  # the chat ends with its input
    again = call("generate", flags(model=base, interactive=True, max_new_tokens=3))
    assert again.out.splitlines() == replies[:1]


def test_interactive_continues_after_an_invalid_message(base, monkeypatch):
    """An unknown command and invalid UTF-8 do not end the chat; a path is a message."""
    lines = io.TextIOWrapper(io.BytesIO(b"/foo\nf\xffirst\n/usr/bin\n/exit\nnever\n"), "utf-8")
    monkeypatch.setattr("sys.stdin", lines)
    outcome = call("generate", flags(model=base, interactive=True, max_new_tokens=3))
    assert outcome.code == 0 and len(outcome.out.splitlines()) == 1
    no_command, no_text = outcome.err.splitlines()
    assert no_command.startswith("unknown command /foo; /reset clears")
    assert "the message: character 1 is not valid Unicode" in no_text


def test_a_warning_is_one_line_without_our_source(base, peft_adapter, tmp_path):
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    shutil.copytree(peft_adapter, path.parent)
    save_file({**load_file(path), "vision.weight": torch.ones(1)}, path, {"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        outcome = call("generate", flags(model=base, adapter=path.parent, prompt="a"))
    assert outcome.code == 0
    (line,) = (line for line in outcome.err.splitlines() if "vision" in line)
    assert line == f"warning: {path}: tensor 'vision.weight' has no known meaning; ignored"
    assert "adapter.py" not in outcome.err


def test_a_signal_is_one_line_and_ends_a_chat_without_one(base, monkeypatch):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal came to nothing")

    monkeypatch.setattr(script("generate"), "answers", interrupted)
    outcome = call("generate", flags(model=base, prompt="x"))
    assert outcome.code == 75 and "SIGINT: stopped before all answers were generated" in outcome.err
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    outcome = call("generate", flags(model=base, interactive=True))
    assert outcome.code == 0 and "Traceback" not in outcome.err


def test_interactive_needs_a_chat_template(base):
    outcome = call("generate", flags(model=base, interactive=True, chat=False))
    assert outcome.code == 2 and "--interactive needs a model with a chat template" in outcome.err
