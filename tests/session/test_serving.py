"""vLLM's rules for adapters: default exports obey them, others give a warning."""

import gc
import weakref
from pathlib import Path

import pytest
from runs import call, flags, pairs, read, train, write_model, write_rows

from minisft.files.safetensors import read_header
from minisft.session import finish
from minisft.session.serving import VLLM_RANKS, commands, vllm_problems

PLAIN = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    return {
        "model": write_model(directory / "model"),
        "dataset": write_rows(directory / "train.jsonl", pairs(8)),
        "max_steps": 1,
    }


def keys(directory):
    return list(read_header(directory / "adapter_model.safetensors").tensors)


def test_the_default_adapter_obeys_every_rule(inputs, tmp_path):
    outcome = train(**inputs, output_dir=tmp_path, use_rslora=True)
    assert vllm_problems(read(tmp_path / "adapter_config.json"), keys(tmp_path)) == []
    assert "warning: vLLM" not in outcome.out
    assert f"vllm serve {inputs['model']} --quantization bitsandbytes --enable" in outcome.out
    plain = train(**inputs, output_dir=tmp_path / "plain", load_in_4bit=False)
    assert f"vllm serve {inputs['model']} --enable-lora" in plain.out
    assert "quantization" not in plain.out


def test_what_vllm_would_refuse_is_told_when_training_starts(inputs, tmp_path):
    outcome = train(**inputs, output_dir=tmp_path, modules_to_save=["lm_head"])
    warning = outcome.out.index("warning: vLLM cannot load this adapter as it is (trained copies")
    assert warning < outcome.out.index("step 1/1")
    assert "vLLM:         merge first, then vllm serve" in outcome.out
    problems = vllm_problems(read(tmp_path / "adapter_config.json"), keys(tmp_path))
    assert problems == ["trained copies (lm_head) are not loaded from an adapter"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"r": None}, "r is missing"),
        ({"r": 513}, "above vLLM's largest rank, 512"),
        ({"modules_to_save": ["embed_tokens"]}, "trained copies (embed_tokens)"),
        ({"use_dora": True}, "DoRA is not supported"),
        ({"bias": "all"}, "bias='all'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is ignored"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern is ignored"),
        ({"trainable_token_indices": [1]}, "trained token rows"),
        ({"target_modules": ["wq"]}, "target 'wq' is not a module"),
    ],
)
def test_each_rule(change, problem):
    assert vllm_problems(PLAIN) == []
    (found,) = vllm_problems(PLAIN | change)
    assert problem in found


@pytest.mark.parametrize(
    ("key", "fine"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", True),
        ("base_model.model.model.embed_tokens.lora_embedding_A", True),
        ("base_model.model.model.embed_tokens.base_layer.weight", True),
        ("base_model.model.lm_head.weight", False),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", False),
    ],
)
def test_tensor_names(key, fine):
    assert (vllm_problems(PLAIN, [key]) == []) == fine


def test_the_rank_to_ask_for_is_the_next_that_vllm_has():
    ranks = {1: 1, 2: 8, 8: 8, 9: 16, 16: 16, 100: 128, 257: 320, 512: 512}
    for r, rank in ranks.items():
        lines = commands(Path("out"), "base", PLAIN | {"r": r})
        assert f" --max-lora-rank {rank} " in "".join(lines)
    assert tuple(sorted(VLLM_RANKS)) == VLLM_RANKS


def test_saving_the_merged_model_needs_an_adapter(inputs, tmp_path):
    settings = {**inputs, "full_finetuning": True, "save_merged": True, "output_dir": tmp_path}
    outcome = call("train", flags(**settings))
    assert outcome.code == 2 and "--save-merged has no effect with --full-finetuning" in outcome.err


@pytest.mark.parametrize("excluded", ["q_proj", "re:.*q_proj", "q_proj,layers.0.mlp.up_proj"])
def test_an_adapter_without_a_whole_target_is_loaded_again(tmp_path, excluded):
    from minisft.files.adapter import load_adapter
    from minisft.files.weights import load_model_config

    model = write_model(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", pairs(4))
    out = tmp_path / "out"
    train(model=model, dataset=rows, output_dir=out, max_steps=1, exclude_modules=excluded)
    lora, tensors = load_adapter(out, load_model_config(model))
    assert tensors and not any("q_proj" in name for name in tensors)
    assert all("q_proj" not in item for item in lora.target_modules)


def test_a_merged_model_of_an_earlier_state_is_said(inputs, tmp_path):
    settings = {**inputs, "output_dir": tmp_path, "save_steps": 1, "lora_r": 2, "max_steps": 1}
    train(**settings, save_merged=True)
    settings |= {"max_steps": 2, "resume_from_checkpoint": "auto"}
    assert (
        "merged is from an earlier state of the run; --save-merged rewrites it"
        in train(**settings).out
    )
    settings |= {"max_steps": 3, "save_merged": True}
    assert "earlier state" not in train(**settings).out


def test_the_frozen_weights_are_freed_before_merging(inputs, tmp_path, monkeypatch):
    """Merging loads the base again: both at once would need its memory twice.

    Red when `train` keeps its own reference to the base, or `finish` frees nothing.
    """
    from minisft import run

    weights, alive, load, merge = [], [], run.load_base, finish.merge

    def load_base(*args):
        base, state = load(*args)
        weights.append(weakref.ref(base.frozen["model.embed_tokens.weight"]))
        return base, state

    def merge_later(*args, **settings):
        gc.collect()
        alive.append(weights[0]() is not None)
        return merge(*args, **settings)

    monkeypatch.setattr(run, "load_base", load_base)
    monkeypatch.setattr(finish, "merge", merge_later)
    train(**inputs, output_dir=tmp_path, lora_r=2, save_merged=True)
    assert alive == [False]
