"""RMSNorm with residual and LoRA updates: kernel and reference against float64 autograd."""

import pytest
import torch
from fused import DTYPES, close, rand, wide
from minisft.kernels.low_rank import LowRank
from minisft.kernels.rms_norm import add_rms_norm, normalise, rms_norm_backward

EPS = 1e-5
sizes = pytest.mark.parametrize(
    "T, D, R", [(37, 80, 3), (16, 256, 16), (1, 33, 0), (50, 300, 48), (9, 1030, 256)]
)


def low_rank(T, R, N, dtype, seed):
    if not R:
        return None
    return LowRank(wide(rand(T, R, dtype=dtype, seed=seed)), rand(N, R, dtype=dtype, seed=9).T, 0.7)


def truth_of(x, weight, extra=None):
    x = x.double() if extra is None else x.double() + extra
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight.double()


def product(delta):
    return 0 if delta is None else delta.left.double() @ delta.right.double() * delta.scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@sizes
def test_forward(T, D, R, dtype):
    x, y = wide(rand(T, D, dtype=dtype)), wide(rand(T, D, dtype=dtype, seed=1))
    weight, delta = rand(D, dtype=dtype, seed=2), low_rank(T, R, D, dtype, 3)
    (sum_k, h_k, rstd_k), (sum_r, h_r, rstd_r) = (
        add_rms_norm(x, y, weight, EPS, delta=delta, rank_columns=3, impl=impl)
        for impl in ("triton", "reference")
    )
    extra = y.double() + product(delta)
    close(sum_k, sum_r, x.double() + extra, "sum")
    assert h_k.shape == (T, D + 3)
    close(h_k[:, :D], h_r[:, :D], truth_of(x, weight, extra), "norm")
    close(rstd_k, rstd_r, torch.rsqrt((x.double() + extra).pow(2).mean(-1) + EPS), "rstd")
    again = normalise(sum_k, weight, rstd_k, rank_columns=3, impl="triton")
    assert torch.equal(again[:, :D], h_k[:, :D])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_without_a_summand_is_the_norm_alone(dtype):
    x, weight = rand(19, 130, dtype=dtype), rand(130, dtype=dtype, seed=1)
    same, h, _ = add_rms_norm(x, None, weight, EPS, impl="triton")
    assert same is x
    close(h, add_rms_norm(x, None, weight, EPS, impl="reference")[1], truth_of(x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("T, D", [(37, 80), (16, 256), (1, 33)])
def test_backward(T, D, residual, dtype):
    x, dh = rand(T, D, dtype=dtype), wide(rand(T, D, dtype=dtype, seed=1))
    weight, rstd = rand(D, dtype=dtype, seed=2), torch.rsqrt(x.float().pow(2).mean(-1) + EPS)
    dres = wide(rand(T, D, dtype=dtype, seed=4)) if residual else None
    kernel, reference = (
        rms_norm_backward(dh, x, weight, rstd, dresidual_TD=dres, rank_columns=2, impl=impl)
        for impl in ("triton", "reference")
    )
    leaf = x.double().requires_grad_()
    (truth,) = torch.autograd.grad(truth_of(leaf, weight), leaf, dh.double())
    assert kernel.shape == (T, D + 2)
    close(kernel[:, :D], reference[:, :D], truth + (0 if dres is None else dres.double()))
