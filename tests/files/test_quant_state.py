"""4-bit checkpoints without bitsandbytes: read back, placed, and refused by the tensor's name."""

import json

import pytest
import torch
from minisft.kernels.nf4 import NF4Weight, dequantize, quantize
from runs import CONFIG
from safetensors.torch import save_file

from minisft.config.errors import UserError
from minisft.config.hf import parse_model_config
from minisft.files.quant_state import to_tensors
from minisft.files.weights import (
    four_bit_names,
    load_model_config,
    open_checkpoint,
    stream_weights,
    to_device,
)

NAME = "model.layers.0.mlp.up_proj.weight"  # [48, 32] in test's model: 24 blocks
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
JSON = STATE.removeprefix(f"{NAME}.")
CPU = torch.device("cpu")


def quantised(double_quant=True, quant_type="nf4", blocksize=64, **changes):
    """The tensors of a 4-bit model, and its matrices."""
    cfg = parse_model_config(CONFIG | changes)
    generator = torch.Generator().manual_seed(0)
    linears = {f"{p}.weight" for p in cfg.linear_paths()}
    tensors, matrices = {}, {}
    for name, shape in cfg.weight_shapes().items():
        tensor = torch.randn(shape, generator=generator)
        if name not in linears:
            tensors[name] = tensor
            continue
        weight = quantize(
            tensor, quant_type=quant_type, double_quant=double_quant, blocksize=blocksize
        )
        tensors |= to_tensors(name, weight, torch.bfloat16)
        matrices[name] = dequantize(weight, torch.float32)
    return tensors, matrices


def write(directory, tensors, **changes):
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file(tensors, directory / "model.safetensors")


def read(directory):
    checkpoint = open_checkpoint(directory, load_model_config(directory))
    return checkpoint, dict(stream_weights(checkpoint))


def edit(**changes):
    """A change of the JSON of one quant state; None removes a key."""

    def apply(tensors):
        raw = json.loads(bytes(tensors[STATE].tolist())) | changes
        raw = {k: v for k, v in raw.items() if v is not None}
        tensors[STATE] = torch.tensor(list(json.dumps(raw).encode()), dtype=torch.uint8)

    return apply


def replace(member, make):
    """Another tensor in place of NAME.member (or of the packed weights)."""
    key = f"{NAME}.{member}" if member else NAME

    def apply(tensors):
        tensors[key] = make(tensors[key]).clone()

    return apply


def rename(old, new):
    def apply(tensors):
        tensors[f"{NAME}.{new}"] = tensors.pop(f"{NAME}.{old}")

    return apply


def remove(*members):
    def apply(tensors):
        for member in members:
            del tensors[f"{NAME}.{member}"]

    return apply


def poison(tensor, value):
    tensor = tensor.clone()
    tensor[-1] = value
    return tensor


@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("bare", [False, True], ids=["", "bare"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_reads_what_was_written(double_quant, bare, blocksize, tmp_path):
    tensors, matrices = quantised(double_quant, blocksize=blocksize)
    if bare:
        tensors = {n.removeprefix("model."): t for n, t in tensors.items()}
    write(tmp_path, tensors)
    checkpoint, weights = read(tmp_path)
    assert weights.keys() == checkpoint.cfg.weight_shapes().keys()
    names = four_bit_names(checkpoint, True)
    assert names == matrices.keys()
    for name, matrix in matrices.items():
        kept = to_device(name, weights[name], CPU, torch.float32, True)
        assert isinstance(kept, NF4Weight) and kept.shape == matrix.shape
        assert torch.equal(dequantize(kept, torch.float32), matrix)
        assert torch.equal(to_device(name, weights[name], CPU, torch.float32, False), matrix)


@pytest.mark.parametrize("storage", [torch.int8, torch.bfloat16, torch.float16, torch.float32])
def test_packed_bytes_may_be_stored_as_another_dtype(storage, tmp_path):
    tensors, matrices = quantised()
    for name in matrices:
        tensors[name] = tensors[name].flatten().view(storage).unsqueeze(1)
    write(tmp_path, tensors)
    _, weights = read(tmp_path)
    for name, matrix in matrices.items():
        assert torch.equal(dequantize(weights[name], torch.float32), matrix)


@pytest.mark.parametrize(
    ("spoil", "named", "message"),
    [
        (replace("", lambda t: t[:-1]), NAME, "767 bytes; .* one column of 768"),
        (replace("", lambda t: t.T.contiguous()), NAME, "one column"),
        (replace("", lambda t: t.flatten().view(torch.int32).unsqueeze(1)), NAME, "int32"),
        (lambda t: t.pop(NAME), NAME, "is missing, but its quant state is there"),
        (replace("absmax", lambda t: t[:-1]), f"{NAME}.absmax", r"\[23\]; .* \[24\]"),
        (replace("absmax", lambda t: t.float()), f"{NAME}.absmax", "float32.*uint8"),
        (replace("absmax", lambda t: t.unsqueeze(1)), f"{NAME}.absmax", r"\[24, 1\]"),
        (remove("absmax"), f"{NAME}.absmax", "is missing"),
        (remove("quant_map"), f"{NAME}.quant_map", "is missing"),
        (replace("quant_map", lambda t: t[:8]), f"{NAME}.quant_map", r"\[8\]"),
        (replace("quant_map", lambda t: t.half()), f"{NAME}.quant_map", "float16"),
        (replace("quant_map", lambda t: t.flip(0)), f"{NAME}.quant_map", "not the code of nf4"),
        (remove("nested_absmax"), f"{NAME}.nested_absmax", "is missing"),
        (remove("nested_quant_map"), f"{NAME}.nested_quant_map", "is missing"),
        (replace("nested_absmax", lambda t: t.repeat(2)), f"{NAME}.nested_absmax", r"\[2\]"),
        (replace("nested_quant_map", lambda t: t[1:]), f"{NAME}.nested_quant_map", r"\[255\]"),
        (
            replace("nested_absmax", lambda t: poison(t, torch.inf)),
            f"{NAME}.nested_absmax",
            "not finite",
        ),
        (
            replace("nested_quant_map", lambda t: poison(t, torch.nan)),
            f"{NAME}.nested_quant_map",
            "not finite",
        ),
        (
            lambda t: [t[f"{NAME}.nested_{x}"].fill_(1e30) for x in ("absmax", "quant_map")],
            f"{NAME}.absmax",
            "decodes to scales that are not finite",
        ),
        (lambda t: t.pop(STATE), NAME, r"whose quant state .* is missing"),
        (
            lambda t: [t.pop(k) for k in list(t) if k.startswith(f"{NAME}.")],
            NAME,
            "stored as torch.uint8",
        ),
        (replace(JSON, lambda t: t[:-5]), STATE, "is not JSON"),
        (replace(JSON, lambda t: poison(t, 255)), STATE, "is not JSON"),
        (replace(JSON, lambda t: t.float()), STATE, "uint8 JSON text"),
        (replace(JSON, lambda t: t.repeat(1000)), STATE, "65536 bytes"),
        (
            lambda t: t.update({STATE: torch.tensor(list(b"[64]"), dtype=torch.uint8)}),
            STATE,
            "not a JSON object",
        ),
        (edit(quant_type="fp4"), STATE, "quant_type='fp4'; expected 'nf4'"),
        (edit(quant_type=None), STATE, "quant_type=missing"),
        (edit(blocksize=63), STATE, "blocksize=63; expected one of 32, 64"),
        (edit(blocksize=128), f"{NAME}.absmax", r"implies .*\[12\]"),
        (edit(blocksize="64"), STATE, "blocksize='64'"),
        (edit(blocksize=None), STATE, "blocksize=missing"),
        (edit(shape=[32, 48]), NAME, r"\(32, 48\) but config.json implies \(48, 32\)"),
        (edit(shape=[48, 33]), f"{NAME}.absmax", r"\[25\]"),
        (edit(shape=[48]), STATE, r"shape=\[48\]; expected \[out, in\]"),
        (edit(shape=[48, -32]), STATE, "shape="),
        (edit(shape=[48.0, 32]), STATE, "shape="),
        (edit(shape=None), STATE, "shape=missing"),
        (edit(dtype="int4"), STATE, "dtype='int4'"),
        (edit(nested_blocksize=128), STATE, "nested_blocksize=128; expected 256"),
        (edit(nested_blocksize=None), STATE, "nested_blocksize=missing"),
        (edit(nested_dtype="bfloat16"), STATE, "nested_dtype='bfloat16'"),
        (edit(nested_offset=float("nan")), STATE, "nested_offset=nan; expected a finite number"),
        (edit(nested_offset=1e39), STATE, r"nested_offset=1e\+39; expected a finite number"),
        (edit(nested_offset=True), STATE, "nested_offset=True; expected a finite number"),
        (edit(nested_offset="0.1"), STATE, "nested_offset='0.1'"),
        (edit(nested_offset=None), STATE, "nested_offset=missing"),
        (
            edit(nested_blocksize=None, nested_dtype=None, nested_offset=None),
            f"{NAME}.absmax",
            "uint8 .* implies torch.float32",
        ),
        (
            rename(JSON, "quant_state.bitsandbytes__int3"),
            f"{NAME}.quant_state.bitsandbytes__int3",
            "not known; expected bitsandbytes__nf4 and bitsandbytes__fp4",
        ),
        (
            rename(JSON, "quant_state.awq__nf4"),
            f"{NAME}.quant_state.awq__nf4",
            "not known",
        ),
        (
            lambda t: t.update({STATE.replace("nf4", "fp4"): t[STATE].clone()}),
            NAME,
            "two quant states",
        ),
        (
            lambda t: t.update({k.replace("s.0.", "s.9."): v.clone() for k, v in list(t.items())}),
            "model.layers.9",
            "not a Llama weight",
        ),
    ],
)
def test_a_damaged_quant_state_is_refused_by_name(spoil, named, message, tmp_path):
    tensors, _ = quantised()
    spoil(tensors)
    write(tmp_path, tensors)
    with pytest.raises(UserError, match=message) as e:
        read(tmp_path)
    assert named in str(e.value) and "\n" not in str(e.value)


def test_an_offset_that_json_writes_as_an_integer_is_a_number(tmp_path):
    tensors, _ = quantised()
    edit(nested_offset=0)(tensors)
    write(tmp_path, tensors)
    _, weights = read(tmp_path)
    assert weights[NAME].nested_offset.item() == 0


@pytest.mark.parametrize(
    ("spoil", "named", "message"),
    [
        (
            lambda t: t.update({f"{NAME}.nested_absmax": torch.ones(1)}),
            f"{NAME}.nested_absmax",
            "says nothing of double",
        ),
        (
            replace("absmax", lambda t: poison(t, torch.nan)),
            f"{NAME}.absmax",
            "not finite",
        ),
        (replace("absmax", lambda t: t.half()), f"{NAME}.absmax", "float16"),
    ],
)
def test_single_quantisation_is_checked_too(spoil, named, message, tmp_path):
    tensors, _ = quantised(double_quant=False)
    spoil(tensors)
    write(tmp_path, tensors)
    with pytest.raises(UserError, match=message) as e:
        read(tmp_path)
    assert named in str(e.value)


def test_only_linears_may_be_in_4_bits(tmp_path):
    tensors, _ = quantised()
    embedding = "model.embed_tokens.weight"
    tensors |= to_tensors(embedding, quantize(tensors[embedding]), torch.bfloat16)
    write(tmp_path, tensors)
    with pytest.raises(UserError, match=r"embed_tokens\.weight is in 4 bits; only linears"):
        read(tmp_path)


def test_a_tied_head_in_4_bits_is_refused(tmp_path):
    tensors, _ = quantised()
    tensors |= to_tensors("lm_head.weight", quantize(tensors["lm_head.weight"]), torch.bfloat16)
    write(tmp_path, tensors, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head\.weight is in 4 bits, but config\.json ties it"):
        read(tmp_path)


def test_values_that_are_not_finite_are_named():
    weight = torch.ones(8, 64)
    weight[3, 3] = torch.nan
    with pytest.raises(UserError, match=rf"{NAME} cannot be quantised: .* not finite"):
        to_device(NAME, weight, CPU, torch.float32, True)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method='gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "without load_in_4bit"),
        ({"quant_method": "awq", "load_in_4bit": True}, "quant_method='awq'"),
        ("nf4", "expected a JSON object"),
    ],
)
def test_other_quantisations_are_refused(quantization, message):
    with pytest.raises(UserError, match=message):
        parse_model_config(CONFIG | {"quantization_config": quantization})


@pytest.mark.parametrize("method", [{"quant_method": "bitsandbytes"}, {}])
def test_bitsandbytes_4_bit_is_accepted(method):
    quantization = {"load_in_4bit": True, **method}
    raw = CONFIG | {"quantization_config": quantization}
    assert parse_model_config(raw) == parse_model_config(CONFIG)
