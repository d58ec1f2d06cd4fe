"""Logits equal to transformers bit for bit, gradients to 1e-5, RoPE frequencies compared."""

import json

import pytest
import torch
from minisft.kernels.linear_cross_entropy import linear_cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minisft.config.hf import parse_model_config
from minisft.files.weights import load_model_config, open_checkpoint, stream_weights
from minisft.llama import Compute, logits, make_tokens
from minisft.rope import rope_inverse_frequencies

BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "both_biases_tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "wide_heads": {"head_dim": 32},
    "narrow_heads": {"head_dim": 8, "num_key_value_heads": 4},
    "theta_and_eps": {"rope_theta": 500000.0, "rms_norm_eps": 1e-5},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}},
    "dynamic": {
        "max_position_embeddings": 24,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    },
    "llama3": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": YARN},
    "yarn_mscale": {
        "rope_parameters": {
            **YARN,
            "mscale": 1.2,
            "mscale_all_dim": 0.7,
            "beta_fast": 20,
            "truncate": False,
        }
    },
}
LENGTH = 48


def save_random_llama(directory, seed=0, **changes):
    """A random Llama in transformers' files; norms and biases are random too: ones hide bugs."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**BASE, **changes}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.uniform_(0.5, 1.5) if "norm" in name else p.normal_(0, 0.3)
    model.save_pretrained(directory)


def load_minisft(directory, dtype):
    checkpoint = open_checkpoint(directory, load_model_config(directory))
    weights = {name: t.to(dtype) for name, t in stream_weights(checkpoint)}
    return checkpoint.cfg, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, dtype, tmp_path):
    save_random_llama(tmp_path, **CONFIGS[name])
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    cfg, weights = load_minisft(tmp_path, dtype)
    ids = torch.randint(
        0, BASE["vocab_size"], (1, LENGTH), generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        want = reference(input_ids=ids, use_cache=False).logits[0]
        got = logits({}, weights, make_tokens([ids[0].tolist()]), Compute(cfg, dtype))
    assert got.dtype == dtype
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_match_transformers(name, tmp_path):
    save_random_llama(tmp_path, **CONFIGS[name])
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    cfg, weights = load_minisft(tmp_path, torch.float32)
    ids = torch.randint(
        0, BASE["vocab_size"], (1, LENGTH), generator=torch.Generator().manual_seed(1)
    )
    loss = reference(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    from minisft.llama import head_weight, hidden_states

    trained = {n: w.clone().requires_grad_() for n, w in weights.items()}
    h = hidden_states(trained, {}, make_tokens([ids[0].tolist()]), Compute(cfg))
    ours = linear_cross_entropy(
        h[:-1], head_weight(trained, {}, cfg, torch.float32), ids[0, 1:], chunk=7
    )
    (ours / (LENGTH - 1)).backward()
    assert abs(ours.item() / (LENGTH - 1) - loss.item()) < 1e-5
    want = dict(reference.named_parameters())
    assert set(want) == set(trained)
    for key, parameter in want.items():
        scale = parameter.grad.abs().max().item() + 1e-12
        assert (trained[key].grad - parameter.grad).abs().max().item() / scale < 1e-5, key


@pytest.mark.parametrize("length", [8, 24, 100, 300])
@pytest.mark.parametrize("name", CONFIGS)
def test_inverse_frequencies_equal_transformers(name, length):
    hf = LlamaConfig(**{**BASE, **CONFIGS[name]})
    cfg = parse_model_config(json.loads(hf.to_json_string(use_diff=False)))
    ours, factor = rope_inverse_frequencies(
        cfg.rope, cfg.head_dim, cfg.max_position_embeddings, length
    )
    rope_type = hf.rope_parameters["rope_type"]
    if rope_type == "default":
        dim = cfg.head_dim
        want = 1.0 / (
            cfg.rope.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
        )
        want_factor = 1.0
    else:
        want, want_factor = ROPE_INIT_FUNCTIONS[rope_type](
            hf,
            device="cpu",
            seq_len=torch.tensor(length),  # a tensor, as the forward pass gives it
        )
    assert torch.equal(ours, want)
    assert factor == want_factor
