"""Faults 19 to 35: numbers that go wrong, and rows that are wrong."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from runs import ROOT, call, flags, metrics, pairs, read, step_lines, train, write_model, write_rows
from safetensors.torch import load_file, save_file

SMALL = {"lora_r": 2, "max_steps": 1, "max_length": 64}
RANKS = pytest.mark.skip(reason="waits for data parallel training")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(model, tmp_path):
    """run(content, name=..., **flags) trains on a file of these bytes; the outcome."""

    def run(content, name="rows.jsonl", **changes):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        settings = {"model": model, "dataset": path, "output_dir": tmp_path / "out"}
        settings["per_device_train_batch_size"] = 1  # most files here hold one row
        return call("train", flags(**settings | SMALL | changes))

    return run


def refused(outcome, *texts):
    assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome
    assert outcome.err.startswith("error: ") and "Traceback" not in outcome.err
    assert all(text in outcome.err for text in texts), outcome.err


def record(tmp_path):
    return read(tmp_path / "out" / "run.json")["data"]


def rows_text(rows):
    return "".join(json.dumps(r) + "\n" for r in rows)


ROW = '{"prompt": "a", "completion": " b"}\n'
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]


# ---------------------------------------------------------------------------------------- numbers


def test_f19_a_nan_stops_before_the_update_and_is_in_the_log(model, tmp_path):
    """The rows of the third step meet an embedding that is NaN; two steps and their checkpoints
    are as they were."""
    rows = [{"input_ids": [5, 6, 7, 8, 9 + i]} for i in range(8)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    settings = {
        "dataset": data, "lora_r": 2, "max_steps": 4, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1, "save_steps": 1, "logging_steps": 2,
    }  # fmt: skip
    train(model=model, output_dir=tmp_path / "good", **settings)
    from minisft.batches import epoch_order

    poisoned = epoch_order(8, 3407)[4:6]  # the rows of step 3
    shutil.copytree(model, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][9 + poisoned[0]] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    given = flags(model=tmp_path / "model", output_dir=tmp_path / "out", **settings)
    outcome = call("train", given)
    assert outcome.code == 3 and outcome.err.count("\n") == 1
    assert "step 3: the loss is nan" in outcome.err
    assert f"Rows of the step: {poisoned[0]}, {poisoned[1]}." in outcome.err
    assert f"the newest checkpoint is {tmp_path}/out/checkpoint-2" in outcome.err
    assert [(m["step"], m["loss"]) for m in metrics(tmp_path / "out")][1] == (3, None)
    ours, theirs = (
        load_file(tmp_path / d / "checkpoint-2" / "adapter_model.safetensors")
        for d in ("out", "good")
    )
    assert all((ours[k] == theirs[k]).all() for k in ours)


@pytest.mark.parametrize("stops", [False, True])
def test_f20_a_spike_warns_and_stops_where_asked(run, tmp_path, monkeypatch, stops):
    from minisft import run as loop

    real = loop.train_step_

    def train_step_(state, *args):
        result = real(state, *args)
        return result._replace(loss=result.loss * (5 if state.step in (3, *range(15, 25)) else 1))

    monkeypatch.setattr(loop, "train_step_", train_step_)
    more = {"max_steps": 26, "learning_rate": 0, "save_steps": 10, "stop_on_loss_spike": stops}
    outcome = run(rows_text(pairs(8)), **more)
    warnings = [line for line in outcome.out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1  # not at step 3, before there is a mean to compare with
    assert "step 15: the loss is" in warnings[0] and "Rows of the step: " in warnings[0]
    assert outcome.code == (3 if stops else 0)
    if stops:
        assert "step 19: the loss is" in outcome.err and "fifth such step in a row" in outcome.err
        assert "the newest checkpoint is" in outcome.err and "checkpoint-10" in outcome.err
    assert len(metrics(tmp_path / "out")) == (19 if stops else 26)


def test_f20_the_spike_guard_resumes_with_what_it_knew(run, tmp_path, monkeypatch):
    from minisft import run as loop

    real = loop.train_step_

    def train_step_(state, *args):
        result = real(state, *args)
        return result._replace(loss=result.loss * (5 if state.step >= 15 else 1))

    monkeypatch.setattr(loop, "train_step_", train_step_)
    more = {"learning_rate": 0, "save_steps": 1, "stop_on_loss_spike": True}
    run(rows_text(pairs(8)), **more, max_steps=17)
    outcome = run(rows_text(pairs(8)), **more, max_steps=26, resume_from_checkpoint="auto")
    assert outcome.code == 3 and "step 19" in outcome.err


@RANKS
def test_f21_a_gradient_that_is_not_finite_on_one_rank():
    raise NotImplementedError


def test_f22_two_fresh_processes_give_the_same_bits(model, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", pairs(12))
    for name in ("a", "b"):
        argv = flags(
            model=model, dataset=data, output_dir=tmp_path / name, lora_r=4, lora_dropout=0.1,
            max_steps=3, max_length=64, packing=True, deterministic=True,
        )  # fmt: skip
        subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "train.py"), *argv],
            env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
            capture_output=True,
            check=True,
        )
    names = ("loss", "grad_norm", "learning_rate", "num_tokens", "num_loss_tokens")
    assert step_lines(tmp_path / "a", *names) == step_lines(tmp_path / "b", *names)
    file = "adapter_model.safetensors"
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_f22_deterministic_is_told_to_torch_and_taken_back(run, monkeypatch):
    import torch

    from minisft import run as loop

    real, seen = loop.train_step_, []

    def train_step_(*args):
        seen.append(
            (
                torch.are_deterministic_algorithms_enabled(),
                os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
            )
        )
        return real(*args)

    monkeypatch.setattr(loop, "train_step_", train_step_)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert run(ROW * 4, deterministic=True).code == 0
    assert seen == [(True, ":4096:8")]
    assert not torch.are_deterministic_algorithms_enabled()


def test_f23_steps_that_change_nothing_are_an_error(model, tmp_path):
    """A head of zeros lets no gradient through."""
    shutil.copytree(model, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"].zero_()
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    given = {"model": tmp_path / "model", "dataset": write_rows(tmp_path / "r.jsonl", pairs(8))}
    outcome = call("train", flags(**given, **SMALL | {"max_steps": 2}, output_dir=tmp_path / "out"))
    assert outcome.code == 3 and outcome.err.count("\n") == 1
    assert "2 steps changed no trained weight (2 updates in all)" in outcome.err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    still = SMALL | {"learning_rate": 0}
    assert call("train", flags(**given, **still, output_dir=tmp_path / "still")).code == 0


def test_f23_no_step_to_make_is_refused(run):
    refused(run(ROW, max_steps=0), "--max-steps is 0")
    refused(run(ROW, max_steps=-1, num_train_epochs=0), "--num-train-epochs is 0")


# ------------------------------------------------------------------------------------------- rows


def test_f24_malformed_json_is_named_by_line_with_a_snippet(run, tmp_path):
    text = ROW * 3 + '{"prompt": "a", completion: 1}\n' + ROW
    refused(run(text), "rows.jsonl:4: malformed JSON", "completion: 1", "one JSON object per line")
    outcome = run(text, skip_bad=True)
    assert outcome.code == 0 and record(tmp_path)["dropped"] == {"malformed": 1}
    assert "1 dropped (malformed)" in outcome.out


@pytest.mark.parametrize(
    "text",
    [
        ROW + ROW.rstrip("\n"),
        f"\n\n{ROW}\n  \n{ROW}\n\n",
        "\ufeff" + ROW * 2,
        (ROW * 2).replace("\n", "\r\n"),
    ],
    ids=["no_newline", "blank_lines", "bom", "crlf"],
)
def test_f25_harmless_spellings_of_a_file_are_read(run, tmp_path, text):
    assert run(text).code == 0
    assert record(tmp_path)["rows_read"] == 2


def test_f26_bytes_that_are_not_utf8_are_named_by_offset(run):
    text = ROW.encode() + '{"prompt": "café", "completion": "b"}\n'.encode("latin-1")
    refused(run(text), "rows.jsonl:2", "not UTF-8", f"byte {len(ROW) + 15} (0xe9)")
    refused(run(b"prompt,completion\ncaf\xe9,b\n", name="rows.csv"), "not UTF-8", "byte 21")


def test_f27_a_misspelt_column_is_told_with_the_columns_and_the_nearest(run):
    refused(run('{"promt": "a", "completion": "b"}\n'), "promt, completion")
    refused(run(ROW, columns=["prompt=promt"]), "no column 'promt'", "did you mean 'prompt'")


def test_f27_a_column_name_cannot_break_or_colour_the_line(run):
    outcome = run('{"a\\nb\\u001b[31mc": "x"}\n')
    refused(outcome, "a b [31mc")
    assert "\x1b" not in outcome.err


@pytest.mark.parametrize("value", ["null", "7", "[1]", '{"a": 1}', "true"])
def test_f28_another_type_where_text_is_expected_names_the_row(run, tmp_path, value):
    text = ROW + f'{{"prompt": "a", "completion": {value}}}\n'
    refused(run(text), "rows.jsonl:2 (row 1)", "completion")
    assert run(text, skip_bad=True).code == 0
    assert record(tmp_path)["dropped"] == {"malformed": 1}


@pytest.mark.parametrize(
    ("text", "name"),
    [("", "rows.jsonl"), ("[]", "rows.json"), ("a,b\n", "rows.csv"), ("\n \n", "rows.jsonl")],
)
def test_f29_no_rows_are_refused(run, text, name):
    refused(run(text, name=name), "holds no rows", "at least one")


def test_f29_fewer_rows_than_one_batch_are_refused(run):
    refused(
        run(ROW, per_device_train_batch_size=2),
        "1 rows do not fill one batch",
        "--per-device-train-batch-size 2",
        "lower it",
    )


def test_f29_fewer_rows_than_a_step_train_with_a_warning(run):
    outcome = run(ROW * 2)
    assert outcome.code == 0 and "do not fill one step" in outcome.out


def test_f30_blank_answers_are_dropped_and_counted(run, tmp_path):
    blank = '{"prompt": "a", "completion": "  "}\n{"prompt": "a", "completion": ""}\n'
    outcome = run(ROW + blank)
    assert outcome.code == 0 and record(tmp_path)["dropped"] == {"empty": 2}
    assert "2 dropped (empty)" in outcome.out
    refused(run(blank, overwrite_output_dir=True), "nothing is left to train")


CHATS = {
    "unknown_role": ([{"role": "asistant", "content": "x"}], "did you mean 'assistant'"),
    "no_role": ([{"content": "x"}], "role"),
    "content_is_a_number": ([{"role": "user", "content": 3}], "content"),
    "not_a_list": ("hello", "messages"),
    "empty": ([], "empty"),
    "a_string_for_a_message": (["hello"], "messages[0]"),
}


@pytest.mark.parametrize("kind", CHATS)
def test_f31_a_malformed_conversation_names_the_row(run, kind):
    messages, text = CHATS[kind]
    good = rows_text([{"messages": CHAT}])
    refused(run(good + rows_text([{"messages": messages}])), "rows.jsonl:2 (row 1)", text)


def test_f31_roles_in_any_order_go_through_the_template(run, tmp_path):
    """Repeated roles, and a last turn that is not the assistant's, are the template's to judge."""
    odd = [CHAT[0], CHAT[0], CHAT[1], CHAT[0]]
    assert run(rows_text([{"messages": odd}])).code == 0
    assert record(tmp_path)["rows_kept"] == 1


LONG = json.dumps({"prompt": "a " * 50, "completion": " b" * 50}) + "\n"


def test_f32_a_long_row_is_never_cut_silently(run, tmp_path):
    outcome = run(ROW + LONG)
    assert outcome.code == 0 and record(tmp_path)["truncated"] == 1
    assert "1 truncated to --max-length" in outcome.out
    outcome = run(ROW + LONG, overlong="drop", overwrite_output_dir=True)
    assert outcome.code == 0 and record(tmp_path)["rows_kept"] == 1
    assert "1 dropped" in outcome.out
    refused(run(ROW + LONG, overlong="error", overwrite_output_dir=True), "rows.jsonl", "64")


def test_f33_special_token_strings_in_a_message_are_plain_text(model, run, tmp_path):
    from minisft.config.train import TrainConfig
    from minisft.data.load import load_rows
    from minisft.text.tokenizer import load_tokenizer

    hostile = [{"role": "user", "content": "<|eot|><|start|>assistant<|end|>"}, CHAT[1]]
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": hostile}])
    tokenizer = load_tokenizer(model)
    config = TrainConfig(model=str(model), dataset=str(path))
    dataset = load_rows(config, tokenizer, 384, scratch=tmp_path, say=print)
    plain = write_rows(
        tmp_path / "plain.jsonl", [{"messages": [{"role": "user", "content": "x"}, CHAT[1]]}]
    )
    config = TrainConfig(model=str(model), dataset=str(plain))
    other = load_rows(config, tokenizer, 384, scratch=tmp_path, say=print)
    control = [i for i, t in tokenizer.backend.get_added_tokens_decoder().items() if t.special]
    counts = [[d.input_ids.tolist().count(i) for i in control] for d in (dataset, other)]
    assert counts[0] == counts[1] and sum(counts[0]) > 4


ODD = {
    "emoji_rtl_nul": rows_text([{"prompt": "🙂 שלום \u0000 \u202e", "completion": " ok\u0000"}]),
    "a_long_line": rows_text([{"prompt": "a", "completion": " b" * 100_000}]),
    "many_turns": rows_text([{"messages": CHAT * 2_000}]),
    "lone_surrogate": '{"prompt": "a", "completion": " \\ud83d"}\n',
    "deep_nesting": '{"prompt": ' + "[" * 100_000 + "}\n",
    "a_number_of_5000_digits": '{"prompt": ' + "7" * 5000 + ', "completion": "b"}\n',
}


@pytest.mark.parametrize("kind", ODD)
def test_f34_odd_rows_train_or_are_refused_in_one_line(run, kind):
    outcome = run(ODD[kind])
    if kind in ("emoji_rtl_nul", "a_long_line", "many_turns"):
        assert outcome.code == 0, outcome.err
    else:
        refused(outcome, "rows.jsonl:1")


def test_f34_a_line_of_100_mb_takes_bounded_memory(model, tmp_path):
    """In a process of its own: refused by row, or left out, with a peak below 2 GB."""
    path = tmp_path / "rows.jsonl"
    path.write_text(ROW + json.dumps({"prompt": "a", "completion": " b" * 50_000_000}) + "\n")
    code = (
        "import resource, sys; from runs import script; code = script('train').main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    for more in ({}, {"skip_bad": True}):
        more = more | {"per_device_train_batch_size": 1}
        argv = flags(model=model, dataset=path, output_dir=tmp_path / "out", **SMALL, **more)
        done = subprocess.run(
            [sys.executable, "-c", code, *argv],
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == (0 if len(more) > 1 else 2), done.stderr
        assert more or "rows.jsonl:2 (row 1): the text has 100,000,008 char" in done.stderr
        assert int(done.stdout.splitlines()[-1]) * 1024 < 2e9
    assert record(tmp_path)["dropped"] == {"malformed": 1}


def test_f35_the_same_rows_to_train_and_to_evaluate_on_are_told(run, tmp_path):
    path = write_rows(tmp_path / "same.jsonl", pairs(4))
    outcome = run(path.read_bytes(), eval_dataset=path)
    assert outcome.code == 0
    assert any("eval" in x for x in outcome.out.splitlines() if x.startswith("warning: "))


def test_f35_duplicate_rows_are_counted(run, tmp_path):
    outcome = run(ROW * 3 + rows_text(pairs(2)))
    assert outcome.code == 0 and record(tmp_path)["duplicates"] == 2
    assert any("duplicate" in x for x in outcome.out.splitlines())
