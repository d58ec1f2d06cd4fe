"""4-bit models of transformers + bitsandbytes load here, and ours there: equal weights and logits.

bitsandbytes is compared in training mode, for in eval mode it may repack weights on a CPU, and with
in_features that are multiples of 64, where its CPU decode is right.
"""

import shlex

import bitsandbytes
import pytest
import torch
from minisft.kernels.nf4 import NF4Weight, dequantize
from runs import call, flags, pairs, read, train, write_rows
from safetensors import safe_open
from test_adapter_peft import peft
from tiny_tokenizer import write_byte_level
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from minisft.config.lora import LoraConfig
from minisft.config.targets import adapter_shapes
from minisft.files.adapter import load_adapter
from minisft.files.export import save_shards
from minisft.files.weights import (
    four_bit_names,
    load_model_config,
    open_checkpoint,
    stream_weights,
    to_device,
)
from minisft.llama import Compute, logits, make_tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]
BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "attention_bias": True,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LORA = LoraConfig(r=4, lora_alpha=6)
CPU = torch.device("cpu")


def save_base(directory, dtype=torch.float32, **changes):
    """A random 16- or 32-bit Llama in transformers' files."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**BASE | changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(0, 0.3)
    model.to(dtype).save_pretrained(directory)
    return directory


def save_theirs(directory, dtype=torch.float32, changes=None, shard="5GB", **settings):
    """The same Llama quantised and saved by transformers."""
    source = save_base(directory / "base", dtype, **(changes or {}))
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=settings.pop("compute", dtype), **settings
    )
    model = load_theirs(source, dtype, quantization_config=quantization)
    model.save_pretrained(directory / "saved", max_shard_size=shard)
    return directory / "saved"


def load_theirs(directory, dtype, **settings):
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, device_map="cpu", attn_implementation="sdpa", **settings
    )


def load_ours(directory, dtype, load_in_4bit=True):
    """(config, weights) as a run holds them."""
    checkpoint = open_checkpoint(directory, load_model_config(directory))
    names = four_bit_names(checkpoint, load_in_4bit)
    weights = {
        name: to_device(name, weight, CPU, dtype, name in names)
        for name, weight in stream_weights(checkpoint)
    }
    return checkpoint.cfg, weights


def their_matrices(model, dtype):
    """Path -> decoded matrix of every linear in 4 bits."""
    out = {}
    for path, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            state.dtype = dtype
            out[f"{path}.weight"] = bitsandbytes.functional.dequantize_4bit(
                module.weight.data, state
            )
    return out


def assert_same_weights(weights, model, dtype):
    theirs = their_matrices(model, dtype)
    ours = {name for name, weight in weights.items() if isinstance(weight, NF4Weight)}
    assert ours == theirs.keys() and len(ours) == 14
    for name, matrix in theirs.items():
        assert torch.equal(dequantize(weights[name], dtype), matrix), name
    plain = model.state_dict()
    for name in weights.keys() - ours:
        assert torch.equal(weights[name], plain[name].to(dtype)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_tensors_saved_by_bitsandbytes(quant_type, double, storage, dtype, tmp_path):
    """Every format of the 4-bit tensors themselves, read from a file that transformers wrote."""
    if storage != "uint8" and dtype != torch.bfloat16:
        pytest.skip("storage and dtype are independent: each is varied alone")
    path = save_theirs(
        tmp_path,
        dtype,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_quant_storage=storage,
    )
    with safe_open(path / "model.safetensors", "pt") as file:
        packed = file.get_tensor("model.layers.0.mlp.up_proj.weight")
    assert packed.dtype == getattr(torch, storage)
    _, weights = load_ours(path, dtype)
    model = load_theirs(path, dtype)
    assert_same_weights(weights, model, dtype)
    some = weights["model.layers.0.mlp.up_proj.weight"]
    assert (some.quant_type, some.nested_absmax is not None) == (quant_type, double)


def gradients(loss, leaves):
    return dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))


@pytest.mark.parametrize("checkpoint_blocks", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_train_mode_logits_and_lora_gradients(quant_type, dtype, checkpoint_blocks, tmp_path):
    path = save_theirs(
        tmp_path, dtype, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=True
    )
    cfg, weights = load_ours(path, dtype)
    config = peft.LoraConfig(
        r=LORA.r, lora_alpha=LORA.lora_alpha, target_modules=list(LORA.target_modules)
    )
    model = peft.get_peft_model(load_theirs(path, dtype), config, autocast_adapter_dtype=False)
    model.train()
    generator = torch.Generator().manual_seed(1)
    shapes = adapter_shapes(LORA, cfg)
    ours = {
        n: (torch.randn(s, generator=generator) * 0.1).to(dtype).requires_grad_()
        for n, s in shapes.items()
    }
    theirs = {
        n.removeprefix("base_model.model.").replace(".default", ""): p
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        for name, p in theirs.items():
            p.data = ours[name].detach().clone()
    ids = torch.randint(97, (2, 24), generator=generator)
    dy = torch.randn(2, 24, 97, generator=generator).to(dtype)
    expected = model(input_ids=ids, use_cache=False).logits
    compute = Compute(cfg, dtype, lora_scaling=LORA.scaling, checkpoint_blocks=checkpoint_blocks)
    got = logits(ours, weights, make_tokens(ids.tolist()), compute).view_as(expected)
    assert torch.equal(got, expected)
    ours_grad, theirs_grad = (
        gradients((got * dy).sum(), ours),
        gradients((expected * dy).sum(), theirs),
    )
    exact = {n: p.detach().double().requires_grad_() for n, p in ours.items()}
    doubles = {
        n: (dequantize(w, torch.float32) if isinstance(w, NF4Weight) else w).double()
        for n, w in weights.items()
    }
    compute = Compute(cfg, torch.float64, lora_scaling=LORA.scaling)
    true = logits(exact, doubles, make_tokens(ids.tolist()), compute).view_as(expected)
    exact_grad = gradients((true * dy.double()).sum(), exact)
    for name, want in exact_grad.items():
        error = (ours_grad[name].double() - want).norm()
        bound = 3 * (theirs_grad[name].double() - want).norm()
        assert error <= bound, (name, error, bound)
        assert want.norm() > 0


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_shards_cut_anywhere(changes, tmp_path):
    """transformers' shards may part a matrix from its scales."""
    path = save_theirs(tmp_path, changes=changes, shard="3KB", bnb_4bit_use_double_quant=True)
    files = read(path / "model.safetensors.index.json")["weight_map"]
    parted = [n for n in files if n.endswith(".absmax") and files[n] != files[n[: -len(".absmax")]]]
    assert parted
    _, weights = load_ours(path, torch.float32)
    assert_same_weights(weights, load_theirs(path, torch.float32), torch.float32)


@pytest.mark.parametrize(
    ("skip", "expected"),
    [
        (None, "all but the head"),
        (["lm_head"], "all but the head"),
        ([], "all and the head"),
        (["up_proj", "lm_head"], "no up_proj"),
    ],
)
def test_what_is_left_in_16_bits_stays_so(skip, expected, tmp_path):
    path = save_theirs(tmp_path, llm_int8_skip_modules=skip)
    cfg, weights = load_ours(path, torch.float32)
    four_bit = {n for n, w in weights.items() if isinstance(w, NF4Weight)}
    linears = {f"{p}.weight" for p in cfg.linear_paths()}
    if expected == "no up_proj":
        linears = {n for n in linears if "up_proj" not in n}
    assert four_bit == linears
    model = load_theirs(path, torch.float32)
    theirs = their_matrices(model, torch.float32)
    assert ("lm_head.weight" in theirs) == (expected == "all and the head")
    if "lm_head.weight" in theirs:  # decoded, for the head is never in 4 bits here
        assert torch.equal(weights["lm_head.weight"], theirs["lm_head.weight"])
    ids = torch.randint(97, (1, 9), generator=torch.Generator().manual_seed(0))
    got = logits({}, weights, make_tokens(ids.tolist()), Compute(cfg))
    assert torch.equal(got, model.train()(ids, use_cache=False).logits[0])


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_what_we_quantise_loads_in_transformers(quant_type, double, changes, tmp_path, monkeypatch):
    write_byte_level(tmp_path / "base")
    dtype = torch.bfloat16 if double else torch.float32
    source = save_base(tmp_path / "base", dtype, **changes)
    if double:  # shards that part a matrix from its scales
        monkeypatch.setattr(save_shards, "__defaults__", (3000,))
    outcome = call(
        "quantize",
        flags(model=source, output_dir=tmp_path / "q", quant_type=quant_type, double_quant=double),
    )
    assert outcome.code == 0, outcome.err
    assert (len(list((tmp_path / "q").glob("*.safetensors"))) > 20) == double
    model, found = load_theirs(tmp_path / "q", dtype, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    cfg, weights = load_ours(tmp_path / "q", dtype)
    assert_same_weights(weights, model, dtype)
    some = weights["model.layers.0.mlp.up_proj.weight"]
    assert (some.quant_type, some.nested_absmax is not None) == (quant_type, double)
    # The copy is what a run of the source trains through, where the format is the same.
    if (quant_type, double) == ("nf4", True):
        _, live = load_ours(source, dtype)
        for name, weight in live.items():
            if isinstance(weight, NF4Weight):
                weight, weights[name] = dequantize(weight, dtype), dequantize(weights[name], dtype)
            assert torch.equal(weight, weights[name]), name
    _, weights = load_ours(tmp_path / "q", dtype)
    ids = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))
    got = logits({}, weights, make_tokens(ids.tolist()), Compute(cfg, dtype))
    assert torch.equal(got.view(2, 12, -1), model.train()(ids, use_cache=False).logits)


def test_decoded_where_asked(tmp_path):
    """--no-load-in-4bit on a 4-bit checkpoint: plain matrices, of equal values."""
    path = save_theirs(tmp_path, bnb_4bit_use_double_quant=True)
    _, packed = load_ours(path, torch.float32)
    _, plain = load_ours(path, torch.float32, load_in_4bit=False)
    for name, weight in packed.items():
        matrix = dequantize(weight, torch.float32) if isinstance(weight, NF4Weight) else weight
        assert torch.equal(plain[name], matrix), name


def test_an_adapter_of_a_run_in_peft_on_the_4_bit_copy(tmp_path):
    """What the README says: the copy is the base that the run trained through."""
    write_byte_level(tmp_path / "base")
    base = save_base(tmp_path / "base", vocab_size=384)
    rows = write_rows(tmp_path / "rows.jsonl", pairs(8))
    settings = {"dataset": rows, "max_steps": 3, "learning_rate": 1e-2}
    done = train(model=base, output_dir=tmp_path / "out", **settings)
    call("quantize", flags(model=base, output_dir=tmp_path / "q"))
    cfg, weights = load_ours(base, torch.float32)
    lora, tensors = load_adapter(tmp_path / "out", cfg)
    ids = torch.randint(384, (2, 12), generator=torch.Generator().manual_seed(0))
    compute = Compute(cfg, lora_scaling=lora.scaling)
    got = logits(tensors, weights, make_tokens(ids.tolist()), compute).view(2, 12, -1)
    copy = load_theirs(tmp_path / "q", torch.float32)
    model = peft.PeftModel.from_pretrained(copy, tmp_path / "out").train()
    assert torch.equal(got, model(input_ids=ids, use_cache=False).logits)
    plain = logits({}, weights, make_tokens(ids.tolist()), compute).view(2, 12, -1)
    assert (got - plain).abs().max() > 1e-3
    card = (tmp_path / "out/README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/directory", "{}")
    assert "quantization_config" in code
    (printed,) = (line for line in done.out.splitlines() if line.startswith("transformers: "))
    for lines in (code.replace("{}", str(tmp_path / "out")), shlex.split(printed)[3]):
        given = {}
        exec(lines, given)
        near = given["model"].train()(input_ids=ids, use_cache=False).logits
        # Not always equal: bitsandbytes rounds the scales through a coarser table on a CPU.
        assert (near - got).norm() < 0.02 * got.norm()
    full = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    away = full.train()(input_ids=ids, use_cache=False).logits
    assert (away - got).norm() > 0.02 * got.norm()
    assert (plain - got).norm() > 0.02 * got.norm()


def test_a_base_stored_in_4_bits_needs_no_config(tmp_path):
    """The lines that a run prints load its adapter on the base as transformers reads it."""
    base = save_theirs(tmp_path, changes={"vocab_size": 384}, bnb_4bit_use_double_quant=True)
    write_byte_level(base)
    rows = write_rows(tmp_path / "rows.jsonl", pairs(8))
    done = train(model=base, dataset=rows, output_dir=tmp_path / "out", max_steps=1)
    assert "quantization" not in done.out.partition("transformers: ")[2]
