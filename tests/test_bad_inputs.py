"""What a user can get wrong: exit code 2 and one line that names the culprit and the remedy."""

import errno
import fcntl
import json
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from runs import call, flags, metrics, pairs, read, train, tree, write_model, write_rows
from safetensors.torch import load_file, save_file


class Place(NamedTuple):
    """A scratch directory with a good model and good rows, to be spoilt."""

    directory: Path
    model: Path
    rows: Path
    out: Path

    def argv(self, **changes):
        """Flags of a small run; None removes one."""
        given = {
            "model": self.model, "dataset": self.rows, "output_dir": self.out, "lora_r": 2,
            "max_steps": 1, "max_length": 64,
        }  # fmt: skip
        return flags(**{k: v for k, v in (given | changes).items() if v is not None})

    def edit_config(self, **changes):
        path = self.model / "config.json"
        path.write_text(json.dumps({k: v for k, v in (read(path) | changes).items()}))
        return self.argv()

    def edit_weights(self, change):
        path = self.model / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path)
        return self.argv()

    def shard(self, names):
        """Replace the single file by an index that puts the tensors into these files in turn."""
        path = self.model / "model.safetensors"
        keys = sorted(load_file(path))
        path.unlink()
        weight_map = {key: names[i % len(names)] for i, key in enumerate(keys)}
        index = {"metadata": {}, "weight_map": weight_map}
        (self.model / "model.safetensors.index.json").write_text(json.dumps(index))
        return self.argv()

    def text(self, content, name="bad.jsonl", **changes):
        """Rows as literal text."""
        path = self.directory / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return self.argv(dataset=path, **changes)

    def yaml(self, content):
        path = self.directory / "run.yaml"
        path.write_text(content)
        return [*self.argv(), "--config", str(path)]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("original")
    write_model(directory / "model")
    write_rows(directory / "rows.jsonl", pairs(4))
    return directory


@pytest.fixture
def place(original, tmp_path):
    shutil.copytree(original, tmp_path / "place")
    directory = tmp_path / "place"
    return Place(directory, directory / "model", directory / "rows.jsonl", tmp_path / "out")


def truncated(place):
    path = place.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return place.argv()


def not_safetensors(place):
    (place.model / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    return place.argv()


def pickle_only(place):
    (place.model / "model.safetensors").unlink()
    torch.save({}, place.model / "pytorch_model.bin")
    return place.argv()


def without(name):
    def remove(place):
        (place.model / name).unlink()
        return place.argv()

    return remove


def spoilt(name, content):
    def write(place):
        (place.model / name).write_text(content)
        return place.argv()

    return write


def small_embedding(place):
    """The tokenizer has ids that the embedding lacks."""
    write_model(place.model, vocab_size=200)
    return place.argv()


def file_as_output(place):
    (place.directory / "file").write_text("")
    return place.argv(output_dir=place.directory / "file" / "out")


def model_as_output(place):
    return place.argv(output_dir=place.model, overwrite_output_dir=True)


def others_files_as_output(place):
    shutil.copytree(place.model, place.out)
    return place.argv(overwrite_output_dir=True)


def run_as_output(place):
    train_at(place)
    return place.argv()


def resumed(steps=1, damage=False, **changes):
    """Go on from the checkpoint of a run of so many steps, damaged, or under other settings."""

    def make(place):
        assert call("train", place.argv(max_steps=steps)).code == 0
        if damage:
            (place.out / "checkpoint-1" / "optimizer.safetensors").write_bytes(b"")
        return place.argv(**{"max_steps": 2, "resume_from_checkpoint": "auto"} | changes)

    return make


def other_rows(place):
    argv = resumed()(place)
    write_rows(place.rows, pairs(6))
    return argv


def kept_evaluation_damaged(place):
    given = {"eval_dataset": place.rows}
    assert call("train", place.argv(**given)).code == 0
    (place.out / "step0.json").write_text("[]")
    return place.argv(**given, max_steps=2, resume_from_checkpoint="auto")


def texts_to_answer(place):
    rows = write_rows(place.directory / "texts.jsonl", [{"text": "a b c"}])
    return place.argv(eval_dataset=rows, eval_generate=1)


def train_at(place):
    assert call("train", place.argv()).code == 0


def wrong_shape(weights):
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(40, 32)


def missing_tensor(weights):
    del weights["model.layers.1.self_attn.k_proj.weight"]


def surplus_tensor(weights):
    weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(48, 32)


def integers(weights):
    weights["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)


ROW = '{"prompt": "a", "completion": "b"}\n'
LONG = json.dumps({"prompt": "a " * 100, "completion": "b"}) + "\n"
# How the input is spoilt (-> argv), what the line must name, and the remedy it must give.
CASES = {
    # --- rows
    "no_such_dataset": (
        lambda p: p.argv(dataset=p.directory / "missing.jsonl"),
        ["missing.jsonl", "no such file"],
        "check the path",
    ),
    "malformed_json": (
        lambda p: p.text(ROW * 2 + '{"prompt": "a", completion: "b"}\n' + ROW),
        ["bad.jsonl:3", "malformed JSON"],
        "one JSON object per line",
    ),
    "not_an_object": (
        lambda p: p.text(ROW + "[1, 2]\n"),
        ["bad.jsonl:2", "list"],
        "expected a JSON object",
    ),
    "not_utf8": (
        lambda p: p.text(ROW.encode() + b'{"prompt": "\xff"}'),
        ["bad.jsonl:2", "byte 47"],
        "convert it to UTF-8",
    ),
    "missing_columns": (
        lambda p: p.text('{"question": "a", "answer": "b"}\n'),
        ["bad.jsonl", "question, answer"],
        "--columns prompt=question completion=answer",
    ),
    "misspelt_column": (
        lambda p: p.argv(columns=["prompt=promt"]),
        ["rows.jsonl", "no column 'promt'"],
        "did you mean 'prompt'",
    ),
    "unknown_column_name": (
        lambda p: p.argv(columns=["promt=prompt"]),
        ["--columns promt=prompt"],
        "did you mean prompt?",
    ),
    "malformed_columns": (
        lambda p: p.argv(columns=["prompt"]),
        ["--columns", "'prompt'"],
        "expected NAME=COLUMN",
    ),
    "missing_column_in_a_row": (
        lambda p: p.text(ROW + '{"prompt": "a"}\n'),
        ["bad.jsonl:2 (row 1)", "'completion' is missing"],
        "it has prompt",
    ),
    "wrong_type_in_a_row": (
        lambda p: p.text(ROW + '{"prompt": "a", "completion": 7}\n'),
        ["bad.jsonl:2 (row 1)", "completion is a number (7)"],
        "expected two strings",
    ),
    "unknown_role": (
        lambda p: p.text('{"messages": [{"role": "asistant", "content": "b"}]}\n'),
        ["bad.jsonl:1 (row 0)", "messages[0] has role 'asistant'"],
        "did you mean 'assistant'",
    ),
    "empty_file": (lambda p: p.text(""), ["bad.jsonl", "no rows"], "give a file with at least one"),
    "unknown_extension": (
        lambda p: p.text(ROW, name="bad.txt"),
        ["bad.txt", "'.txt'"],
        ".jsonl, .json, .csv, .parquet",
    ),
    "directory_as_dataset": (
        lambda p: p.argv(dataset=p.directory),
        ["is a directory"],
        ".jsonl, .json, .csv, .parquet",
    ),
    "ragged_csv": (
        lambda p: p.text("prompt,completion\na,b\nc,d,e\n", name="bad.csv"),
        ["bad.csv:3", "3 fields"],
        "quote fields",
    ),
    "not_parquet": (
        lambda p: p.text(ROW, name="bad.parquet"),
        ["bad.parquet", "not a readable parquet file"],
        "write it again",
    ),
    "nothing_to_train": (
        lambda p: p.text(LONG * 2, max_length=16),
        ["bad.jsonl", "nothing is left to train", "2 rows read", "--max-length is 16"],
        "raise --max-length",
    ),
    "id_beyond_the_vocabulary": (
        small_embedding,
        ["rows.jsonl", "does not exist in the model", "200 rows"],
        "use the model's own tokenizer",
    ),
    "id_in_a_row_beyond_the_vocabulary": (
        lambda p: p.text('{"input_ids": [1, 2, 999]}\n'),
        ["bad.jsonl", "token id 999"],
        "use the model's own tokenizer",
    ),
    "bad_eval_rows": (
        lambda p: [
            *p.argv(),
            *flags(eval_dataset=write_rows(p.directory / "eval.jsonl", [{"prompt": "a"}])),
        ],
        ["eval.jsonl", "found columns prompt"],
        "--dataset-text-field",
    ),
    # --- model
    "no_such_model": (
        lambda p: p.argv(model=p.directory / "nowhere"),
        ["--model", "nowhere' does not exist"],
        "expected a directory",
    ),
    "unknown_hub_model": (
        lambda p: p.argv(model="nobody/nothing"),
        ["--model 'nobody/nothing'"],
        "local directory",
    ),
    "wrong_shape": (
        lambda p: p.edit_weights(wrong_shape),
        ["model.layers.1.mlp.up_proj.weight", "(40, 32)", "(48, 32)"],
        "another model's config.json?",
    ),
    "missing_tensor": (
        lambda p: p.edit_weights(missing_tensor),
        ["model.layers.1.self_attn.k_proj.weight is missing"],
        "another model's config.json?",
    ),
    "surplus_tensor": (
        lambda p: p.edit_weights(surplus_tensor),
        ["model.layers.2.mlp.up_proj.weight"],
        "another model's config.json?",
    ),
    "integer_weights": (
        lambda p: p.edit_weights(integers),
        ["model.norm.weight", "int8"],
        "unquantised",
    ),
    "truncated_safetensors": (
        truncated,
        ["model.safetensors", "truncated"],
        "copy or download it again",
    ),
    "not_safetensors": (
        not_safetensors,
        ["model.safetensors", "not safetensors"],
        "copy or download it again",
    ),
    "missing_shard": (
        lambda p: p.shard(["model-00001-of-00002.safetensors"]),
        ["model.safetensors.index.json", "model-00001-of-00002.safetensors is missing"],
        "download it again",
    ),
    "index_that_points_outside": (
        lambda p: p.shard(["../model.safetensors"]),
        ["model.safetensors.index.json", "'../model.safetensors'"],
        "expected a file name",
    ),
    "no_weights": (
        without("model.safetensors"),
        ["no model.safetensors"],
        "download",
    ),
    "pickle_only": (pickle_only, ["pytorch_model.bin", "never read"], "convert it"),
    "no_config": (
        without("config.json"),
        ["config.json", "no such file"],
        "is this the right directory?",
    ),
    "malformed_config": (
        spoilt("config.json", '{"model_type": "llama",\n  "hidden_size": }'),
        ["config.json:2", "malformed JSON"],
        "copy or download it again",
    ),
    "config_is_a_list": (spoilt("config.json", "[]"), ["config.json", "list"], "expected a JSON"),
    "unknown_model_type": (
        lambda p: p.edit_config(model_type="mamba"),
        ["config.json", "model_type is 'mamba'"],
        "Use a Llama checkpoint",
    ),
    "unknown_rope_type": (
        lambda p: p.edit_config(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}),
        ["config.json", "'longrope'"],
        "expected one of default, linear, dynamic, llama3, yarn",
    ),
    "config_field_of_another_type": (
        lambda p: p.edit_config(hidden_size="32"),
        ["config.json", "hidden_size is '32'"],
        "expected int",
    ),
    "quantised_model": (
        lambda p: p.edit_config(quantization_config={"quant_method": "gptq"}),
        ["config.json", "quant_method='gptq'"],
        "Use the unquantised base",
    ),
    "no_tokenizer": (
        without("tokenizer.json"),
        ["no tokenizer.json"],
        "is this a model directory?",
    ),
    "malformed_tokenizer": (
        spoilt("tokenizer.json", "{"),
        ["tokenizer.json", "cannot be read"],
        "copy or download it again",
    ),
    "unknown_target": (
        lambda p: p.argv(target_modules="q_porj"),
        ["'q_porj'"],
        "Perhaps you meant 'q_proj'",
    ),
    "bad_pattern": (
        lambda p: p.argv(target_modules="re:(q_proj"),
        ["'(q_proj'", "not a regular expression"],
        r"re:.*\.(q_proj|v_proj)",
    ),
    "pattern_without_a_match": (
        lambda p: p.argv(target_modules="re:q_proj"),
        ["'q_proj'", "matches no module"],
        r"re:.*\.(q_proj|v_proj)",
    ),
    "unknown_module_to_save": (
        lambda p: p.argv(modules_to_save="norm"),
        ["--modules-to-save", "'norm'"],
        "embed_tokens and/or lm_head",
    ),
    "pattern_of_ranks_without_a_match": (
        lambda p: p.argv(rank_pattern="q_porj=4"),
        ["--rank-pattern", "'q_porj'"],
        "matches no adapted module",
    ),
    "pattern_of_alphas_without_a_match": (
        lambda p: p.argv(alpha_pattern="up_proj=4", target_modules="q_proj"),
        ["--alpha-pattern", "'up_proj'"],
        "matches no adapted module",
    ),
    "layer_that_there_is_not": (
        lambda p: p.argv(layers_to_transform="7"),
        ["layers_to_transform", "layer 7"],
        "the model has 2",
    ),
    "token_that_there_is_not": (
        lambda p: p.argv(trainable_token_indices="9999"),
        ["trainable_token_indices", "token 9999"],
        "384 rows",
    ),
    # --- what does not go together
    "explicit_pass_of_dora": (
        lambda p: p.argv(step_impl="explicit", use_dora=True),
        ["--step-impl explicit", "DoRA"],
        "use --step-impl auto",
    ),
    "explicit_pass_of_dropout": (
        lambda p: p.argv(step_impl="explicit", lora_dropout=0.1),
        ["--step-impl explicit", "LoRA dropout"],
        "use --step-impl auto",
    ),
    "explicit_pass_of_whole_models": (
        lambda p: p.argv(step_impl="explicit", full_finetuning=True, lora_r=None),
        ["--step-impl explicit", "trained tensors other than plain LoRA"],
        "use --step-impl auto",
    ),
    "policy_of_the_explicit_pass": (
        lambda p: p.argv(gradient_checkpointing="gate_up+offload", device="cpu"),
        ["--gradient-checkpointing is 'recompute_gate_up+offload'", "--device cpu"],
        "expected auto, none or full",
    ),
    "paged_state_on_a_cpu": (
        lambda p: p.argv(optim="paged_adamw_8bit", device="cpu"),
        ["--optim paged_adamw_8bit", "the device is cpu"],
        "use --optim adamw_8bit",
    ),
    "too_few_rows": (
        lambda p: p.argv(per_device_train_batch_size=5),
        ["4 rows do not fill one batch", "--per-device-train-batch-size 5"],
        "lower it",
    ),
    "weight_of_less_than_a_row": (
        lambda p: p.argv(dataset=[f"{p.rows}:1", f"{p.rows}:0.01"]),
        ["--dataset: weight 0.00990099 of 8 rows"],
        "raise it",
    ),
    "nothing_to_answer": (
        texts_to_answer,
        ["--eval-generate", "trained from their first token"],
        "a prompt and a completion",
    ),
    "cache_below_a_file": (
        lambda p: p.argv(dataset_cache_dir=p.rows / "cache"),
        ["rows.jsonl/cache", "Not a directory"],
        "--dataset-cache-dir",
    ),
    # --- flags
    "unknown_flag": (
        lambda p: [*p.argv(), "--learning-rte", "1"],
        ["--learning-rte"],
        "did you mean --learning-rate?",
    ),
    "stray_word": (lambda p: ["rows.jsonl", *p.argv()], ["rows.jsonl"], "--help"),
    "wrong_type": (
        lambda p: p.argv(lora_r="many"),
        ["--lora-r", "'many'"],
        "expected --lora-r INT",
    ),
    "fraction_for_a_count": (
        lambda p: p.argv(max_steps="1.5"),
        ["--max-steps", "'1.5'"],
        "expected --max-steps INT",
    ),
    "missing_value": (lambda p: [*p.argv(), "--seed"], ["'--seed'"], "Expected 1 value"),
    "unknown_choice": (
        lambda p: p.argv(lr_scheduler_type="cosin"),
        ["--lr-scheduler-type is 'cosin'"],
        "linear, cosine, cosine_with_restarts",
    ),
    "out_of_range": (lambda p: p.argv(lora_r=0), ["--lora-r is 0"], "expected at least 1"),
    "dropout_of_one": (lambda p: p.argv(lora_dropout=1), ["--lora-dropout is 1"], "below 1"),
    "not_a_number": (
        lambda p: p.argv(learning_rate="nan"),
        ["--learning-rate is nan"],
        "expected at least 0",
    ),
    "no_model": (lambda p: p.argv(model=None), ["--model is missing"], "give a directory"),
    "no_dataset": (lambda p: p.argv(dataset=None), ["--dataset is missing"], "give a .jsonl"),
    "no_cuda": (
        lambda p: p.argv(device="cuda:7"),
        ["--device is 'cuda:7'"],
        "use --device cpu",
    ),
    "unknown_device": (lambda p: p.argv(device="gpu"), ["--device is 'gpu'"], "cpu, cuda"),
    "unknown_yaml_key": (
        lambda p: p.yaml("learning_rte: 1e-3\n"),
        ["run.yaml", "'learning_rte'"],
        "did you mean learning_rate?",
    ),
    "wrong_type_in_yaml": (
        lambda p: p.yaml("lora_r: many\n"),
        ["run.yaml", "lora_r is 'many'"],
        "expected int",
    ),
    "malformed_yaml": (
        lambda p: p.yaml("lora_r: 4\nseed: [1\n"),
        ["run.yaml:3", "malformed YAML"],
        "expected",
    ),
    "loraplus_of_nothing": (
        lambda p: p.argv(loraplus_lr_ratio=0),
        ["--loraplus-lr-ratio is 0"],
        "or none",
    ),
    "no_such_yaml": (
        lambda p: [*p.argv(), "--config", str(p.directory / "no.yaml")],
        ["--config", "no.yaml"],
        "check the path",
    ),
    # --- output
    "output_below_a_file": (
        file_as_output,
        ["--output-dir", "file/out", "Not a directory"],
        "choose another directory",
    ),
    "output_without_a_name": (
        lambda p: p.argv(output_dir=""),
        ["--output-dir is ''"],
        "expected a directory",
    ),
    "output_is_a_file": (
        lambda p: p.argv(output_dir=p.rows),
        ["--output-dir", "rows.jsonl", "Not a directory"],
        "choose another directory",
    ),
    "output_in_proc": (
        lambda p: p.argv(output_dir="/proc/minisft"),
        ["--output-dir /proc/minisft"],
        "choose another directory",
    ),
    "output_is_the_base": (
        model_as_output,
        ["--output-dir", "base model's own directory"],
        "choose another directory",
    ),
    "output_of_something_else": (
        others_files_as_output,
        ["--output-dir", "model.safetensors", "no run.json"],
        "choose another directory",
    ),
    "output_holds_a_run": (
        run_as_output,
        ["--output-dir", "already holds a run"],
        "--overwrite-output-dir",
    ),
    "no_such_checkpoint": (
        lambda p: p.argv(resume_from_checkpoint=p.out / "checkpoint-9"),
        ["--resume-from-checkpoint", "checkpoint-9: no such directory"],
        "`auto`",
    ),
    "not_a_checkpoint": (
        lambda p: p.argv(resume_from_checkpoint=p.model),
        ["--resume-from-checkpoint", "manifest.json"],
        "`auto`",
    ),
    "damaged_checkpoint": (
        resumed(damage=True),
        ["all 1 checkpoints are damaged", "optimizer.safetensors"],
        "--overwrite-output-dir",
    ),
    "checkpoint_of_another_rank": (
        resumed(lora_r=3),
        ["made with other settings", "--lora-r was 2, now 3"],
        "a new --output-dir",
    ),
    "checkpoint_of_other_rows": (
        other_rows,
        ["made with other settings", "the training rows differ"],
        "a new --output-dir",
    ),
    "checkpoint_of_an_adapter": (
        resumed(full_finetuning=True, lora_r=None),
        ["no model.safetensors"],
        "made without --full-finetuning?",
    ),
    "checkpoint_beyond_the_end": (
        resumed(steps=2, max_steps=1),
        ["checkpoint-2 is beyond the end of this run, which has 1 steps"],
        "raise --max-steps",
    ),
    "damaged_evaluation": (kept_evaluation_damaged, ["step0.json", "list"], "remove it"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_names_the_culprit_and_the_remedy(place, name):
    spoil, culprits, remedy = CASES[name]
    argv = spoil(place)
    before = {} if not place.out.exists() else tree(place.out)
    model, names = tree(place.model), sorted(place.directory.parent.rglob("*"))
    dry = call("train", [*argv, "--dry-run"])
    assert sorted(place.directory.parent.rglob("*")) == names
    outcome = call("train", argv)
    assert outcome.code == 2, outcome
    assert (dry.code, dry.err) == (outcome.code, outcome.err)
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    assert all(text in outcome.err for text in culprits), outcome.err
    assert remedy in outcome.err, outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    after = {} if not place.out.exists() else tree(place.out)
    assert after.items() - {(".lock", after.get(".lock"))} == (
        before.items() - {(".lock", before.get(".lock"))}
    )
    assert tree(place.model).items() - model.items() <= {(".lock", after.get(".lock"))}


def test_a_second_run_in_the_same_directory_is_refused_while_the_first_writes(place):
    place.out.mkdir()
    with open(place.out / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome, dry = (call("train", place.argv(dry_run=d)) for d in (False, True))
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and outcome == dry
    assert "another run is writing there" in outcome.err and str(place.out) in outcome.err
    assert "wait for it or choose another directory" in outcome.err
    assert call("train", place.argv()).code == 0


def test_no_cuda_device_is_said(place):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    outcome = call("train", place.argv(device="cuda"))
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "--device is 'cuda', but torch sees 0 CUDA devices; use --device cpu" in outcome.err


OVERWRITES = ["no_such_dataset", "malformed_json", "unknown_target", "no_cuda", "nothing_to_train"]


@pytest.mark.parametrize("name", OVERWRITES)
def test_overwriting_removes_nothing_until_the_new_run_can_start(place, name):
    train_at(place)
    before = tree(place.out)
    outcome = call("train", [*CASES[name][0](place), "--overwrite-output-dir"])
    assert outcome.code == 2
    assert tree(place.out) == before


def test_overwriting_starts_over(place):
    train(**{"model": place.model, "dataset": place.rows, "output_dir": place.out, "max_steps": 3})
    outcome = call("train", [*place.argv(), "--overwrite-output-dir"])
    assert outcome.code == 0
    assert [p.name for p in place.out.glob("checkpoint-*")] == ["checkpoint-1"]
    assert [m["step"] for m in metrics(place.out)] == [1]
    assert read(place.out / "adapter_config.json")["r"] == 2


# ------------------------------------------------------------------------------------- full disk


@contextmanager
def file_limit(size):
    """No file of this process may grow beyond so many bytes, pytest's own log among them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FULL = {
    "run.json": (200, {}),
    "metrics.jsonl": (5000, {"max_steps": 40}),
    "adapter_model.safetensors": (5000, {}),
    "optimizer.safetensors": (12000, {}),
    "tokenizer.json": (6000, {"target_modules": "q_proj"}),
}


@pytest.mark.parametrize("culprit", FULL)
def test_a_file_that_cannot_be_written_is_one_line(place, culprit):
    """EFBIG stands for a full disk, met by one file after another."""
    size, changes = FULL[culprit]
    argv = place.argv(**changes)
    with file_limit(size):
        outcome = call("train", argv)
    assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome.err
    assert culprit in outcome.err and "File too large" in outcome.err
    assert "free space" in outcome.err
    assert ("There is no checkpoint yet" in outcome.err) == (culprit.endswith("safetensors"))
    assert "intact" not in outcome.err
    assert not list(place.out.glob("tmp-*"))
    assert not list(place.out.rglob("*.tmp"))


@pytest.mark.parametrize("call_number", range(1, 52, 7))
def test_a_disk_that_fills_up_spares_the_earlier_checkpoints(place, monkeypatch, call_number):
    """The n-th fsync of a run of three steps fails; what was complete can be resumed."""
    argv = place.argv(max_steps=3, save_steps=1)
    real, calls = os.fsync, 0

    def fsync(fd):
        nonlocal calls
        calls += 1
        if calls == call_number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        outcome = call("train", argv)
    assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome.err
    assert "No space left on device" in outcome.err and "free space" in outcome.err
    assert not list(place.out.glob("tmp-*"))
    resumed = call("train", [*argv, "--resume-from-checkpoint", "auto"])
    assert resumed.code == 0, resumed.err
    assert "skipping" not in resumed.out
    assert [m["step"] for m in metrics(place.out)] == [1, 2, 3]
