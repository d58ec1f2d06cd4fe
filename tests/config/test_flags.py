"""Flags and the YAML file: spelling, lists, switches, precedence, help."""

import dataclasses

import pytest
from runs import call, script

from minisft.config.errors import UserError
from minisft.config.flags import parse_flags, run_main
from minisft.config.train import TrainConfig

DEFAULT = TrainConfig(model="base", dataset="rows.jsonl")


def parse(*argv, **default):
    return parse_flags(
        TrainConfig, argv, prog="train.py", default=dataclasses.replace(DEFAULT, **default)
    )


def refusal(*argv):
    with pytest.raises(UserError) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def yaml(tmp_path):
    """A function that writes run.yaml and returns the flag that names it."""

    def write(text):
        (tmp_path / "run.yaml").write_text(text)
        return f"--config={tmp_path / 'run.yaml'}"

    return write


def test_no_flags_give_the_documented_defaults():
    config = parse()
    assert config == DEFAULT
    documented = {
        "max_length": 2048, "lora_r": 16, "lora_alpha": 16, "lora_dropout": 0, "packing": False,
        "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                           "down_proj"),
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 1,
        "max_steps": -1, "learning_rate": 2e-4, "lr_scheduler_type": "linear", "warmup_steps": 0,
        "weight_decay": 0, "max_grad_norm": 1.0, "adam_beta1": 0.9, "adam_beta2": 0.999,
        "adam_epsilon": 1e-8, "logging_steps": 1, "save_steps": 500, "seed": 3407,
        "output_dir": "outputs", "gradient_checkpointing": "auto", "use_rslora": False,
        "modules_to_save": (), "full_finetuning": False, "dataset_text_field": "text",
        "dtype": "auto", "device": "auto", "revision": None, "dataset_split": "train",
        "resume_from_checkpoint": "", "save_total_limit": 0, "eval_dataset": "", "columns": (),
    }  # fmt: skip
    assert {name: getattr(config, name) for name in documented} == documented


@pytest.mark.parametrize(
    "argv",
    [
        ["--lora-r", "8", "--use-rslora", "--max-length", "64"],
        ["--lora_r", "8", "--use_rslora", "--max_length", "64"],
        ["--lora-r=8", "--use_rslora", "--max-length=64"],
        ["--lora_r=8", "--use-rslora", "--max_length", "64"],
    ],
)
def test_hyphens_and_underscores_are_the_same(argv):
    config = parse(*argv)
    assert (config.lora_r, config.use_rslora, config.max_length) == (8, True, 64)


def test_switches_need_no_value_and_have_a_negative():
    assert parse("--packing").packing and parse("--full-finetuning").full_finetuning
    assert not parse("--no-packing", packing=True).packing
    assert not parse("--no_packing", packing=True).packing
    assert parse("--packing", "--lora-r", "4").packing


@pytest.mark.parametrize(
    "argv", [["--packing", "True"], ["--packing=false"], ["--no-packing", "1"]]
)
def test_a_switch_with_a_value_is_told_how(argv):
    assert "give --packing or --no-packing" in refusal(*argv)


@pytest.mark.parametrize("name", ["target_modules", "modules_to_save", "columns"])
def test_lists_are_parted_by_blanks_or_commas(name):
    items = {"target_modules": ("q_proj", "v_proj"), "columns": ("prompt=q", "completion=a")}
    items = items.get(name, ("embed_tokens", "lm_head"))
    assert getattr(parse(f"--{name}", *items), name) == items
    assert getattr(parse(f"--{name.replace('_', '-')}", ",".join(items)), name) == items


def test_a_pattern_keeps_its_commas():
    pattern = r"re:.*\.\d{1,2}\.(q_proj|v_proj)"
    assert parse("--target-modules", pattern).target_modules == (pattern,)


def test_columns_are_pairs_in_both_forms(yaml):
    wanted = {"prompt": "question", "completion": "answer"}
    assert parse("--columns", "prompt=question", "completion=answer").column_map == wanted
    assert parse("--columns", "prompt=question,completion=answer").column_map == wanted
    flag = yaml("columns:\n  prompt: question\n  completion: answer\n")
    assert parse(flag).column_map == wanted
    assert parse(yaml("columns: [prompt=question, completion=answer]\n")).column_map == wanted
    assert parse(yaml("columns: prompt=question,completion=answer\n")).column_map == wanted


def test_a_column_name_may_hold_blanks():
    assert parse("--columns", "prompt=the question").column_map == {"prompt": "the question"}


def test_numbers_are_numbers():
    config = parse("--learning-rate", "2e-4", "--warmup-steps", "0.1", "--max-steps", "-1")
    assert (config.learning_rate, config.warmup_steps, config.max_steps) == (2e-4, 0.1, -1)
    assert isinstance(parse("--lora-alpha", "32").lora_alpha, float)


# ----------------------------------------------------------------------------------------- YAML


def test_the_file_is_read_first_and_flags_win(yaml):
    flag = yaml("lora_r: 8\nlora-alpha: 32\nseed: 5\n")
    for argv in (["--seed", "7", flag], [flag, "--seed", "7"]):
        config = parse(*argv)
        assert (config.lora_r, config.lora_alpha, config.seed) == (8, 32.0, 7)
    assert parse(*flag.split("=", 1)).lora_r == 8
    assert config.learning_rate == DEFAULT.learning_rate


def test_yaml_values_take_the_type_of_their_field(yaml):
    config = parse(
        yaml(
            "learning_rate: 2e-4\nweight_decay: 1\nmax_steps: 100\npacking: true\n"
            "target_modules: q_proj,v_proj\nmodules_to_save: [lm_head]\nrevision: null\n"
            "model: 7\nmax_grad_norm: .5\n"
        )
    )
    assert config.learning_rate == 2e-4 and isinstance(config.learning_rate, float)
    assert config.weight_decay == 1.0 and isinstance(config.weight_decay, float)
    assert config.max_steps == 100 and isinstance(config.max_steps, int)
    assert config.packing is True and config.model == "7" and config.revision is None
    assert config.target_modules == ("q_proj", "v_proj")
    assert config.modules_to_save == ("lm_head",) and config.max_grad_norm == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1\n", "unknown key 'learning_rte'; did you mean learning_rate?"),
        ("zzzz: 1\n", "unknown key 'zzzz'"),
        ("config: other.yaml\n", "unknown key 'config'"),
        ("lora_r: 4.5\n", "lora_r is 4.5; expected int"),
        ("lora_r: true\n", "lora_r is True; expected int"),
        ("packing: 1\n", "packing is 1; expected bool"),
        ("packing: 'yes'\n", "packing is 'yes'; expected bool"),
        ("learning_rate: fast\n", "learning_rate is 'fast'; expected float"),
        ("target_modules: [1]\n", "target_modules is [1]; expected a list of names"),
        ("trainable_token_indices: {a: 1}\n", "is {'a': 1}; expected a list of token ids"),
        ("report_to: 3\n", "report_to is 3; expected a list of none, tensorboard, wandb, trackio"),
        ("- lora_r\n", "expected `name: value` lines, found list"),
        ("lora_r: [\n", "malformed YAML"),
        ("seed: 1\nlora_r: 0\n", "--lora-r is 0; expected at least 1"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(yaml, text, message):
    assert message in refusal(yaml(text))


def test_a_file_s_null_is_not_given_and_its_switches_are_the_peers(yaml):
    text = "run_name: null\nlora_r: null\nmodules_to_save:\nhub_token: null\nloftq_config: {}\n"
    assert parse(yaml(text)) == parse()
    config = parse(yaml("save_strategy: no\nresume_from_checkpoint: true\n"))
    assert (config.save_strategy, config.resume_from_checkpoint) == ("no", "auto")
    assert "save_strategy is True; expected" in refusal(yaml("save_strategy: yes\n"))


@pytest.mark.parametrize("second", [["--dataset", "b.jsonl"], ["--dataset=b.jsonl"]])
def test_a_list_that_is_given_twice_loses_nothing_silently(second):
    told = refusal("--dataset", "a.jsonl", *second)
    assert told == "--dataset is given 2 times; give all its values after one --dataset"


def test_two_names_of_one_setting_are_not_both_given():
    told = refusal("--r", "8", "--lora-r", "16")
    assert told == "--r and --lora-r both give --lora-r; drop one"
    assert "expected a share of the steps below 1" in refusal("--warmup_ratio", "1")
    told = refusal("--warmup-steps=5", "--warmup_ratio", "0.1")
    assert told == "--warmup-steps and --warmup_ratio both give --warmup-steps; drop one"
    assert parse("--lora-r", "8", "--lora_r", "16").lora_r == 16  # the last word


def test_lists_of_numbers_in_a_file(yaml):
    config = parse(yaml("trainable_token_indices: [5, 6]\nlayers_to_transform: 1\n"))
    assert (config.trainable_token_indices, config.layers_to_transform) == (("5", "6"), ("1",))


def test_an_empty_file_changes_nothing(yaml):
    assert parse(yaml("# nothing\n")) == DEFAULT


def test_config_without_a_file():
    assert "--config: expected a YAML file" in refusal("--config")


# ---------------------------------------------------------------------------------- help and codes


def test_help_lists_every_field_and_exits_0(capsys):
    for name in ("train", "generate"):
        with pytest.raises(SystemExit) as caught:
            script(name).main(["--help"])
        assert caught.value.code == 0
        out = capsys.readouterr().out
        cls = TrainConfig if name == "train" else script(name).GenerateConfig
        missing = [
            f.name for f in dataclasses.fields(cls) if f"--{f.name.replace('_', '-')}" not in out
        ]
        assert missing == []
        assert out.count("--packing, --no-packing") == (name == "train")


@pytest.mark.parametrize("word", ["--lr-decay", "--temperature", "--save-every", "--wandb"])
def test_no_guess_is_better_than_a_wild_one(word):
    assert refusal(word) == f"unknown flag {word}; see --help for the list"


@pytest.mark.parametrize(
    ("word", "guess"),
    [
        ("--lora-rank", "--lora-r"),
        ("--learning_rte=3", "--learning-rate"),
        ("--no-pakcing", "--packing"),
        ("--confg", "--config"),
        ("--per-device-train-batch", "--per-device-train-batch-size"),
    ],
)
def test_an_unknown_flag_is_told_with_the_nearest(word, guess):
    assert refusal(word) == f"unknown flag {word.split('=')[0]}; did you mean {guess}?"


def test_a_flag_like_nothing_known():
    assert refusal("--zzzzzz", "1") == "unknown flag --zzzzzz; see --help for the list"


def test_a_switch_of_another_kind_has_no_negative():
    assert "unknown flag --no-lora-r" in refusal("--no-lora-r")


def test_a_long_message_of_the_settings_stays_one_unbroken_line():
    message = refusal("--lr-scheduler-type", "a" * 200)
    assert message.startswith(f"--lr-scheduler-type is '{'a' * 200}'; expected one of linear, ")


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "code", "err"),
    [
        (None, 0, ""),
        (UserError("mend it"), 2, "error: mend it\n"),
        (Stopped("halt"), 3, "halt\n"),
    ],
)
def test_endings_become_exit_codes(capsys, error, code, err):
    def main():
        if error:
            raise error

    assert run_main(main, {Stopped: 3}) == code
    assert capsys.readouterr().err == err


def test_what_nobody_expected_keeps_its_traceback():
    def main():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run_main(main, {})


def test_flags_of_a_run_do_not_mix_with_the_demo(tmp_path):
    """Naming a model or rows leaves nothing of the demo's settings."""
    for name in ("--model", "--model_name_or_path", "--model-name"):
        outcome = call("train", [name, str(tmp_path), "--output-dir", str(tmp_path / "out")])
        assert outcome.code == 2 and "--dataset is missing" in outcome.err
    outcome = call("train", [f"--dataset-name={tmp_path}", "--output-dir", str(tmp_path / "out")])
    assert outcome.code == 2 and "--model is missing" in outcome.err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], None),
        (["--completion-only-loss"], True),
        (["--no-completion-only-loss", "--packing"], False),
        (["--no_completion_only_loss"], False),
        (["--completion-only-loss", "true", "--packing"], True),
        (["--completion_only_loss", "False"], False),
    ],
)
def test_a_switch_may_be_left_open(argv, expected):
    config = parse(*argv)
    assert config.completion_only_loss is expected and config.packing == ("--packing" in argv)
