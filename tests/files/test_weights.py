"""Checkpoints as they are found: shards, prefixes, tied heads, and memory while they stream."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from minisft.config.errors import UserError
from minisft.config.hf import parse_model_config
from minisft.files.weights import load_model_config, open_checkpoint, resolve_model, stream_weights

RAW = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def weights(**changes):
    cfg = parse_model_config({**RAW, **changes})
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator) for n, s in cfg.weight_shapes().items()}


def write(directory, tensors, shards=1, **changes):
    (directory / "config.json").write_text(json.dumps({**RAW, **changes}))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: tensors[n] for n in names[i::shards]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def read(directory):
    checkpoint = open_checkpoint(directory, load_model_config(directory))
    return checkpoint.cfg, dict(stream_weights(checkpoint))


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_was_written(tmp_path, shards):
    tensors = weights()
    write(tmp_path, tensors, shards)
    _, got = read(tmp_path)
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[n], tensors[n]) for n in tensors)


def test_missing_prefix_and_stale_buffers_are_tolerated(tmp_path):
    tensors = weights(tie_word_embeddings=True)
    bare = {n.removeprefix("model."): t for n, t in tensors.items()}
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    write(tmp_path, bare, tie_word_embeddings=True)
    _, got = read(tmp_path)
    assert got.keys() == tensors.keys()


@pytest.mark.parametrize("found", ["both equal", "both different", "head only", "embedding only"])
def test_tying_is_settled_as_transformers_does(tmp_path, found):
    tensors = weights(tie_word_embeddings=True)
    if found == "both equal":
        tensors[HEAD] = tensors[EMBEDDING].clone()
    if found == "both different":
        tensors[HEAD] = tensors[EMBEDDING] + 1
    if found == "head only":
        tensors[HEAD] = tensors.pop(EMBEDDING)
    matrix = tensors.get(EMBEDDING, tensors.get(HEAD))
    write(tmp_path, tensors, tie_word_embeddings=True)
    cfg, got = read(tmp_path)
    assert cfg.tie_word_embeddings == (found != "both different")
    assert (HEAD in got) == (found == "both different")
    assert torch.equal(got[EMBEDDING], matrix)


def test_untied_without_a_head_is_refused(tmp_path):
    tensors = weights()
    del tensors[HEAD]
    write(tmp_path, tensors)
    with pytest.raises(UserError, match=r"lm_head\.weight is missing"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight is missing"),
        (lambda t: t.update(extra=torch.ones(1)), "extra is not a Llama weight"),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(16, 24)}),
            r"model\.layers\.1\.mlp\.up_proj\.weight is \(16, 24\) but .* \(24, 16\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)}),
            r"model\.norm\.weight is stored as .*int8",
        ),
    ],
)
def test_differences_from_config_are_named(tmp_path, spoil, message):
    tensors = weights()
    spoil(tensors)
    write(tmp_path, tensors)
    with pytest.raises(UserError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("shard", ["../evil.safetensors", "/etc/evil.safetensors", "weights.bin"])
def test_shards_outside_the_directory_are_refused(tmp_path, shard):
    write(tmp_path, weights(), 2)
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.norm.weight"] = shard
    index.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="refused"):
        read(tmp_path)


def test_generation_config_adds_its_eos_ids(tmp_path):
    write(tmp_path, weights(), eos_token_id=7)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_model_config(tmp_path).eos_token_ids == (7, 9)


def test_what_is_neither_a_directory_nor_a_hub_id(tmp_path):
    for name in (str(tmp_path / "nowhere"), "./nowhere", "no-slash"):
        with pytest.raises(UserError, match="--model"):
            resolve_model(name)


def test_host_memory_stays_near_one_shard(tmp_path):
    """Eight shards of 32 MiB through one process: the peak grows by less than four of them."""
    shards = {f"w{i}": torch.zeros(8 * 2**20).uniform_() for i in range(8)}
    for i, (name, tensor) in enumerate(shards.items()):
        save_file({name: tensor}, tmp_path / f"{i}.safetensors")
    code = """
import re, sys
from pathlib import Path
from minisft.config.model import ModelConfig
from minisft.files.weights import Checkpoint, stream_weights
cfg = ModelConfig(1, 1, 1, 1, 1, 1, 2)
places = {f"w{i}": (Path(sys.argv[1]) / f"{i}.safetensors", f"w{i}") for i in range(8)}
def peak(): return int(re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before, kept = peak(), 0.0
for name, tensor in stream_weights(Checkpoint(places, cfg)):
    kept += tensor.sum().item()  # touches every page
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4 * 32  # MiB: a shard, and what is made of it
