"""Whole runs in process: what they write, in every mode, against what the issue of record lists."""

import json
import math
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from runs import (
    CONFIG,
    call,
    flags,
    metrics,
    pairs,
    read,
    step_lines,
    train,
    tree,
    write_model,
    write_rows,
)
from safetensors.torch import load_file

from minisft import TrainConfig, TrainOutput, llama
from minisft import train as train_api

STEP_FIELDS = [
    "step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "num_loss_tokens",
    "tokens_per_second", "step_time_s", "peak_memory_gib",
]  # fmt: skip
EVAL_FIELDS = [
    "step", "epoch", "eval_loss", "eval_mean_token_accuracy", "eval_entropy",
    "eval_num_loss_tokens", "eval_runtime", "eval_samples_per_second",
]  # fmt: skip
NUMBERS = ("epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "num_loss_tokens")
SMALL = {"lora_r": 4, "max_length": 64, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The flags that name the model and 20 rows, with 6 to evaluate on."""
    directory = tmp_path_factory.mktemp("inputs")
    return {
        "model": write_model(directory / "model"),
        "dataset": write_rows(directory / "train.jsonl", pairs(20)),
        "eval_dataset": write_rows(directory / "eval.jsonl", pairs(6, first=50)),
    }


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tied") / "model", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def plain(inputs, tmp_path_factory):
    """The output directory and the printed lines of two epochs with the defaults' batch sizes."""
    out = tmp_path_factory.mktemp("plain") / "out"
    outcome = train(**inputs, **SMALL, output_dir=out, num_train_epochs=2, save_steps=2)
    return out, outcome


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


# ------------------------------------------------------------------------------------- the files


def test_every_step_has_a_line_with_every_field(plain):
    lines = [m for m in metrics(plain[0]) if "loss" in m]
    assert [list(m) for m in lines] == [STEP_FIELDS] * 6
    assert [m["step"] for m in lines] == [1, 2, 3, 4, 5, 6]
    # 20 rows in batches of 2 are 10 micro-batches; four of them a step: 4, 4 and 2.
    assert [m["epoch"] for m in lines] == [0.4, 0.8, 1.0, 1.4, 1.8, 2.0]
    assert [m["learning_rate"] for m in lines] == pytest.approx(
        [1e-2 * (6 - i) / 6 for i in range(6)]
    )
    assert all(math.isfinite(m[name]) and m[name] > 0 for m in lines for name in STEP_FIELDS)
    tokens = [m["num_tokens"] for m in lines]
    assert tokens == sorted(tokens) and tokens[5] == 2 * tokens[2]
    targets = [m["num_loss_tokens"] for m in lines]
    assert sum(targets[:3]) == sum(targets[3:]) < tokens[2]
    assert lines[5]["loss"] < lines[0]["loss"] - 0.5


def test_eval_lines_stand_before_the_first_step_and_after_the_last(plain):
    lines = [(i, m) for i, m in enumerate(metrics(plain[0])) if "eval_loss" in m]
    assert [i for i, _ in lines] == [0, 7]
    assert [list(m) for _, m in lines] == [EVAL_FIELDS] * 2
    assert [(m["step"], m["epoch"]) for _, m in lines] == [(0, 0.0), (6, 2.0)]
    assert lines[1][1]["eval_loss"] < lines[0][1]["eval_loss"] - 0.5


def test_train_output_sums_up_the_run(plain):
    out, _ = plain
    result = read(out / "train_output.json")
    assert list(result) == ["global_step", "training_loss", "metrics"]
    losses = [loss for _, loss in step_lines(out, "loss")]
    assert result["global_step"] == 6
    assert result["training_loss"] == pytest.approx(sum(losses) / 6, rel=1e-12)
    evals = [m["eval_loss"] for m in metrics(out) if "eval_loss" in m]
    summary = result["metrics"]
    assert [summary["eval_loss_before"], summary["eval_loss"]] == evals
    assert summary["epoch"] == 2.0 and summary["train_loss"] == result["training_loss"]
    assert summary["num_tokens"] == step_lines(out, "num_tokens")[-1][1]
    assert summary["train_runtime"] > 0 and summary["train_steps_per_second"] > 0


def test_run_json_records_settings_versions_and_data(plain, inputs):
    record = read(plain[0] / "run.json")
    assert record["config"]["lora_r"] == 4 and record["config"]["seed"] == 3407
    assert set(record["config"]) == set(TrainConfig.__dataclass_fields__)
    resolved = record["resolved"]
    assert (resolved["device"], resolved["dtype"], resolved["total_steps"]) == ("cpu", "float32", 6)
    assert resolved["model_directory"] == str(inputs["model"])
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["versions"]["python"] and "minisft" in record["versions"]
    assert len(record["data_hash"]) == 64 and record["data"]["rows_kept"] == 20
    assert record["eval_data"]["rows_kept"] == 6 and isinstance(record["command"], list)


def test_the_output_directory_holds_the_adapter_and_its_tokenizer(plain, inputs):
    out, _ = plain
    names = {p.name for p in out.iterdir()}
    assert names == {
        "adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "metrics.jsonl", "run.json",
        "train_output.json", "step0.json", "checkpoint-2", "checkpoint-4", "checkpoint-6", ".lock",
        "Modelfile",
    }  # fmt: skip
    assert (out / "tokenizer.json").read_bytes() == (
        inputs["model"] / "tokenizer.json"
    ).read_bytes()
    card = (out / "README.md").read_text()
    assert f"base_model: {inputs['model']}" in card and "learning_rate" in card
    config = read(out / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(inputs["model"]) and config["r"] == 4
    assert sorted(p.name for p in (out / "checkpoint-6").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "manifest.json",
        "optimizer.safetensors", "trainer_state.json",
    ]  # fmt: skip
    last = load_file(out / "checkpoint-6" / "adapter_model.safetensors")
    final = adapter(out)
    assert last.keys() == final.keys() and all(torch.equal(last[k], final[k]) for k in last)


def test_the_printed_lines_tell_model_data_steps_and_losses(plain, inputs):
    lines = plain[1].out.splitlines()
    assert plain[1].err == ""
    assert lines[0].startswith("model ") and "2 layers, hidden 32" in lines[0]
    assert any(line.startswith("data ") and "20 rows" in line for line in lines)
    assert any(line.startswith("eval ") and "6 rows" in line for line in lines)
    assert any(line.startswith("steps   6 (3 an epoch), 2 x 4 rows") for line in lines)
    assert len([line for line in lines if line.startswith("step ")]) == 6
    first = next(line for line in lines if line.startswith("step 1/6"))
    assert all(word in first for word in ("loss ", "lr 1.00e-02", "tok/s", "peak ", " GiB"))
    out = plain[0]
    assert [line.split(":")[0] for line in lines[-5:]] == (
        ["try it", "chat", "transformers", "vLLM", "merge"]
    )
    commands = [shlex.split(line.split(":", 1)[1]) for line in lines[-5:]]
    assert commands[0][:4] == ["python", "scripts/generate.py", "--adapter", str(out)]
    assert call("generate", commands[0][2:]).code == 0
    exec(compile(commands[2][2], "printed", "exec"), space := {})  # the line for transformers
    assert space["model"].peft_config["default"].r == 4
    assert space["model"].config.quantization_config.bnb_4bit_use_double_quant is True
    assert commands[3] == [
        *("vllm", "serve", str(inputs["model"]), "--quantization", "bitsandbytes"),
        *("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"out={out}"),
    ]
    merged = out.parent / "m"
    assert call("merge", [*commands[4][2:-1], str(merged)]).code == 0
    assert commands[4][-1] == f"{out}-merged" and (merged / "Modelfile").exists()
    assert any(line.startswith("memory  ") and "before training" in line for line in lines)
    assert any(line.startswith("time    ") and "tokens/s" in line for line in lines)


def test_names_with_spaces_are_quoted_and_a_relative_base_is_stored_whole(
    inputs, tmp_path, monkeypatch
):
    (tmp_path / "my model").symlink_to(inputs["model"])
    monkeypatch.chdir(tmp_path)
    given = inputs | {"model": "my model", "output_dir": "my out"}
    outcome = train(**given, **SMALL, max_steps=1)
    config = read(tmp_path / "my out" / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(inputs["model"].resolve())
    assert "--adapter 'my out' --prompt" in outcome.out
    monkeypatch.chdir("/")
    answer = call("generate", ["--adapter", str(tmp_path / "my out"), "--prompt", "a"])
    assert answer.code == 0, answer.err


def test_one_kind_of_run_leaves_nothing_of_the_other(inputs, tmp_path):
    """--overwrite-output-dir after full fine-tuning: no config.json next to the adapter."""
    train(**inputs, max_length=64, full_finetuning=True, output_dir=tmp_path, max_steps=1)
    assert (tmp_path / "config.json").exists()
    train(**inputs, **SMALL, output_dir=tmp_path, max_steps=1, overwrite_output_dir=True)
    assert not (tmp_path / "config.json").exists() and (tmp_path / "README.md").exists()
    given = inputs | {"max_length": 64, "full_finetuning": True}
    train(**given, output_dir=tmp_path, max_steps=1, overwrite_output_dir=True)
    assert (tmp_path / "config.json").exists() and not (tmp_path / "README.md").exists()


def test_the_function_returns_what_the_file_says(inputs, tmp_path, capsys):
    config = TrainConfig(
        **{k: str(v) for k, v in inputs.items()}, output_dir=str(tmp_path), max_steps=1
    )
    result = train_api(config)
    assert isinstance(result, TrainOutput)
    assert result._asdict() == read(tmp_path / "train_output.json")


# ---------------------------------------------------------------------- steps, logging, checkpoints


def test_the_same_flags_give_the_same_run(plain, inputs, tmp_path):
    train(**inputs, **SMALL, output_dir=tmp_path, num_train_epochs=2)
    assert step_lines(tmp_path, *NUMBERS) == step_lines(plain[0], *NUMBERS)
    name = "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (plain[0] / name).read_bytes()


def test_another_seed_gives_another_run(plain, inputs, tmp_path):
    train(**inputs, **SMALL, output_dir=tmp_path, max_steps=1, seed=1)
    assert step_lines(tmp_path, "loss")[0] != step_lines(plain[0], "loss")[0]


@pytest.mark.parametrize(
    ("changes", "steps", "epoch"),
    [
        ({"max_steps": 2, "num_train_epochs": 5}, 2, 0.8),
        ({"num_train_epochs": 1}, 3, 1.0),
        ({"num_train_epochs": 0.5}, 2, 0.8),
        ({"max_steps": 4}, 4, 1.4),
        ({"gradient_accumulation_steps": 1, "num_train_epochs": 0.3}, 3, 0.3),
    ],
)
def test_max_steps_wins_over_epochs(inputs, tmp_path, changes, steps, epoch):
    train(**inputs, **SMALL, **changes, output_dir=tmp_path)
    assert [m[0] for m in step_lines(tmp_path)] == list(range(1, steps + 1))
    assert step_lines(tmp_path, "epoch")[-1][1] == pytest.approx(epoch)


def test_logging_every_three_steps_means_over_them(plain, inputs, tmp_path):
    train(**inputs, **SMALL, output_dir=tmp_path, max_steps=5, logging_steps=3)
    whole = {m["step"]: m for m in metrics(plain[0]) if "loss" in m}
    # The schedule of 5 steps is not that of 6, so only the first step's numbers are comparable.
    one = tmp_path / "one"
    train(**inputs, **SMALL, output_dir=one, max_steps=5)
    single = [m for m in metrics(one) if "loss" in m]
    lines = [m for m in metrics(tmp_path) if "loss" in m]
    assert [m["step"] for m in lines] == [3, 5]
    for line, window in zip(lines, (single[:3], single[3:]), strict=True):
        assert list(line) == STEP_FIELDS
        assert line["loss"] == pytest.approx(sum(m["loss"] for m in window) / len(window))
        assert line["num_loss_tokens"] == sum(m["num_loss_tokens"] for m in window)
        for name in ("epoch", "grad_norm", "learning_rate", "num_tokens"):
            assert line[name] == window[-1][name]
    assert single[0]["loss"] == whole[1]["loss"]


def test_every_learning_rate_that_the_optimizer_used_is_logged(plain, inputs, tmp_path):
    """Red when learning_rate_lora_B is logged without its ratio, or where there is no such rate."""
    more = {"modules_to_save": "lm_head", "embedding_learning_rate": 1e-4, "loraplus_lr_ratio": 16}
    train(**inputs, **SMALL, **more, output_dir=tmp_path, max_steps=2)
    names = ("learning_rate", "learning_rate_embeddings", "learning_rate_lora_B")
    assert step_lines(tmp_path, *names) == [(1, 1e-2, 1e-4, 0.16), (2, 5e-3, 5e-5, 0.08)]
    assert not [name for line in metrics(plain[0]) for name in line if "learning_rate_" in name]


def test_old_checkpoints_are_rotated_away(inputs, tmp_path):
    train(**inputs, **SMALL, output_dir=tmp_path, max_steps=11, save_steps=2, save_total_limit=3)
    kept = {p.name for p in tmp_path.glob("*checkpoint*")}
    assert kept == {"checkpoint-8", "checkpoint-10", "checkpoint-11"}


def test_evaluation_at_steps_and_epochs(inputs, tmp_path):
    by_step = {"eval_strategy": "steps", "eval_steps": 2}
    train(**inputs, **SMALL, **by_step, output_dir=tmp_path / "a", max_steps=5)
    assert [m["step"] for m in metrics(tmp_path / "a") if "eval_loss" in m] == [0, 2, 4, 5]
    train(**inputs, **SMALL, eval_strategy="epoch", output_dir=tmp_path / "b", num_train_epochs=2)
    assert [m["step"] for m in metrics(tmp_path / "b") if "eval_loss" in m] == [0, 3, 6]


def test_without_eval_rows_nothing_is_evaluated(inputs, tmp_path):
    given = {k: v for k, v in inputs.items() if k != "eval_dataset"}
    train(**given, **SMALL, output_dir=tmp_path, max_steps=1)
    assert [list(m) for m in metrics(tmp_path)] == [STEP_FIELDS]
    assert "eval_loss" not in read(tmp_path / "train_output.json")["metrics"]


def test_a_loss_that_is_not_finite_stops_the_run(inputs, tmp_path):
    shutil.copytree(inputs["model"], tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] = float("nan")
    from safetensors.torch import save_file

    save_file(weights, path)
    given = inputs | {"model": tmp_path / "model"}
    outcome = call("train", flags(**given, **SMALL, output_dir=tmp_path / "out", max_steps=3))
    assert outcome.code == 3 and outcome.err.count("\n") == 1
    assert "step 1" in outcome.err and "loss is nan" in outcome.err and "Rows" in outcome.err
    assert not (tmp_path / "out" / "train_output.json").exists()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


# ------------------------------------------------------------------------------------------- rows


def chat(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


ROWS = {
    "text": [{"text": r["prompt"] + r["completion"]} for r in pairs(8)],
    "prompt-completion": pairs(8),
    "messages": [{"messages": chat(r["prompt"], r["completion"])} for r in pairs(8)],
    "input_ids": [{"input_ids": list(range(5, 15 + i)), "labels": None} for i in range(8)],
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("packing", [False, True])
def test_every_kind_of_row_trains(inputs, tmp_path, kind, packing):
    given = inputs | {"dataset": write_rows(tmp_path / "rows.jsonl", ROWS[kind])}
    del given["eval_dataset"]
    train(**given, **SMALL, output_dir=tmp_path / "out", max_steps=4, packing=packing)
    record = read(tmp_path / "out" / "run.json")["data"]
    assert record["format"] == kind and record["rows_read"] == 8
    assert bool(record["packing_efficiency"]) == packing
    losses = [loss for _, loss in step_lines(tmp_path / "out", "loss")]
    assert losses[-1] < losses[0]


def test_chat_and_prompt_rows_of_the_same_text_are_trained_on_other_tokens(inputs, tmp_path):
    """The loss is on the completion alone, or on the whole text."""
    counts = {}
    for kind in ("text", "prompt-completion"):
        given = inputs | {"dataset": write_rows(tmp_path / f"{kind}.jsonl", ROWS[kind])}
        train(**given, **SMALL, output_dir=tmp_path / kind, max_steps=1)
        counts[kind] = step_lines(tmp_path / kind, "num_tokens", "num_loss_tokens")[0][1:]
    assert counts["text"][0] == counts["prompt-completion"][0]
    assert counts["text"][1] == counts["text"][0] - 8  # all but the first token of each row
    assert counts["prompt-completion"][1] < counts["text"][1]


def test_packing_changes_the_rows_of_a_step_but_not_the_tokens_of_an_epoch(inputs, tmp_path):
    train(**inputs, **SMALL, output_dir=tmp_path / "rows", num_train_epochs=1)
    train(**inputs, **SMALL, output_dir=tmp_path / "packed", num_train_epochs=1, packing=True)
    rows, packed = (metrics(tmp_path / name) for name in ("rows", "packed"))
    assert packed[-2]["num_tokens"] == rows[-2]["num_tokens"]
    assert sum(m["num_loss_tokens"] for m in packed if "loss" in m) == (
        sum(m["num_loss_tokens"] for m in rows if "loss" in m)
    )
    assert len(packed) < len(rows)
    assert packed[0]["eval_loss"] == rows[0]["eval_loss"]


def test_columns_are_renamed(inputs, tmp_path):
    rows = [{"question": r["prompt"], "answer": r["completion"]} for r in pairs(20)]
    renamed = inputs | {"dataset": write_rows(tmp_path / "rows.jsonl", rows)}
    del renamed["eval_dataset"]
    columns = ["prompt=question", "completion=answer"]
    train(**renamed, **SMALL, output_dir=tmp_path / "a", max_steps=1, columns=columns)
    train(**inputs, **SMALL, output_dir=tmp_path / "b", max_steps=1)
    assert step_lines(tmp_path / "a", *NUMBERS) == step_lines(tmp_path / "b", *NUMBERS)
    hashes = [read(tmp_path / name / "run.json")["data_hash"] for name in ("a", "b")]
    assert hashes[0] == hashes[1]


def test_long_rows_are_truncated_and_counted(inputs, tmp_path):
    outcome = train(**inputs, **SMALL | {"max_length": 24}, output_dir=tmp_path, max_steps=1)
    record = read(tmp_path / "run.json")["data"]
    assert record["truncated"] > 0 and record["longest"] > 24
    assert f"{record['truncated']} truncated to --max-length" in outcome.out


# -------------------------------------------------------------------------------- what is trained

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PREFIX = "base_model.model."


def test_lora_starts_at_zero_and_trains_every_linear(plain):
    tensors = adapter(plain[0])
    modules = {f"self_attn.{n}" for n in LINEARS[:4]} | {f"mlp.{n}" for n in LINEARS[4:]}
    assert set(tensors) == {
        f"{PREFIX}model.layers.{i}.{m}.lora_{ab}.weight"
        for i in range(2)
        for m in modules
        for ab in "AB"
    }
    assert all(t.dtype == torch.float32 and t.abs().sum() > 0 for t in tensors.values())
    first = step_lines(plain[0], "loss")[0][1]
    evals = [m["eval_loss"] for m in metrics(plain[0]) if "eval_loss" in m]
    assert abs(first - evals[0]) < 0.5  # both are the base model's


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["all-linear"], set(LINEARS)),
        ([r"re:.*\.1\.(self_attn\.q_proj|mlp\.up_proj)"], {"q_proj", "up_proj"}),
    ],
)
def test_targets(inputs, tmp_path, targets, wanted):
    train(**inputs, **SMALL, output_dir=tmp_path, max_steps=2, target_modules=targets)
    keys = set(adapter(tmp_path))
    assert {key.split(".")[-3] for key in keys} == wanted
    layers = {key.split(".")[4] for key in keys}
    assert layers == ({"1"} if targets[0].startswith("re:") else {"0", "1"})
    saved = read(tmp_path / "adapter_config.json")["target_modules"]
    assert saved == (targets[0][3:] if targets[0].startswith("re:") else saved)


def test_rslora_scales_by_the_root_of_the_rank(inputs, tmp_path):
    """alpha / sqrt(r) = 8 / 2 is the plain scale of alpha 16 and r 4."""
    train(**inputs, **SMALL, output_dir=tmp_path / "rs", max_steps=3, use_rslora=True, lora_alpha=8)
    train(**inputs, **SMALL, output_dir=tmp_path / "plain", max_steps=3, lora_alpha=16)
    assert step_lines(tmp_path / "rs", *NUMBERS) == step_lines(tmp_path / "plain", *NUMBERS)
    assert read(tmp_path / "rs" / "adapter_config.json")["use_rslora"] is True


@pytest.mark.parametrize("how", ["modules_to_save", "target_modules"])
def test_trained_copies_of_an_untied_model(inputs, tmp_path, how):
    given = {"modules_to_save": ["embed_tokens", "lm_head"]}
    if how == "target_modules":
        given = {"target_modules": [*LINEARS, "embed_tokens", "lm_head"]}
    outcome = train(**inputs, **SMALL, **given, output_dir=tmp_path, max_steps=2)
    base = load_file(inputs["model"] / "model.safetensors")
    tensors = adapter(tmp_path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert tensors[PREFIX + name].shape == base[name].shape
        assert not torch.equal(tensors[PREFIX + name], base[name])
    config = read(tmp_path / "adapter_config.json")
    assert config["modules_to_save"] == ["embed_tokens", "lm_head"]
    assert sorted(config["target_modules"]) == sorted(LINEARS)
    assert "fully trained copies, stored with the adapter: embed_tokens, lm_head" in outcome.out


@pytest.mark.parametrize("how", ["untied", "tied", "full"])
def test_a_small_embedding_rate_moves_every_entry_that_got_a_gradient(inputs, tied, tmp_path, how):
    """20 steps at 1e-5 in bfloat16: lost in 16-bit weights, kept in the float32 ones."""
    given = inputs | ({"model": tied} if how == "tied" else {})
    settings = {"max_length": 64, "learning_rate": 1e-4, "max_steps": 20, "dtype": "bfloat16"}
    settings |= {"embedding_learning_rate": 1e-5}
    saved = {"lora_r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}
    settings |= {"full_finetuning": True} if how == "full" else saved
    train(**given, **settings, output_dir=tmp_path)
    place, prefix = tmp_path / "checkpoint-20", "" if how == "full" else "base_model.model."
    file = "model.safetensors" if how == "full" else "adapter_model.safetensors"
    before, after = load_file(given["model"] / "model.safetensors"), load_file(place / file)
    moments = load_file(place / "optimizer.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight")[: 1 if how == "tied" else 2]:
        new, old = after[prefix + name], before[name]
        got_one = moments[f"exp_avg_sq.{name}"] > 0
        assert got_one.sum() > 1000 and (new != old)[got_one].float().mean() > 0.99, name
        rounded = new.bfloat16() != old.bfloat16()
        assert rounded[got_one].float().mean() < 0.9, name  # what 16-bit weights would show
        assert (new - old).abs().max() < 1e-5 * 20.5


@pytest.mark.parametrize("asked", ["embed_tokens", "lm_head"])
def test_a_tied_model_has_one_trained_copy(inputs, tied, tmp_path, asked):
    given = inputs | {"model": tied}
    train(**given, **SMALL, output_dir=tmp_path, max_steps=2, modules_to_save=asked)
    tensors = adapter(tmp_path)
    embedding, head = (tensors[f"{PREFIX}{n}.weight"] for n in ("model.embed_tokens", "lm_head"))
    assert torch.equal(embedding, head)
    assert not torch.equal(
        embedding, load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    )
    assert read(tmp_path / "adapter_config.json")["ensure_weight_tying"] is True


def test_only_the_trained_tensors_move(inputs, tmp_path):
    """The base directory is untouched, and an adapter of zero learning rate is the initial one."""
    before = (inputs["model"] / "model.safetensors").read_bytes()
    still = SMALL | {"learning_rate": 0}
    train(**inputs, **still, output_dir=tmp_path, max_steps=2)
    assert (inputs["model"] / "model.safetensors").read_bytes() == before
    assert all((t == 0).all() for k, t in adapter(tmp_path).items() if "lora_B" in k)
    evals = [m["eval_loss"] for m in metrics(tmp_path) if "eval_loss" in m]
    assert evals[0] == evals[1]


@pytest.mark.parametrize("is_tied", [False, True])
def test_full_finetuning_exports_what_transformers_loads(inputs, tied, tmp_path, is_tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from minisft.files.weights import load_model_config
    from minisft.llama import Compute, logits, make_tokens

    given = inputs | ({"model": tied} if is_tied else {})
    settings = {"max_length": 64, "learning_rate": 1e-3, "full_finetuning": True}
    outcome = train(**given, **settings, output_dir=tmp_path, max_steps=3)
    assert f"python scripts/generate.py --model {tmp_path}" in outcome.out
    base, tuned = (load_file(d / "model.safetensors") for d in (given["model"], tmp_path))
    assert base.keys() == tuned.keys() and ("lm_head.weight" in tuned) != is_tied
    assert not any(torch.equal(base[k], tuned[k]) for k in base)
    losses = [loss for _, loss in step_lines(tmp_path, "loss")]
    assert losses[-1] < losses[0]

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = [3, 77, 140, 9, 250]
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0]
    cfg = load_model_config(tmp_path)
    ours = logits({}, tuned, make_tokens([ids]), Compute(cfg))
    assert torch.equal(ours, theirs)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("The answer is 4.")["input_ids"][:1] == [0] and tokenizer.chat_template
    assert read(tmp_path / "config.json")["vocab_size"] == CONFIG["vocab_size"]


# ------------------------------------------------------------------------------ precision, memory


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_cpu_follows_float32(plain, inputs, tmp_path, dtype):
    train(**inputs, **SMALL, output_dir=tmp_path, num_train_epochs=2, dtype=dtype)
    assert read(tmp_path / "run.json")["resolved"]["dtype"] == dtype
    ours, theirs = (dict(step_lines(d, "loss")) for d in (tmp_path, plain[0]))
    assert all(abs(ours[k] - theirs[k]) < 0.03 for k in theirs), (ours, theirs)
    assert ours != theirs
    assert all(t.dtype == torch.float32 for t in adapter(tmp_path).values())
    scale = read(tmp_path / "checkpoint-6" / "trainer_state.json")["loss_scale"]
    assert scale == (65536.0 if dtype == "float16" else 1.0)


@pytest.mark.parametrize(
    "more", [{"lora_dropout": 0.1}, {"packing": True}, {"full_finetuning": True}]
)
def test_checkpointed_blocks_give_identical_numbers(inputs, tmp_path, monkeypatch, more):
    settings = {k: v for k, v in inputs.items() if k != "eval_dataset"} | SMALL | more
    if "full_finetuning" in more:
        del settings["lora_r"]
    calls, real = {"none": 0, "block": 0}, llama.block
    for kind in calls:

        def counted(*args, kind=kind):
            calls[kind] += 1
            return real(*args)

        monkeypatch.setattr(llama, "block", counted)
        train(**settings, max_steps=3, output_dir=tmp_path / kind, gradient_checkpointing=kind)
    assert calls["block"] == 2 * calls["none"] > 0  # each is computed again in the backward pass
    none, block = (tmp_path / kind for kind in ("none", "block"))
    assert step_lines(block, *NUMBERS) == step_lines(none, *NUMBERS)
    name = "model.safetensors" if "full_finetuning" in more else "adapter_model.safetensors"
    assert (block / name).read_bytes() == (none / name).read_bytes()


@pytest.mark.parametrize("more", [{"packing": True}, {"load_in_4bit": True}, {"warmup_steps": 2}])
def test_the_explicit_pass_gives_autograd_s_run(inputs, tmp_path, more):
    settings = inputs | SMALL | more
    for impl in ("autograd", "explicit"):
        train(**settings, max_steps=4, output_dir=tmp_path / impl, step_impl=impl)
    ours, theirs = (
        step_lines(tmp_path / impl, "loss", "grad_norm") for impl in ("explicit", "autograd")
    )
    assert ours == [pytest.approx(numbers, rel=1e-4) for numbers in theirs]
    name = "adapter_model.safetensors"
    assert (tmp_path / "explicit" / name).read_bytes() != b""


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"step_impl": "explicit", "lora_dropout": 0.1}, "does not cover LoRA dropout"),
        ({"gradient_checkpointing": "offload"}, "needs the explicit pass"),
        ({"gradient_checkpointing": "all"}, "expected one of auto"),
        ({"step_impl": "fast"}, "expected one of auto, explicit, autograd"),
    ],
)
def test_a_pass_that_cannot_be_had_is_refused(inputs, tmp_path, settings, message):
    with pytest.raises(AssertionError, match=message):  # what the command line printed
        train(**inputs, **SMALL, max_steps=1, output_dir=tmp_path, **settings)


def test_dropout_is_drawn_and_not_in_evaluation(plain, inputs, tmp_path):
    train(**inputs, **SMALL, output_dir=tmp_path, num_train_epochs=2, lora_dropout=0.5)
    ours, theirs = step_lines(tmp_path, "loss"), step_lines(plain[0], "loss")
    assert ours[0] == theirs[0]  # B is zero: the first loss does not see it
    assert ours[1:] != theirs[1:]
    first = [[metrics(out)[0][name] for name in EVAL_FIELDS[:6]] for out in (tmp_path, plain[0])]
    assert first[0] == first[1]


def test_eval_generate_counts_right_answers(inputs, tmp_path):
    out = tmp_path / "out"
    train(**inputs, **SMALL, output_dir=out, max_steps=1, eval_generate=4)
    summary = read(out / "train_output.json")["metrics"]
    assert (summary["answers"], summary["right_before"]) == (4, 0) and summary["right_after"] == 0
    expected = [r["completion"].strip() for r in pairs(4, first=50)]
    assert [s["expected"] for s in summary["samples"]] == expected
    assert list(summary["samples"][0]) == ["prompt", "expected", "before", "after"]


def test_sharded_and_renamed_checkpoints_train_alike(plain, inputs, tmp_path):
    """The same weights in two shards give the same numbers."""
    from minisft.files.export import save_shards

    model = tmp_path / "model"
    shutil.copytree(inputs["model"], model)
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_shards(model, weights.items(), torch.float32, max_bytes=60_000)
    assert len(list(model.glob("model-*.safetensors"))) > 1
    given = inputs | {"model": model}
    train(**given, **SMALL, output_dir=tmp_path / "out", num_train_epochs=2)
    assert step_lines(tmp_path / "out", *NUMBERS) == step_lines(plain[0], *NUMBERS)


def test_lines_of_metrics_are_json_on_their_own(plain):
    for line in (plain[0] / "metrics.jsonl").read_text().splitlines():
        assert isinstance(json.loads(line), dict)


def test_a_dry_run_of_a_resumed_run_changes_nothing(inputs, tmp_path):
    """From an older checkpoint, which would set the newer one aside, and of a complete run."""
    given = {
        "model": inputs["model"],
        "dataset": inputs["dataset"],
        **SMALL,
        "output_dir": tmp_path,
    }
    train(**given, max_steps=2, save_steps=1)
    before = tree(tmp_path)
    older = {"resume_from_checkpoint": tmp_path / "checkpoint-1", "dry_run": True}
    told = train(**given, **older, max_steps=3).out
    assert f"resuming from {tmp_path / 'checkpoint-1'} at step 1" in told and "dry run: " in told
    told = train(**given, resume_from_checkpoint="auto", max_steps=2, dry_run=True).out
    assert "complete already (2 steps); nothing to do" in told
    assert tree(tmp_path) == before


# ---------------------------------------------------------------------- settings without effect

IDLE = {
    "micro_batch_tokens": (512, {}, "this is autograd, keeping all activations"),
    "max_memory_gib": (1.5, {"gradient_checkpointing": "full"}, "this is autograd"),
    "adam_beta1": (0.8, {"optim": "sgd"}, "--optim sgd has none"),
    "adam_beta2": (0.9, {"optim": "adafactor"}, "--optim adafactor has none"),
    "adam_epsilon": (1e-6, {"optim": "lion_8bit"}, "--optim lion_8bit has none"),
    "embedding_learning_rate": (1e-5, {"target_modules": "q_proj"}, "no embedding"),
    "num_train_epochs": (2.0, {"max_steps": 1}, "--max-steps 1 is given"),
    "save_total_limit": (3, {"save_strategy": "no"}, "--save-strategy no"),
    "dataset_text_field": ("body", {}, "no rows are of the format text"),
}


@pytest.mark.parametrize("name", IDLE)
def test_a_setting_without_effect_gives_a_warning(name, inputs, tmp_path):
    value, more, why = IDLE[name]
    given = {**inputs, **SMALL, **more, "dry_run": True, "output_dir": tmp_path, "device": "cpu"}
    told = [li for li in train(**given, **{name: value}).out.splitlines() if "no effect" in li]
    assert len(told) == 1 and why in told[0]
    assert told[0].startswith(f"warning: --{name.replace('_', '-')} {value} has no effect: ")
    assert "no effect" not in train(**given).out


def test_a_setting_with_effect_gives_none(inputs, tmp_path):
    given = {**inputs, **SMALL, "dry_run": True, "output_dir": tmp_path, "adam_beta1": 0.8}
    given |= {"optim": "lion_8bit", "embedding_learning_rate": 1e-5, "modules_to_save": "lm_head"}
    given |= {"num_train_epochs": 2, "save_total_limit": 3}
    assert "no effect" not in train(**given).out


@pytest.mark.parametrize("positions, told", [(64, False), (20, True)])
def test_documents_beyond_the_model_s_positions_are_said(inputs, tmp_path, positions, told):
    place = shutil.copytree(inputs["model"], tmp_path / "model")
    config = read(place / "config.json") | {"max_position_embeddings": positions}
    (place / "config.json").write_text(json.dumps(config))
    settings = inputs | {
        "model": place,
        "max_length": 64,
        "max_steps": 1,
        "output_dir": tmp_path / "o",
    }
    assert ("max_position_embeddings" in call("train", flags(**settings, dry_run=True)).out) == told
