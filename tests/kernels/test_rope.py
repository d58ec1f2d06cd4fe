"""Rotary embedding in place, and its inverse with dB, against float64."""

import pytest
import torch
from fused import DTYPES, close, poisoned, rand, wide
from minisft.kernels.rope import rope_, rope_backward
from minisft.kernels.rope.reference import rotate

CASES = pytest.mark.parametrize(
    "T, N, K, H, ranks",
    [
        (37, 2, 1, 32, (3, 3, 3)),
        (70, 3, 1, 64, (16, 0, 2)),
        (1, 1, 1, 32, (0, 0, 0)),
        (130, 1, 1, 128, (64, 256, 0)),
    ],
)


def angles(T, H, dtype):
    half = rand(T, H // 2, seed=7)
    both = torch.cat((half, half), dim=1)
    return both.cos().to(dtype), both.sin().to(dtype)


def double_rotate(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    turned = torch.cat((-x2, x1), dim=-1)
    return x * cos.double().unsqueeze(1) + turned * sin.double().unsqueeze(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, heads, H", [(37, 3, 32), (70, 2, 64), (1, 1, 32)])
def test_forward(T, heads, H, dtype):
    x, (cos, sin) = rand(T, heads * H + 6, dtype=dtype), angles(T, H, dtype)
    found = []
    for impl in ("triton", "reference"):
        mine = wide(x)
        rope_(mine, cos, sin, heads, impl=impl)
        assert torch.equal(mine[:, heads * H :], x[:, heads * H :])
        found.append(mine[:, : heads * H])
    part = x[:, : heads * H].double().unflatten(1, (heads, H))
    close(*found, double_rotate(part, cos, sin).flatten(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CASES
def test_backward_is_the_inverse_turn_and_makes_dB(T, N, K, H, ranks, dtype):
    cos, sin = angles(T, H, dtype)
    grads = tuple(rand(T, n, H, dtype=dtype, seed=n + i) for i, n in enumerate((N, K, K)))
    us = tuple(rand(T, r, dtype=dtype, seed=i) if r else None for i, r in enumerate(ranks))
    found = []
    for impl in ("triton", "reference"):
        out = wide(poisoned(T, (N + 2 * K) * H, dtype=dtype))
        partials = tuple(
            poisoned(2, n * H, r) if r else None for n, r in zip((N, K, K), ranks, strict=True)
        )
        rope_backward(grads, cos, sin, out, us=us, partials=partials, impl=impl)
        found.append((out, [None if p is None else p.sum(0) for p in partials]))
    (out_k, dB_k), (out_r, dB_r) = found
    start = 0
    for i, grad in enumerate(grads):
        d = grad.double()
        d = (double_rotate(d, cos, -sin) if i < 2 else d).flatten(1)
        stop = start + d.shape[1]
        close(out_k[:, start:stop], out_r[:, start:stop], d, f"grad {i}")
        u = us[i]
        if u is not None:
            close(dB_k[i], dB_r[i], d.T @ u.double(), f"dB {i}")
        start = stop


def test_turning_forth_and_back_changes_nothing():
    cos, sin = angles(9, 32, torch.float32)
    x = rand(9, 2, 32)
    assert torch.allclose(rotate(rotate(x, cos, sin), cos, -sin), x, atol=1e-6)
