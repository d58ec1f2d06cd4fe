"""Every argument of the peers is a setting here, an alias of one, or refused with a reason."""

import dataclasses
import re

import pytest
import torch
import yaml
from runs import ROOT, call, metrics, pairs, read, write_model, write_rows
from safetensors.torch import load_file

import minisft
from minisft.config.errors import UserError
from minisft.config.flags import parse_flags
from minisft.config.names import ALIASES, REFUSED, SWITCHES, refusal
from minisft.config.train import TrainConfig

FIELDS = {f.name for f in dataclasses.fields(TrainConfig)}
NAMED_BY_USERS = {
    *("resume_from_checkpoint", "packing", "dataset_text_field", "max_seq_length", "r", "seed"),
    *("dataset_num_proc", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_steps", "num_train_epochs", "learning_rate", "embedding_learning_rate", "optim"),
    *("warmup_steps", "lr_scheduler_type", "fp16", "bf16", "logging_steps", "save_steps"),
    *("save_strategy", "evaluation_strategy", "eval_strategy", "eval_steps", "report_to"),
    *("load_best_model_at_end", "metric_for_best_model", "run_name", "logging_dir"),
    *("output_dir", "lora_alpha", "target_modules", "modules_to_save", "load_in_4bit"),
    *("eval_dataset", "data_collator"),
}

KNOWN = FIELDS | set(SWITCHES) | {a for a, ours in ALIASES.items() if ours in FIELDS}
# FastLanguageModel.from_pretrained and get_peft_model.
UNSLOTH = {
    *("model_name", "max_seq_length", "dtype", "load_in_4bit", "load_in_8bit", "load_in_16bit"),
    *("full_finetuning", "token", "device_map", "rope_scaling", "fix_tokenizer", "revision"),
    *("trust_remote_code", "use_gradient_checkpointing", "resize_model_vocab", "random_state"),
    *("use_exact_model_name", "fast_inference", "gpu_memory_utilization", "float8_kv_cache"),
    *("max_lora_rank", "disable_log_stats", "qat_scheme", "offload_embedding", "r", "bias"),
    *("target_modules", "lora_alpha", "lora_dropout", "layers_to_transform", "layers_pattern"),
    *("use_rslora", "modules_to_save", "init_lora_weights", "loftq_config"),
}


def table():
    """Argument -> what the table gives for it."""
    rows = {}
    for line in (ROOT / "minisft" / "config" / "README.md").read_text().splitlines():
        if line.startswith("| `"):
            left, here = line.split("|")[1:3]
            rows |= dict.fromkeys(re.findall(r"`(\w+)`", left), here.strip().strip("`"))
    return rows


def parse(*argv):
    return parse_flags(TrainConfig, list(argv), prog="train.py", default=TrainConfig())


def test_the_table_names_every_argument_and_a_flag_that_exists():
    rows = table()
    assert set(rows) >= NAMED_BY_USERS
    for argument, here in rows.items():
        if argument == "data_collator":
            assert here == "minisft.train(config, batch_fn=collator)"
            continue
        name, _, value = here.removeprefix("--").replace("-", "_").partition(" ")
        assert name in FIELDS, argument
        if argument in SWITCHES:
            assert (name, value) == SWITCHES[argument]
        else:
            assert ALIASES.get(argument, argument) == name, argument


def test_every_argument_of_sft_config_is_taken_or_refused():
    trl = pytest.importorskip("trl")
    names = {f.name for f in dataclasses.fields(trl.SFTConfig)}
    names |= {"embedding_learning_rate", "data_collator", "peft_config", "max_seq_length"}
    assert {n for n in names if n not in KNOWN and not refusal(n)} == set()


def test_every_argument_of_lora_config_and_unsloth_is_taken_or_refused():
    peft = pytest.importorskip("peft")
    names = {f.name for f in dataclasses.fields(peft.LoraConfig)} | UNSLOTH
    assert {n for n in names if n not in KNOWN and not refusal(n)} == set()


def test_every_argument_of_model_config_and_of_bits_and_bytes_is_taken_or_refused():
    trl = pytest.importorskip("trl")
    names = {f.name for f in dataclasses.fields(trl.ModelConfig)}
    names |= {f"bnb_4bit_{x}" for x in ("compute_dtype", "quant_type", "use_double_quant")}
    names |= {"bnb_4bit_quant_storage"}
    assert {n for n in names if n not in KNOWN and not refusal(n)} == set()


@pytest.mark.parametrize(
    "argv",
    [
        ["--bnb_4bit_quant_type", "nf4", "--use_bnb_nested_quant", "--use_peft", "true"],
        ["--bnb_4bit_use_double_quant=True", "--bnb_4bit_quant_storage", "uint8"],
        ["--do_train", "--use_peft"],
        ["--bias", "none", "--task_type", "CAUSAL_LM", "--lora_bias=False", "--r", "16"],
        ["--remove_unused_columns", "False", "--push_to_hub", "false", "--seed", "3407"],
        ["--no-push-to-hub", "--load_in_8bit", "False", "--use_cache=False"],
        ["--truncation_mode", "keep_start", "--random_state", "3407"],
    ],
)
def test_a_value_that_asks_for_what_is_done_anyway_is_taken(argv):
    assert parse(*argv) == TrainConfig()


def test_nothing_that_works_is_refused():
    assert {n for n in FIELDS | set(ALIASES) | set(SWITCHES) if refusal(n)} == set()
    assert all(len(why) > 10 for why in REFUSED.values())


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--r", "8"], "lora_r", 8),
        (["--max_seq_length=77"], "max_length", 77),
        (["--evaluation-strategy", "steps", "--eval-dataset", "x"], "eval_strategy", "steps"),
        (["--warmup-ratio", "0.1"], "warmup_steps", 0.1),
        (["--bf16"], "dtype", "bfloat16"),
        (["--fp16", "True"], "dtype", "float16"),
        (["--bf16=false"], "dtype", "auto"),
        (["--bnb_4bit_compute_dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--model_revision", "main"], "revision", "main"),
        (["--lora_modules_to_save", "lm_head"], "modules_to_save", ("lm_head",)),
        (["--no-fp16"], "dtype", "auto"),
        (["--fp16", "False", "--bf16"], "dtype", "bfloat16"),
        (["--use-cpu"], "device", "cpu"),
        (["--gradient_checkpointing"], "gradient_checkpointing", "full"),
        (["--gradient_checkpointing", "True", "--r", "8"], "gradient_checkpointing", "full"),
        (["--gradient_checkpointing=False"], "gradient_checkpointing", "none"),
        (["--gradient-checkpointing", "gate_up"], "gradient_checkpointing", "recompute_gate_up"),
        (["--use_gradient_checkpointing", "unsloth"], "gradient_checkpointing", "full+offload"),
        (["--gradient_checkpointing", "--r", "8"], "lora_r", 8),
        (["--dtype", "None"], "dtype", "auto"),
        (["--dtype", "float32"], "dtype", "float32"),
        (["--optim", "adamw_torch_fused"], "optim", "adamw"),
        (["--optim", "adamw_bnb_8bit"], "optim", "adamw_8bit"),
        (["--report-to", "none"], "report_to", ()),
        (["--resume-from-checkpoint", "True"], "resume_from_checkpoint", "auto"),
        (
            ["--greater-is-better", "True", "--load-best-model-at-end", "--eval-strategy", "epoch",
             "--eval-dataset", "x"],
            "greater_is_better",
            True,
        ),
    ],
)  # fmt: skip
def test_a_name_of_the_peers_sets_ours(argv, name, value):
    assert getattr(parse(*argv), name) == value


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--deepspeed", "x.json"], "--deepspeed is not a setting here: training runs on one"),
        (["--push_to_hub"], "--push-to-hub is not a setting here: nothing is uploaded"),
        (["--hub-token=1"], "--hub-token is not a setting here"),
        (["--bf16", "--fp16"], "--bf16 and --fp16 both give --dtype; drop one"),
        (["--data-collator", "x"], "from Python: minisft.train"),
        (["--bias", "all"], "--bias is not a setting here: biases of the base stay frozen"),
        (["--do_eval", "False"], "--do-eval is not a setting here"),
        (["--bnb_4bit_quant_type", "fp4"], "scripts/quantize.py --quant-type fp4 writes"),
        (["--use-bnb-nested-quant", "false"], "scripts/quantize.py --no-double-quant writes"),
        (["--use_peft=False"], "or with --full-finetuning the model itself"),
        (["--no-do-train"], "--no-do-train is not a setting here: scripts/train.py always"),
        (["--bf16=maybe"], "--bf16 is 'maybe'; expected true or false"),
    ],
)
def test_what_there_is_not_is_refused_by_name(argv, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse(*argv)


def test_yaml_takes_the_same_names(tmp_path):
    file = tmp_path / "run.yaml"
    raw = {"r": 8, "max_seq_length": 64, "bf16": True, "fp16": False, "warmup_ratio": 0.25}
    file.write_text(yaml.safe_dump(raw))
    config = parse("--config", str(file))
    assert (config.lora_r, config.max_length, config.dtype) == (8, 64, "bfloat16")
    assert config.warmup_steps == 0.25
    file.write_text("r: 8\nbias: none\nhub_token: null\npush_to_hub: false\nbf16: null\n")
    assert parse("--config", str(file)) == TrainConfig(lora_r=8)
    file.write_text("use_gradient_checkpointing: true\ndtype: null\n")
    assert parse("--config", str(file)) == TrainConfig(gradient_checkpointing="full")
    file.write_text("r: 8\nlora_r: 9\n")
    with pytest.raises(UserError, match="'lora_r' gives lora_r a second time"):
        parse("--config", str(file))
    file.write_text("deepspeed: x\n")
    with pytest.raises(UserError, match="--deepspeed is not a setting here"):
        parse("--config", str(file))


# ------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    rows = [{"body": f"{row['prompt']}{row['completion']}"} for row in pairs(24)]
    return {
        "model": str(write_model(directory / "model")),
        "dataset": str(write_rows(directory / "train.jsonl", rows)),
        "eval_dataset": str(write_rows(directory / "eval.jsonl", rows[:4])),
    }


def test_every_argument_of_the_users_documents_in_one_run(inputs, tmp_path):
    """As flags in the peers' spelling; then resumed with the same."""
    pytest.importorskip("tensorboard")
    settings = {
        **inputs, "dataset_text_field": "body", "packing": None, "max_seq_length": 48,
        "dataset_num_proc": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
        "max_steps": 4, "num_train_epochs": 3, "learning_rate": 1e-2, "warmup_steps": 1,
        "embedding_learning_rate": 1e-3, "lr_scheduler_type": "cosine", "optim": "adamw_8bit",
        "bf16": "True", "fp16": "False", "logging_steps": 1, "save_strategy": "steps",
        "save_steps": 2, "evaluation_strategy": "steps", "eval_steps": 2,
        "per_device_eval_batch_size": 2, "load_best_model_at_end": None,
        "metric_for_best_model": "eval_loss", "greater_is_better": "False",
        "report_to": "tensorboard", "run_name": "named", "logging_dir": str(tmp_path / "logs"),
        "output_dir": str(tmp_path / "out"), "seed": 3407, "r": 4, "lora_alpha": 8,
        "lora_dropout": 0, "use_rslora": None, "load_in_4bit": None,
        "target_modules": ["q_proj", "v_proj", "embed_tokens"], "modules_to_save": "lm_head",
    }  # fmt: skip
    elsewhere = {"loss_type", "label_smoothing_factor", "neftune_noise_alpha", "max_length"}
    elsewhere |= {"eval_strategy", "warmup_ratio", "data_collator", "resume_from_checkpoint"}
    elsewhere |= {"use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform"}
    elsewhere |= {"exclude_modules", "init_lora_weights", "trainable_token_indices"}
    elsewhere |= {"loraplus_lr_ratio", "random_state", "gradient_checkpointing"}
    elsewhere |= {"use_gradient_checkpointing", "bnb_4bit_compute_dtype", "model_revision"}
    elsewhere |= {"lora_modules_to_save"}
    missing = set(table()) - set(settings) - elsewhere
    assert missing == set()
    argv = []
    for name, value in settings.items():
        values = [] if value is None else value if isinstance(value, list) else [value]
        argv += [f"--{name}", *map(str, values)]
    outcome = call("train", argv)
    assert outcome.code == 0, outcome.err
    out = tmp_path / "out"
    lines = [m for m in metrics(out) if "loss" in m]
    assert [m["step"] for m in lines] == [1, 2, 3, 4]
    assert [m["step"] for m in metrics(out) if "eval_loss" in m] == [0, 2, 4]
    assert lines[0]["learning_rate"] == 0 and lines[1]["learning_rate"] == 1e-2
    config = read(out / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 8, True)
    assert config["modules_to_save"] == ["embed_tokens", "lm_head"]
    assert read(out / "run.json")["resolved"]["dtype"] == "bfloat16"
    assert any((tmp_path / "logs" / "named").glob("events.*"))
    codes = load_file(out / "checkpoint-4" / "optimizer.safetensors")
    assert {t.dtype for t in codes.values()} == {torch.uint8, torch.float32}
    resumed = call("train", [*argv, "--resume_from_checkpoint", "True"])
    assert resumed.code == 0 and "complete already (4 steps)" in resumed.out


# ------------------------------------------------------------------------------------ data_collator

PLAIN = {"max_length": 64, "max_steps": 3, "dtype": "float32", "lora_r": 4, "learning_rate": 1e-2}


def padded(examples):
    """What transformers' collators make: right-padded tensors, an attention mask."""
    longest = max(len(e["input_ids"]) for e in examples)

    def pad(name, value):
        rows = [e[name] + [value] * (longest - len(e[name])) for e in examples]
        return torch.tensor(rows)

    mask = pad("attention_mask", 0)
    return {"input_ids": pad("input_ids", 2), "labels": pad("labels", -100), "attention_mask": mask}


def run(inputs, out, batch_fn=None, **settings):
    fields = {**inputs, **PLAIN, "output_dir": str(out), "dataset_text_field": "body", **settings}
    minisft.train(TrainConfig(**fields), batch_fn=batch_fn)
    names = ("loss", "grad_norm", "eval_loss", "num_loss_tokens", "num_tokens", "epoch")
    return [[m.get(n) for n in names] for m in metrics(out)]


def test_a_collator_that_pads_changes_nothing(inputs, tmp_path):
    settings = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    settings["lora_dropout"] = 0.0
    plain = run(inputs, tmp_path / "plain", **settings)
    assert run(inputs, tmp_path / "padded", padded, **settings) == plain


def test_transformers_own_collator_is_one(inputs, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs["model"])
    tokenizer.pad_token = tokenizer.eos_token
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, padding=True)
    assert run(inputs, tmp_path / "theirs", collator) == run(inputs, tmp_path / "plain")


def test_a_collator_that_makes_its_own_labels(inputs, tmp_path):
    """It fails on rows with labels: it gets rows without where they say nothing, else is told."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs["model"])
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    assert run(inputs, tmp_path / "theirs", collator) == run(inputs, tmp_path / "plain")
    masked = {**inputs, "dataset": str(write_rows(tmp_path / "rows.jsonl", pairs(8)))}
    with pytest.raises(UserError, match=r"batch_fn failed \(ValueError: .*returns the three as"):
        run(masked, tmp_path / "masked", collator, eval_dataset="")


def test_the_collator_of_the_documents(inputs, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    text = (ROOT / "minisft" / "config" / "README.md").read_text()
    code = (
        text.split("## A data collator")[1]
        .split("```python\n")[1]
        .split("```")[0]
        .replace("path/to/model", inputs["model"])
    )
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", pairs(8))
    exec(code, {})
    trained = [m["num_loss_tokens"] for m in metrics(tmp_path / "collated-run")]
    settings = {"eval_dataset": "", "dataset": "rows.jsonl"}
    plain = run({**inputs, **settings}, tmp_path / "plain", max_steps=1)
    assert trained == [line[3] for line in plain] and len(trained) == 1


def test_what_a_collator_masks_is_not_trained(inputs, tmp_path):
    seen = []

    def last_three(examples):
        seen.append(len(examples))
        batch = padded(examples)
        for labels, mask in zip(batch["labels"], batch["attention_mask"], strict=True):
            labels[: int(mask.sum()) - 3] = -100
        return batch

    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    lines = run(inputs, tmp_path / "out", last_three, **settings)
    assert [line[3] for line in lines if line[3]] == [12, 12, 12]
    assert seen == [2] * (2 + 6)  # the eval rows once, then two micro-batches a step
    resumed = tmp_path / "resumed"
    run(inputs, tmp_path / "saved", last_three, **settings, save_steps=1)
    path = str(tmp_path / "saved" / "checkpoint-2")
    again = run(inputs, resumed, last_three, **settings, resume_from_checkpoint=path)
    assert again[0] == lines[3]


def test_a_collator_that_fails_is_told(inputs, tmp_path):
    with pytest.raises(UserError, match=r"batch_fn failed \(KeyError: 'text'\); it takes a list"):
        run(inputs, tmp_path, lambda examples: examples[0]["text"])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"input_ids": [[1, 2]]}, "must return a batch of input_ids and labels"),
        (None, "must return a batch of input_ids and labels"),
        ({"input_ids": [[1, 2]], "labels": [[1, 2, 3]]}, "of one shape"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "of one shape"),
        ({"input_ids": [[1, 999]], "labels": [[1, 2]]}, "the id or label 999; expected 0 to 383"),
        ({"input_ids": [[1, 2]], "labels": [[1, -1]]}, "the id or label -1"),
        (
            {"input_ids": [[1]], "labels": [[1]], "attention_mask": [[0]]},
            "left no row in a batch",
        ),
    ],
)
def test_what_is_no_batch_is_told(inputs, tmp_path, made, message):
    with pytest.raises(UserError, match=message):
        run(inputs, tmp_path, lambda examples: made)


def test_a_collator_and_packing_do_not_go_together(inputs, tmp_path):
    with pytest.raises(UserError, match="drop --packing"):
        run(inputs, tmp_path, padded, packing=True)
