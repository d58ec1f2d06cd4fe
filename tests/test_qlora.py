"""Runs on a 4-bit base: what is quantised, recorded, resumed, served and refused."""

import dataclasses
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from minisft.kernels.nf4 import NF4Weight, dequantize, quantize
from runs import (
    ROOT,
    call,
    flags,
    metrics,
    pairs,
    read,
    script,
    train,
    tree,
    write_model,
    write_rows,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minisft.config.errors import UserError
from minisft.config.hf import parse_model_config
from minisft.config.train import TrainConfig
from minisft.files.adapter import base_in_4bit
from minisft.files.export import save_shards
from minisft.files.load import load_base
from minisft.files.quant_state import to_tensors
from minisft.nn import frozen_linear
from minisft.session.memory import resident_gib

STEPS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", pairs(24))


def run(base, rows, out, **settings):
    given = {"max_steps": STEPS, "max_length": 64, "lora_dropout": 0.1, "save_steps": 2}
    train(model=base, dataset=rows, output_dir=out, **given | settings)
    return out


@pytest.fixture(scope="module")
def done(base, rows, tmp_path_factory):
    return run(base, rows, tmp_path_factory.mktemp("done") / "out")


@pytest.fixture(scope="module")
def copy(base, tmp_path_factory):
    """The same base, quantised by scripts/quantize.py."""
    out = tmp_path_factory.mktemp("copy") / "nf4"
    assert call("quantize", flags(model=base, output_dir=out)) == (0, f"saved to {out}\n", "")
    return out


def adapter(out):
    return load_file(out / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ------------------------------------------------------------------------------- what is quantised


def test_the_linears_alone_are_in_4_bits(base):
    model, _ = load_base(TrainConfig(model=str(base), device="cpu"))
    packed = {n for n, w in model.frozen.items() if isinstance(w, NF4Weight)}
    assert packed == {f"{p}.weight" for p in model.cfg.linear_paths()}
    with safe_open(base / "model.safetensors", "pt") as file:
        for name, weight in model.frozen.items():
            stored = file.get_tensor(name)
            if isinstance(weight, NF4Weight):
                assert weight.quant_type == "nf4" and weight.nested_absmax is not None
                assert torch.equal(
                    dequantize(weight, torch.float32), dequantize(quantize(stored), torch.float32)
                )
            else:
                assert torch.equal(weight, stored)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_compute_dtype_does_not_change_the_quantisation(base, dtype):
    """Scales and codes come from the stored values: a GPU in bfloat16 trains the same base."""
    model, _ = load_base(TrainConfig(model=str(base), device="cpu", dtype=dtype))
    plain, _ = load_base(TrainConfig(model=str(base), device="cpu"))
    for name, weight in model.frozen.items():
        if isinstance(weight, NF4Weight):
            other = plain.frozen[name]
            assert all(torch.equal(a, b) for a, b in zip(weight[:6], other[:6], strict=True))
        else:
            assert weight.dtype == getattr(torch, dtype)


def test_sizes_are_known_before_anything_is_loaded(base, copy):
    """Quantised here, stored in 4 bits, or stored so and decoded: to the byte."""
    for source, four_bit in ((base, True), (copy, True), (copy, False)):
        config = TrainConfig(model=str(source), device="cpu", load_in_4bit=four_bit)
        planned = load_base(dataclasses.replace(config, dry_run=True))
        assert resident_gib(*planned) == resident_gib(*load_base(config))


def test_trained_copies_start_from_the_stored_values(base, copy):
    """Of a head in 4 bits there is no copy to train but the decoded one; embeddings are 16-bit."""
    for source in (base, copy):
        config = TrainConfig(
            model=str(source), device="cpu", modules_to_save=("embed_tokens", "lm_head")
        )
        model, state = load_base(config)
        assert not {"model.embed_tokens.weight", "lm_head.weight"} & model.frozen.keys()
        stored = load_file(base / "model.safetensors")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(state.trainable.views[name], stored[name])


@pytest.mark.parametrize("dry_run", [False, True], ids=["", "dry"])
@pytest.mark.parametrize("source", ["base", "copy"])
def test_off_with_full_finetuning_which_says_so(source, dry_run, base, copy, rows, tmp_path):
    given = {"dataset": rows, "output_dir": tmp_path / "out", "max_steps": 1, "max_length": 64}
    model = {"base": base, "copy": copy}[source]
    given |= {"full_finetuning": True, "load_in_4bit": True, "dry_run": dry_run}
    outcome = call("train", flags(model=model, **given))
    if source == "copy":
        assert outcome.code == 2 and "is quantised to 4 bits" in outcome.err
        return
    assert outcome.code == 0
    assert "--load-in-4bit is off" in outcome.out and "--no-load-in-4bit" in outcome.out
    if dry_run:
        return
    assert read(tmp_path / "out/run.json")["config"]["load_in_4bit"] is False


def test_the_run_tells(base, rows, tmp_path):
    given = {"model": base, "dataset": rows, "max_steps": 1, "max_length": 64}
    outcome = train(output_dir=tmp_path / "a", **given)
    assert "14 frozen linears in 4 bits (nf4)" in outcome.out
    outcome = train(output_dir=tmp_path / "b", load_in_4bit=False, **given)
    assert "4 bits" not in outcome.out
    for name, flag in (("a", True), ("b", False)):
        assert read(tmp_path / name / "run.json")["config"]["load_in_4bit"] is flag
        assert base_in_4bit(tmp_path / name) is flag


def test_quantising_while_loading_takes_little_memory(tmp_path):
    """240 MiB in shards of 30: the peak grows by what stays, a shard, a piece being quantised."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    model = write_model(tmp_path / "model", **shape)
    (model / "model.safetensors").unlink()
    shapes = parse_model_config(read(model / "config.json")).weight_shapes()
    weights = ((name, torch.full(shape, 0.02)) for name, shape in shapes.items())
    save_shards(model, weights, torch.float32, max_bytes=30 * 2**20)
    code = """
import re, sys
from minisft.config.train import TrainConfig
from minisft.files.load import load_base
from minisft.kernels.nf4 import quantize
import torch
def peak(): return int(re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
quantize(torch.ones(64, 64))
before = peak()
model, _ = load_base(TrainConfig(model=sys.argv[1], device="cpu", dtype="bfloat16", lora_r=1,
                                  load_in_4bit=sys.argv[2] == "4"))
print(peak() - before)
"""
    grown = {}
    for bits in ("4", "16"):
        command = [sys.executable, "-c", code, str(model), bits]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        grown[bits] = float(done.stdout)
    size = sum(p.stat().st_size for p in model.glob("*.safetensors")) / 2**20
    assert 230 < size < 260
    assert grown["4"] < size / 2 < grown["16"]  # 0.13 size stay, 30 a shard, 48 being quantised


# ---------------------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(48, 32), (9, 7)], ids=str)
def test_frozen_linear_is_that_of_the_decoded_matrix(shape, dtype):
    torch.manual_seed(0)
    weight = quantize(torch.randn(shape))
    bias = torch.randn(shape[0])
    x = torch.randn(5, shape[1]).to(dtype)
    dy = torch.randn(5, shape[0]).to(dtype)
    results = []
    for w in (weight, dequantize(weight, dtype)):
        leaf = x.clone().requires_grad_()
        y = frozen_linear(leaf, w, bias)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, dy)))
    assert results[0][0].dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not frozen_linear(x, weight, None).requires_grad


def test_no_decoded_matrix_outlives_its_product():
    shape = (131, 67)  # found nowhere else in this process
    weight = quantize(torch.randn(shape))
    x = torch.randn(5, shape[1], requires_grad=True)
    gc.collect()
    y = frozen_linear(x, weight, None)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        frozen_linear(x, weight, None)
    assert not [t for t in saved if t.numel() == 131 * 67]
    alive = [o for o in gc.get_objects() if torch.is_tensor(o) and tuple(o.shape) == shape]
    assert not alive
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("how", ["4-bit copy", "decoded copy", "checkpointed"])
def test_the_same_run_by_another_way(how, base, copy, done, rows, tmp_path):
    """Quantised while loading, stored in 4 bits, decoded to float32, or recomputed: one result."""
    settings = {
        "4-bit copy": {"base": copy},
        "decoded copy": {"base": copy, "load_in_4bit": False},
        "checkpointed": {"base": base, "gradient_checkpointing": "block"},
    }[how]
    out = run(settings.pop("base"), rows, tmp_path / "out", **settings)
    assert same(adapter(out), adapter(done))
    assert [m["loss"] for m in metrics(out)] == [m["loss"] for m in metrics(done)]


MIXED = {
    "no q_proj, no gate_proj": lambda n: None if "q_proj" in n or "gate_proj" in n else {},
    "one layer": lambda n: None if "layers.0." in n else {},
    "kinds side by side": lambda n: (
        {"quant_type": "fp4", "blocksize": 128} if "k_proj" in n else {"double_quant": "up" in n}
    ),
}


@pytest.mark.parametrize("kind", MIXED)
def test_both_passes_train_through_what_a_checkpoint_keeps_in_4_bits(kind, rows, tmp_path):
    """Whole rows of scales in each matrix, so that the explicit pass joins those that it can."""
    model = write_model(tmp_path / "model", hidden_size=256, intermediate_size=512)
    tensors = load_file(model / "model.safetensors")
    linears = parse_model_config(read(model / "config.json")).linear_paths()
    for name in [f"{path}.weight" for path in linears]:
        if (settings := MIXED[kind](name)) is not None:
            tensors |= to_tensors(name, quantize(tensors[name], **settings), torch.float32)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    losses = []
    for step_impl in ("explicit", "autograd"):
        out = run(model, rows, tmp_path / step_impl, step_impl=step_impl, lora_dropout=0.0)
        losses.append([m["loss"] for m in metrics(out) if "loss" in m])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][-1] < losses[0][0]


@pytest.mark.filterwarnings("always")
def test_an_adapter_says_on_which_4_bits_it_was_trained(base, done, rows, tmp_path):
    """Merging onto another base warns: the merged model is not the one that was trained."""
    made = flags(model=base, output_dir=tmp_path / "fp4", quant_type="fp4", double_quant=False)
    assert call("quantize", made).code == 0
    out = run(tmp_path / "fp4", rows, tmp_path / "out")
    card = (out / "README.md").read_text()
    assert "in 4 bits (fp4 with single quantisation)" in card and "BitsAndBytesConfig" not in card
    assert "double quantisation" in (done / "README.md").read_text()
    told = f"{out} was trained on a base in 4 bits, fp4 with single quantisation; this one is nf4 "
    for given, warned in ((base, True), (tmp_path / "fp4", False)):
        answer = call("generate", flags(adapter=out, model=given, prompt="x", max_new_tokens=1))
        assert answer.code == 0 and (told in answer.err) == warned
        place = tmp_path / f"merged-{warned}"
        outcome = call("merge", flags(adapter=out, model=given, output_dir=place))
        assert outcome.code == 0 and (told in outcome.err) == warned
    outcome = call("generate", flags(adapter=done, prompt="x", max_new_tokens=1))
    assert outcome.code == 0 and "was trained on" not in outcome.err


def test_16_bits_are_another_run(base, done, rows, tmp_path):
    out = run(base, rows, tmp_path / "out", load_in_4bit=False)
    ours, theirs = (metrics(d)[0]["loss"] for d in (out, done))
    assert ours != theirs and abs(ours - theirs) < 0.05 * theirs


# ---------------------------------------------------------------------------------------- resuming


def test_resumes_bit_for_bit(base, done, rows, tmp_path):
    given = {"max_length": 64, "lora_dropout": 0.1, "save_steps": 2, "output_dir": tmp_path / "out"}
    # The schedule depends on max_steps: a run to the end, then back to its middle.
    run(base, rows, tmp_path / "out")
    given |= {"model": base, "dataset": rows, "max_steps": STEPS}
    (tmp_path / "out/train_output.json").unlink()
    train(**given, resume_from_checkpoint=tmp_path / "out/checkpoint-2")
    assert same(adapter(tmp_path / "out"), adapter(done))


def test_resuming_on_another_base_is_refused(base, done, rows, tmp_path):
    run(base, rows, tmp_path / "out")
    before = tree(tmp_path / "out")
    outcome = call(
        "train",
        flags(
            model=base, dataset=rows, output_dir=tmp_path / "out", max_steps=STEPS, max_length=64,
            lora_dropout=0.1, save_steps=2, resume_from_checkpoint="auto", load_in_4bit=False,
        ),
    )  # fmt: skip
    assert outcome.code == 2
    assert "--load-in-4bit was True, now False" in outcome.err
    assert tree(tmp_path / "out") == before


def test_a_checkpoint_from_before_the_flag_is_16_bit(base, rows, tmp_path):
    """Its run.json and trainer_state.json do not name it."""
    out = run(base, rows, tmp_path / "out", load_in_4bit=False)
    (out / "train_output.json").unlink()
    state = out / "checkpoint-4/trainer_state.json"
    raw = read(state)
    del raw["config"]["load_in_4bit"]
    state.write_text(json.dumps(raw, indent=2) + "\n")
    manifest = next((out / "checkpoint-4").glob("*manifest*"))
    digests = read(manifest)
    digests["files"][state.name] = hashlib.sha256(state.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(digests))
    given = {"model": base, "dataset": rows, "output_dir": out, "max_steps": 6, "max_length": 64}
    given |= {"lora_dropout": 0.1, "save_steps": 2, "resume_from_checkpoint": "auto"}
    outcome = call("train", flags(**given))
    assert outcome.code == 2 and "--load-in-4bit was False, now True" in outcome.err
    assert call("train", flags(**given, load_in_4bit=False)).code == 0


# ----------------------------------------------------------------------------------------- serving


@pytest.mark.parametrize(
    ("trained_on", "asked", "served"),
    [
        ("4 bits", None, True),
        ("4 bits", "false", False),
        ("16 bits", None, False),
        ("16 bits", "true", True),
        (None, None, False),
        (None, "true", True),
    ],
)
def test_an_adapter_is_served_on_the_base_it_was_trained_on(
    trained_on, asked, served, base, done, rows, tmp_path, monkeypatch
):
    settings = {"model": base, "prompt": "What is 1 + 1?", "max_new_tokens": 2}
    if trained_on:
        settings["adapter"] = done
    if trained_on == "16 bits":
        settings["adapter"] = run(base, rows, tmp_path / "out", load_in_4bit=False)
    if asked:
        settings["load_in_4bit"] = asked
    seen = {}
    generate = script("generate").generate

    def watched(model, *rest, **named):
        seen.update(model.frozen)
        return generate(model, *rest, **named)

    monkeypatch.setattr(script("generate"), "generate", watched)
    outcome = call("generate", flags(**settings))
    assert outcome.code == 0, outcome.err
    assert any(isinstance(w, NF4Weight) for w in seen.values()) == served


def test_a_4_bit_checkpoint_is_served_as_it_is(copy):
    settings = {"model": copy, "prompt": "What is 1 + 1?", "max_new_tokens": 8}
    plain = call("generate", flags(**settings))
    decoded = call("generate", flags(**settings, load_in_4bit="false"))
    assert plain.code == 0 and plain.out == decoded.out
    outcome = call("generate", flags(**settings, load_in_4bit="maybe"))
    assert outcome.code == 2 and "expected auto, true or false" in outcome.err


# --------------------------------------------------------------------------------- quantised copies


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "base"}, "--output-dir is missing"),
        ({"output_dir": "out"}, "--model is missing"),
        ({"model": "copy", "output_dir": "out"}, "is already in 4 bits"),
        ({"model": "base", "output_dir": "copy"}, "exists already; choose a new directory"),
        ({"model": "base", "output_dir": "kept"}, "exists already; choose a new directory"),
        ({"model": "base", "output_dir": "out", "quant_type": "nf3"}, "expected nf4 or fp4"),
        ({"model": "base", "output_dir": "out", "dtype": "int8"}, "--dtype is 'int8'"),
    ],
)
def test_what_quantize_refuses(settings, message, base, copy, tmp_path):
    places = {
        "base": base,
        "copy": copy,
        "out": tmp_path / "out",
        "kept": tmp_path / "kept",
    }
    places["kept"].mkdir()
    (places["kept"] / "chat_template.jinja").write_text("mine")
    settings = {k: places.get(v, v) for k, v in settings.items()}
    before = tree(copy), tree(tmp_path)
    outcome = call("quantize", flags(**settings))
    assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1
    assert (tree(copy), tree(tmp_path)) == before


def test_the_copy_appears_whole_or_not_at_all(base, tmp_path, monkeypatch):
    """Another one that took its name meanwhile keeps it; a signal leaves nothing."""
    module = script("quantize")

    def other_first(*args):
        out.mkdir()
        (out / "config.json").write_text("{}")
        return real(*args)

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    real, out = module.save_shards, tmp_path / "out"
    monkeypatch.setattr(module, "save_shards", other_first)
    outcome = call("quantize", flags(model=base, output_dir=out))
    assert outcome.code == 2 and "exists already" in outcome.err
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "config.json").read_text() == "{}"
    monkeypatch.setattr(module, "save_shards", interrupted)
    outcome = call("quantize", flags(model=base, output_dir=tmp_path / "second"))
    assert outcome.code == 75 and "SIGINT: stopped before the copy was complete" in outcome.err
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_auto_keeps_the_dtype_of_the_file_where_config_json_says_none(tmp_path):
    model = write_model(tmp_path / "model")
    config = read(model / "config.json")
    config.pop("dtype", None)
    config.pop("torch_dtype", None)
    (model / "config.json").write_text(json.dumps(config))
    stored = load_file(model / "model.safetensors")["model.norm.weight"].dtype
    assert stored == torch.float32
    assert call("quantize", flags(model=model, output_dir=tmp_path / "out")).code == 0
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == stored


def test_a_copy_is_complete(base, copy, tmp_path):
    assert {p.name for p in copy.iterdir()} >= {p.name for p in base.iterdir()}
    cfg = read(copy / "config.json")
    assert cfg["quantization_config"]["load_in_4bit"] is True and cfg["dtype"] == "float32"
    out = tmp_path / "half"
    assert call("quantize", flags(model=base, output_dir=out, dtype="bfloat16")).code == 0
    stored = load_file(out / "model.safetensors")
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    assert same(
        {n: t for n, t in stored.items() if "absmax" in n},
        {n: t for n, t in load_file(copy / "model.safetensors").items() if "absmax" in n},
    )


def test_weights_that_are_not_finite_are_named(base, rows, tmp_path):
    model = write_model(tmp_path / "model")
    stored = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    stored[name][3, 3] = float("nan")
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} cannot be quantised"):
        load_base(TrainConfig(model=str(model), device="cpu"))
    outcome = call("quantize", flags(model=model, output_dir=tmp_path / "out"))
    assert outcome.code == 2 and f"model.safetensors: {name} cannot be quantised" in outcome.err
    assert "Copy or download the model again" in outcome.err


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "auto"), (1e6, "float16")])
def test_what_is_not_quantised_is_finite_too(value, dtype, tmp_path):
    model = write_model(tmp_path / "model")
    stored = load_file(model / "model.safetensors")
    stored["model.norm.weight"][0] = value
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    outcome = call("quantize", flags(model=model, output_dir=tmp_path / "out", dtype=dtype))
    assert outcome.code == 2 and "model.norm.weight contains a non-finite value" in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_model_that_gives_no_numbers_answers_nothing(tmp_path):
    model = write_model(tmp_path / "model")
    stored = load_file(model / "model.safetensors")
    stored["model.norm.weight"][0] = float("nan")
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    outcome = call("generate", flags(model=model, prompt="x", max_new_tokens=2))
    assert outcome.code == 2 and "logits are not finite" in outcome.err and not outcome.out
