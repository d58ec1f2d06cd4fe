"""config.json in both layouts, and settings that contradict themselves."""

import json

import pytest
from transformers import LlamaConfig

from minisft.config.errors import UserError
from minisft.config.hf import parse_model_config
from minisft.config.train import TrainConfig

BASE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
LAYOUTS = {
    "plain": {},
    "v4 theta": {"rope_theta": 500000.0, "torch_dtype": "bfloat16"},
    "v4 scaling": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "v4 legacy type": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "v4 null scaling": {"rope_scaling": None, "num_key_value_heads": None, "head_dim": None},
    "v5": {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
        "dtype": "float16",
    },
    "v5 default": {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}},
    "v5 yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    "both dtypes": {"torch_dtype": "float32", "dtype": "bfloat16"},
    "gqa and head_dim": {"num_key_value_heads": 2, "head_dim": 32, "attention_bias": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_layouts_mean_what_transformers_reads(layout, tmp_path):
    raw = {**BASE, **LAYOUTS[layout]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    hf = LlamaConfig.from_pretrained(tmp_path)
    cfg = parse_model_config(raw)
    for name in ("num_key_value_heads", "rms_norm_eps", "attention_bias", "tie_word_embeddings"):
        assert getattr(cfg, name) == getattr(hf, name)
    assert cfg.head_dim == (hf.head_dim or hf.hidden_size // hf.num_attention_heads)
    assert cfg.rope.rope_type == hf.rope_parameters["rope_type"]
    assert cfg.rope.rope_theta == hf.rope_parameters["rope_theta"]
    for name, value in hf.rope_parameters.items():
        if name not in ("rope_type", "rope_theta", "type"):
            assert getattr(cfg.rope, name) == value, name
    assert cfg.dtype == (None if hf.dtype is None else str(hf.dtype).removeprefix("torch."))


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"num_attention_heads": 5}, "hidden_size=64"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"dtype": "float8"}, "float8"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ],
)
def test_what_is_not_implemented_is_named(change, culprit):
    with pytest.raises(UserError, match=culprit):
        parse_model_config({**BASE, **change})


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"dtype": "int8"}, "--dtype"),
        ({"lora_r": 0}, "--lora-r"),
        ({"learning_rate": -1.0}, "--learning-rate"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"max_steps": 0}, "--max-steps"),
        ({"max_grad_norm": float("inf")}, "--max-grad-norm"),
        ({"lora_dropout": 1.0}, "--lora-dropout"),
        ({"lr_scheduler_type": "cosin"}, "--lr-scheduler-type"),
        ({"modules_to_save": ("norm",)}, "--modules-to-save"),
        ({"modules_to_save": ("lm_head",), "full_finetuning": True}, "--modules-to-save"),
        ({"columns": ("prompt",)}, "--columns"),
        (
            {"columns": ("text=a", "text=b")},
            "--columns is 'text=a text=b'; expected each NAME once",
        ),
        ({"report_to": None}, "--report-to is None; expected a list of none, tensorboard, wan"),
        ({"target_modules": [1]}, "--target-modules holds 1; expected a list of strings"),
        ({"trainable_token_indices": 5}, "--trainable-token-indices is 5; expected a list of tok"),
        ({"eval_generate": 3}, "--eval-generate"),
        ({"eval_strategy": "steps"}, "--eval-strategy"),
        ({"seed": -1}, "--seed"),
        (
            {"dataset": ("./a.jsonl",), "preview_json": "a.jsonl"},
            "--preview-json a.jsonl is a file",
        ),
        ({"eval_dataset": "e.jsonl", "preview_json": "./e.jsonl"}, "--preview-json ./e.jsonl is"),
    ],
)
def test_contradictory_settings_name_their_flag(settings, flag):
    with pytest.raises(UserError, match=flag):
        TrainConfig(**settings)


def test_a_rename_to_itself_is_none():
    assert TrainConfig(columns=("a=a", "text=body")).column_map == {"text": "body"}


def test_lists_take_commas_and_blanks():
    def split(value):
        return TrainConfig(target_modules=value).target_modules

    assert split("q_proj,v_proj") == ("q_proj", "v_proj")
    assert split(["q_proj", "k_proj,v_proj"]) == ("q_proj", "k_proj", "v_proj")
    assert split(["re:.*layers.[0-3],x"]) == ("re:.*layers.[0-3],x",)


@pytest.mark.parametrize(
    "settings",
    [
        {"full_finetuning": "false"},
        {"packing": 1},
        {"max_steps": 1.5},
        {"max_steps": True},
        {"learning_rate": "2e-4"},
        {"lora_alpha": float("nan")},
        {"target_modules": None},
        {"resume_from_checkpoint": 1},
        {"save_strategy": True},
    ],
    ids=str,
)
def test_python_callers_get_the_strictness_of_flags(settings):
    with pytest.raises(UserError, match="--" + next(iter(settings)).replace("_", "-")):
        TrainConfig(**settings)


def test_paths_may_be_pathlibs(tmp_path):
    assert TrainConfig(output_dir=tmp_path).output_dir == str(tmp_path)


def test_true_and_false_mean_what_they_mean_to_the_peers():
    config = TrainConfig(
        gradient_checkpointing=True, init_lora_weights=True, resume_from_checkpoint=True,
        save_strategy=False, eval_strategy=False,
    )  # fmt: skip
    assert (config.gradient_checkpointing, config.init_lora_weights) == ("full", "default")
    assert (config.resume_from_checkpoint, config.save_strategy) == ("auto", "no")
    assert TrainConfig(resume_from_checkpoint=False).resume_from_checkpoint == ""
