"""The operations of a block: norm, dropout, rotary embedding, attention, projections."""

import dataclasses
import itertools

import pytest
import torch
from tiny_llama import CFG, random_weights, relative

from minisft.config.model import RopeConfig
from minisft.llama import Compute, logits, make_tokens
from minisft.nn import (
    Linear,
    Lora,
    LoraContext,
    apply_rope,
    documents_of,
    dropout,
    linear,
    mix64,
    module_key,
    packed_attention,
    rms_norm,
    swiglu,
)
from minisft.rope import rope_inverse_frequencies, rope_table

NO_ADAPTER = LoraContext(1.0, 0.0, None)
MASK64 = 2**64 - 1


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --------------------------------------------------------------------------------------------- norm


def test_rms_norm_is_its_formula():
    x, weight = normal(7, 40), normal(40, seed=1)
    want = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    assert relative(rms_norm(x, weight, 1e-3), want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norm_of_large_activations_is_finite(dtype):
    """6e4 squared is beyond float16: the statistics have to be float32."""
    x = torch.full((3, 64), 6e4, dtype=dtype).requires_grad_()
    y = rms_norm(x, torch.ones(64, dtype=dtype), 1e-5)
    y.sum().backward()
    assert torch.equal(y, torch.ones_like(y))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norm_keeps_the_dtype_of_the_input(dtype):
    """A float32 master weight does not promote what it multiplies."""
    y = rms_norm(normal(4, 16, dtype=dtype), normal(16, seed=1), 1e-5)
    assert y.dtype == dtype


def test_eps_counts_where_the_input_is_tiny():
    x = torch.full((1, 8), 1e-4)
    assert rms_norm(x, torch.ones(8), 1e-5)[0, 0].item() == pytest.approx(1e-4 / (1.001e-5) ** 0.5)


def test_swiglu_is_its_formula():
    gate, up = normal(5, 9), normal(5, 9, seed=1)
    assert torch.allclose(swiglu(gate, up), gate * torch.sigmoid(gate) * up, atol=1e-6)


# -------------------------------------------------------------------------------------- projections


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_adds_bias_and_scaled_adapter(dtype):
    x, weight, bias = normal(6, 10, dtype=dtype), normal(14, 10, seed=1), normal(14, seed=2)
    A, B = normal(3, 10, seed=3), normal(14, 3, seed=4)
    y = linear(x, Linear(weight, bias, Lora(A, B, 0)), LoraContext(0.7, 0.5, None))
    x64, weight64, bias64, A64, B64 = (t.to(dtype).double() for t in (x, weight, bias, A, B))
    want = x64 @ weight64.T + bias64 + 0.7 * (x64 @ A64.T) @ B64.T
    assert y.dtype == dtype
    assert relative(y, want) < (1e-6 if dtype == torch.float32 else 1e-2)
    plain = linear(x, Linear(weight, None, None), NO_ADAPTER)
    assert relative(plain, x64 @ weight64.T) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_dropout_acts_on_the_adapter_s_branch_alone():
    x, keys = normal(50, 10), torch.arange(50)
    weight, A, B = normal(14, 10, seed=1), normal(3, 10, seed=3), normal(14, 3, seed=4)
    y = linear(x, Linear(weight, None, Lora(A, B, 5)), LoraContext(0.7, 0.5, keys))
    want = x @ weight.T + 0.7 * (dropout(x, keys, 5, 0.5) @ A.T) @ B.T
    assert relative(y, want) < 1e-6


# ------------------------------------------------------------------------------------------ dropout

KEYS = mix64(torch.arange(400) * 7919)


def test_mix64_is_splitmix64_s_finaliser():
    def reference(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK64
        return x ^ (x >> 31)

    values = [0, 1, -1, 2**63 - 1, -(2**63), 123456789, -987654321012345678]
    got = mix64(torch.tensor(values)).tolist()
    assert [g & MASK64 for g in got] == [reference(v & MASK64) for v in values]


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_dropout_rate_and_scale(rate):
    """Each entry is 0 or x / (1 - rate); the share of zeros is the rate within four deviations."""
    y = dropout(torch.ones(400, 200), KEYS, 11, rate)
    share = (y == 0).double().mean().item()
    assert abs(share - rate) <= 4 * (rate * (1 - rate) / y.numel()) ** 0.5
    kept = y[y != 0]
    assert torch.allclose(kept, torch.full_like(kept, 1 / (1 - rate)))


def test_dropout_preserves_the_expectation():
    """Over 4,000 draws of a row, its mean is the row itself."""
    x = normal(1, 64)
    y = dropout(x.expand(4000, -1), mix64(torch.arange(4000)), 3, 0.25)
    deviation = x.abs() * (0.25 / 0.75 / 4000) ** 0.5
    assert ((y.mean(0) - x) / deviation).abs().max() < 4.5


def test_dropout_draws_are_independent_of_each_other():
    """Masks of neighbouring tokens, columns and modules are independent."""
    keep = (dropout(torch.ones(400, 200), KEYS, 11, 0.5) != 0).double()
    other = (dropout(torch.ones(400, 200), KEYS, 12, 0.5) != 0).double()
    row = torch.arange(400) + 2**40  # keys one apart, unmixed
    near = (dropout(torch.ones(400, 200), row, 11, 0.5) != 0).double()
    pairs = {
        "tokens": (keep[1:], keep[:-1]),
        "columns": (keep[:, 1:], keep[:, :-1]),
        "modules": (keep, other),
        "keys one apart": (near[1:], near[:-1]),
    }
    for name, (a, b) in pairs.items():
        assert abs((a == b).double().mean().item() - 0.5) < 4 * 0.5 / a.numel() ** 0.5, name
    for name, axis in (("columns", 0), ("tokens", 1)):
        n = keep.shape[axis]
        assert ((keep.mean(axis) - 0.5).abs() < 5 * 0.5 / n**0.5).all(), name


def test_dropout_depends_on_token_and_module_alone():
    """The mask does not depend on the other tokens, the position in the batch, or the call."""
    x, keys = normal(400, 30), KEYS
    y = dropout(x, keys, 5, 0.3)
    assert torch.equal(dropout(x, keys, 5, 0.3), y)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    assert torch.equal(dropout(x[order], keys[order], 5, 0.3), y[order])
    assert torch.equal(dropout(x[7:9], keys[7:9], 5, 0.3), y[7:9])
    assert not torch.equal(dropout(x, keys, 6, 0.3) == 0, y == 0)
    assert not torch.equal(dropout(x, keys + 1, 5, 0.3) == 0, y == 0)


def test_dropout_gradient_passes_where_the_value_did():
    x = normal(40, 30).requires_grad_()
    y = dropout(x, KEYS[:40], 5, 0.3)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)
    assert torch.allclose(x.grad[x.grad != 0], torch.tensor(1 / 0.7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dropout_draws_the_same_in_every_dtype(dtype):
    x = torch.ones(50, 30)
    half = dropout(x.to(dtype), KEYS[:50], 5, 0.3)
    assert half.dtype == dtype
    assert torch.equal(half == 0, dropout(x, KEYS[:50], 5, 0.3) == 0)


def test_modules_have_keys_of_their_own():
    keys = {module_key(path) for path in CFG.linear_paths()}
    assert len(keys) == len(CFG.linear_paths())
    assert all(0 <= key < 2**62 for key in keys)
    # The same in every process: a resumed run draws what it would have drawn.
    assert module_key("model.layers.0.self_attn.q_proj") == 2588432294179916754


# --------------------------------------------------------------------------------------------- RoPE


def test_rope_turns_pairs_by_position_times_frequency():
    """Channel i and i + H/2 form a complex number, rotated by position * theta^(-2i/H)."""
    rope, H = RopeConfig(rope_theta=500.0), 8
    positions = torch.tensor([0, 1, 2, 0, 1, 17])
    cos, sin = rope_table(
        positions, (3, 3), rope, head_dim=H, max_positions=64, dtype=torch.float32
    )
    x = normal(6, 3, H)
    got = apply_rope(x, cos, sin)
    z = torch.complex(x[..., : H // 2].double(), x[..., H // 2 :].double())
    angles = positions.double()[:, None] * 500.0 ** (-torch.arange(0, H, 2).double() / H)
    want = z * torch.polar(torch.ones_like(angles), angles)[:, None]
    assert relative(got, torch.cat((want.real, want.imag), -1)) < 1e-6
    assert torch.equal(got[0], x[0])


def test_rope_is_relative():
    """Scores of a query and a key depend on how far apart they are."""
    rope, H = RopeConfig(), 16
    q, k = normal(1, 1, H), normal(1, 1, H, seed=1)

    def score(i, j):
        turned = []
        for x, at in ((q, i), (k, j)):
            table = rope_table(
                torch.tensor([at]), (1,), rope, head_dim=H, max_positions=64, dtype=torch.float32
            )
            turned.append(apply_rope(x, *table))
        return (turned[0] * turned[1]).sum().item()

    assert score(9, 4) == pytest.approx(score(35, 30), abs=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_dynamic_rope_looks_at_each_document_by_itself():
    """A long document in the micro-batch leaves the frequencies of a short one as they are."""
    rope, H = RopeConfig(rope_type="dynamic", factor=2.0), 8
    lengths = (10, 50, 24)
    positions = torch.cat([torch.arange(n) for n in lengths])
    options = {"head_dim": H, "max_positions": 24, "dtype": torch.float32}
    together = rope_table(positions, lengths, rope, **options)
    plain = rope_table(positions, lengths, RopeConfig(), **options)
    start = 0
    for n in lengths:
        alone = rope_table(torch.arange(n), (n,), rope, **options)
        part = [table[start : start + n] for table in together]
        assert all(map(torch.equal, part, alone))
        same = all(map(torch.equal, part, (table[start : start + n] for table in plain)))
        assert same == (n <= 24), "stretched if and only if it is longer than the context"
        start += n


def test_dynamic_rope_takes_the_context_where_some_is_cached():
    rope = RopeConfig(rope_type="dynamic", factor=2.0)
    options = {"head_dim": 8, "max_positions": 24, "dtype": torch.float32}
    whole = rope_table(torch.arange(40), (40,), rope, **options)
    last = rope_table(torch.tensor([39]), (1,), rope, contexts=(40,), **options)
    assert torch.equal(whole[0][39:], last[0]) and torch.equal(whole[1][39:], last[1])


@pytest.mark.parametrize("length", [8, 24, 100])
def test_only_dynamic_frequencies_depend_on_the_length(length):
    ropes = {
        "default": RopeConfig(),
        "linear": RopeConfig("linear", factor=3.0),
        "llama3": RopeConfig(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
        "yarn": RopeConfig("yarn", factor=4.0, original_max_position_embeddings=32),
    }
    tables = {
        name: rope_inverse_frequencies(rope, 16, 24, length)[0] for name, rope in ropes.items()
    }
    for name, rope in ropes.items():
        assert torch.equal(tables[name], rope_inverse_frequencies(rope, 16, 24)[0])
    for a, b in itertools.combinations(tables.values(), 2):
        assert not torch.equal(a, b)


# ---------------------------------------------------------------------------------------- attention

LENGTHS = {"uneven": (1, 9, 17, 4), "equal": (8, 8, 8), "one": (13,), "ones": (1, 1, 1)}


def documents(lengths):
    return documents_of(lengths)


def written_out(q, k, v, lengths):
    """Softmax attention in float64, one document, head and query at a time."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    start = 0
    for n in lengths:
        for head, t in itertools.product(range(q.shape[1]), range(start, start + n)):
            keys = k[start : t + 1, head // group].double()
            p = (keys @ q[t, head].double() / q.shape[2] ** 0.5).softmax(0)
            out[t, head] = p @ v[start : t + 1, head // group].double()
        start += n
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("case", LENGTHS)
def test_attention_is_causal_softmax_inside_each_document(case, kv_heads):
    lengths = LENGTHS[case]
    T = sum(lengths)
    q, k, v = normal(T, 4, 8), normal(T, kv_heads, 8, seed=1), normal(T, kv_heads, 8, seed=2)
    got = packed_attention(q, k, v, documents(lengths))
    assert got.shape == q.shape
    assert relative(got, written_out(q, k, v, lengths)) < 1e-6


def test_documents_of_one_length_take_the_same_values_as_one_by_one():
    """The dense path of equal lengths against the path that goes document by document."""
    q, k, v = normal(24, 4, 8), normal(24, 2, 8, seed=1), normal(24, 2, 8, seed=2)
    dense = packed_attention(q, k, v, documents((8, 8, 8)))
    q, k, v = (torch.cat((x, x[:3])) for x in (q, k, v))
    one_by_one = packed_attention(q, k, v, documents((8, 8, 8, 3)))[:24]
    assert relative(dense, one_by_one) < 1e-6


@pytest.mark.parametrize("case", ["uneven", "equal"])
def test_attention_gradients(case):
    lengths = LENGTHS[case]
    T = sum(lengths)
    inputs = [normal(T, 4, 8), normal(T, 2, 8, seed=1), normal(T, 2, 8, seed=2)]
    dy = normal(T, 4, 8, seed=3)

    def gradients(attend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        return torch.autograd.grad(attend(*leaves), leaves, dy.to(dtype))

    def reference(q, k, v):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        allowed = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()
        scores = torch.einsum("tnh,snh->nts", q, k) / 8**0.5
        p = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
        return torch.einsum("nts,snh->tnh", p, v)

    want = gradients(reference, torch.float64)
    got = gradients(lambda *x: packed_attention(*x, documents(lengths)), torch.float32)
    for name, a, b in zip("qkv", got, want, strict=True):
        assert relative(a, b) < 1e-6, name


def test_softmax_of_large_scores_is_finite_in_float16():
    q = k = torch.full((6, 2, 8), 60.0, dtype=torch.float16)  # scores of 1e4
    v = normal(6, 2, 8, dtype=torch.float16)
    assert packed_attention(q, k, v, documents((2, 4))).isfinite().all()


# ----------------------------------------------------------------------------------- the whole pass


@pytest.mark.parametrize("lengths", [(7, 12), (9, 9)], ids=["uneven", "equal"])
def test_half_precision_logits_are_near(lengths):
    """bfloat16 logits lie within a few per cent of float32's: nothing is computed in less."""
    weights = random_weights()
    ids = torch.randint(CFG.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    tokens = make_tokens([part.tolist() for part in ids.split(lengths)])
    truth = logits({}, weights, tokens, Compute(CFG))
    half = logits({}, weights, tokens, Compute(CFG, torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert relative(half, truth) < 0.03


def test_every_weight_counts():
    """Each tensor of a model with all biases, moved by itself, changes the logits."""
    cfg = dataclasses.replace(CFG, attention_bias=True, mlp_bias=True)
    weights, tokens = random_weights(cfg), make_tokens([[5, 6, 7, 8], [9, 10]])
    base = logits({}, weights, tokens, Compute(cfg))
    assert len(weights) == 3 + 2 * (2 * 7 + 2)
    for name, weight in weights.items():
        moved = logits({}, weights | {name: weight * 1.5 + 0.1}, tokens, Compute(cfg))
        assert relative(moved, base) > 1e-4, name
