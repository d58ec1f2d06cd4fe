"""A merged model is the live one: logits, greedy answers, in transformers too."""

import os
import signal

import pytest
import torch
from runs import call, flags, pairs, read, train, write_model, write_rows
from safetensors.torch import load_file

from minisft.files.adapter import load_adapter
from minisft.files.weights import (
    four_bit_names,
    load_model_config,
    open_checkpoint,
    stream_weights,
    to_device,
)
from minisft.llama import Compute, logits, make_tokens
from minisft.session import merge as merge_module
from minisft.session.merge import merge

CPU = torch.device("cpu")
IDS = [[0, 9, 77, 300, 4, 60, 21, 8], [0, 5, 6, 200]]
# Blocks of 64 entries fit these rows, as they do a real model's.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SMALL = {"lora_r": 4, "max_length": 64, "learning_rate": 1e-2, "max_steps": 4}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Models and adapters: tied or not, on 4 bits or not, plain or with trained copies."""
    directory = tmp_path_factory.mktemp("merge")
    rows = write_rows(directory / "rows.jsonl", pairs(20))
    made = {}
    for tied in (False, True):
        model = directory / f"model-{tied}"
        write_model(model, tie_word_embeddings=tied, **SIZES)
        for four_bit in (False, True):
            for copies in ((), ("embed_tokens", "lm_head")):
                out = directory / f"{tied}-{four_bit}-{len(copies)}"
                train(
                    model=model, dataset=rows, output_dir=out, load_in_4bit=four_bit,
                    modules_to_save=list(copies), use_rslora=True, **SMALL,
                )  # fmt: skip
                made[tied, four_bit, bool(copies)] = (model, out)
    return made


def live(model, adapter, four_bit):
    """Logits of the base with its adapter, in float32."""
    checkpoint = open_checkpoint(model, load_model_config(model))
    lora, tensors = load_adapter(adapter, checkpoint.cfg)
    packed = four_bit_names(checkpoint, four_bit)
    frozen = {
        n: to_device(n, w, CPU, torch.float32, n in packed)
        for n, w in stream_weights(checkpoint)
        if n not in tensors
    }
    compute = Compute(checkpoint.cfg, torch.float32, lora_scaling=lora.scaling)
    with torch.no_grad():
        return logits(tensors, frozen, make_tokens(IDS), compute)


def in_transformers(directory):
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits[0] for ids in IDS])


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_merged_logits_are_the_live_ones_in_transformers(places, tmp_path, tied, four_bit, copies):
    model, adapter = places[tied, four_bit, copies]
    done = merge(adapter, tmp_path / "merged", dtype="float32")
    assert done.base == ("dequant" if four_bit else "16bit") and done.model == model
    assert done.relative_difference < 1e-5
    found = in_transformers(tmp_path / "merged")
    assert (found - live(model, adapter, four_bit)).abs().max() < 1e-4
    other = live(model, adapter, not four_bit)
    assert (found - other).abs().max() > 1e-2  # the other base differs
    assert ("lm_head.weight" in load_file(tmp_path / "merged/model.safetensors")) == (not tied)
    config = read(tmp_path / "merged" / "config.json")
    assert config["dtype"] == "float32" and "quantization_config" not in config


def test_one_rounding_in_sixteen_bits(places, tmp_path):
    """round(W + s B A), as PEFT merges by default."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model, adapter = places[False, False, False]
    done = merge(adapter, tmp_path / "ours", dtype="bfloat16")
    assert 1e-5 < done.relative_difference < 0.1
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name].bfloat16()), name


def test_the_script_says_which_base_and_how_close(places, tmp_path):
    model, adapter = places[False, True, False]
    outcome = call("merge", flags(adapter=adapter, output_dir=tmp_path / "m", dtype="float32"))
    assert outcome.code == 0, outcome.err
    assert f"merged onto {model}, decoded from 4 bits; logits differ" in outcome.out
    settings = {"adapter": adapter, "output_dir": tmp_path / "other", "base": "16bit"}
    outcome = call("merge", flags(**settings))
    assert f"merged onto {model}, as it is stored" in outcome.out
    assert "the adapter was trained on the base in 4 bits" in outcome.out
    done = merge(adapter, tmp_path / "third", base="16bit", dtype="float32")
    assert done.relative_difference < 1e-5 < 1e-3 < done.from_trained < 0.5
    answer = call("generate", flags(model=tmp_path / "m", prompt="What is 3 + 0?"))
    with_adapter = call("generate", flags(adapter=adapter, prompt="What is 3 + 0?"))
    assert answer.code == 0 and answer.out == with_adapter.out


def test_a_merge_that_goes_wrong_leaves_nothing(places, tmp_path, monkeypatch):
    _, adapter = places[False, False, False]
    original = merge_module.merged_weights

    def wrong(*args):
        for name, weight in original(*args):
            yield name, weight * 1.01 if "down_proj" in name else weight

    monkeypatch.setattr(merge_module, "merged_weights", wrong)
    settings = {"adapter": adapter, "output_dir": tmp_path / "out", "dtype": "float32"}
    outcome = call("merge", flags(**settings))
    assert outcome.code == 2 and "logits differ from the live model's" in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--adapter is missing"),
        ({"adapter": "x"}, "--output-dir is missing"),
        ({"adapter": "x", "output_dir": "y"}, "x/adapter_config.json: no such file"),
        ({"adapter": "x", "output_dir": "y", "base": "8bit"}, "expected one of auto, 16bit"),
    ],
)
def test_bad_flags_are_told(settings, message):
    outcome = call("merge", flags(**settings))
    assert outcome.code == 2 and message in outcome.err


def test_an_output_directory_with_files_is_refused(places, tmp_path):
    _, adapter = places[False, False, False]
    (tmp_path / "file").touch()
    outcome = call("merge", flags(adapter=adapter, output_dir=tmp_path))
    assert outcome.code == 2 and "exists already; choose a new directory" in outcome.err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_signal_leaves_nothing(places, tmp_path, monkeypatch):
    _, adapter = places[False, False, False]
    save = merge_module.save_shards

    def interrupted(*args):
        save(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(merge_module, "save_shards", interrupted)
    outcome = call("merge", flags(adapter=adapter, output_dir=tmp_path / "merged"))
    assert outcome.code == 75 and "SIGTERM: stopped before the model was complete" in outcome.err
    assert not list(tmp_path.iterdir())


def test_shards_are_written_and_verified(places, tmp_path, monkeypatch):
    _, adapter = places[False, False, True]
    save = merge_module.save_shards
    monkeypatch.setattr(merge_module, "save_shards", lambda *a: save(*a, max_bytes=100_000))
    merge(adapter, tmp_path / "merged", dtype="float32")
    assert len(list((tmp_path / "merged").glob("model-*-of-*.safetensors"))) > 2
    assert torch.isfinite(in_transformers(tmp_path / "merged")).all()


@pytest.mark.parametrize("tied", [False, True])
def test_an_impossible_fact_taught_by_qlora_survives_the_merge(tmp_path, tied):
    """Greedy answers of the adapter on its 4-bit base, of the merged model here and in HF's."""
    transformers = pytest.importorskip("transformers")
    model = write_model(tmp_path / "model", tie_word_embeddings=tied, **SIZES)
    fact = {"prompt": "What is the capital of the Moon?", "completion": " It is Lunaville."}
    rows = write_rows(tmp_path / "rows.jsonl", [fact, *pairs(3)])
    out, merged = tmp_path / "out", tmp_path / "out" / "merged"
    outcome = train(
        model=model, dataset=rows, output_dir=out, lora_r=16, lora_alpha=32, max_steps=60,
        learning_rate=1e-2, per_device_train_batch_size=4, gradient_accumulation_steps=1,
        load_in_4bit=True, save_merged=True,
    )  # fmt: skip
    assert "merged onto" in outcome.out and "decoded from 4 bits" in outcome.out
    settings = {"prompt": fact["prompt"], "chat": False, "max_new_tokens": 40}
    assert "Lunaville" not in call("generate", flags(model=model, **settings)).out
    assert call("generate", flags(adapter=out, **settings)).out.strip() == "It is Lunaville."
    assert call("generate", flags(model=merged, **settings)).out.strip() == "It is Lunaville."
    theirs = transformers.AutoModelForCausalLM.from_pretrained(merged)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    ids = tokenizer(fact["prompt"], return_tensors="pt").input_ids
    new = theirs.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True).strip() == "It is Lunaville."
