"""Norm, clipping and AdamW over flat buffers, against torch.optim and float64."""

import pytest
import torch
from fused import DEVICE, rand
from minisft.kernels.adamw import AdamWStep, adamw_, global_norm

IMPLS = ("triton", "reference")
SIZES = (1, 1023, 5000, 3 * 1024 * 1024 + 7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n", SIZES)
def test_the_norm_is_exact_to_the_last_bits(n, impl):
    g = rand(n, scale=3.0)
    found = global_norm(g, impl=impl)
    assert found.shape == () and found.dtype == torch.float32
    assert found.item() == pytest.approx(g.double().norm().item(), rel=1.2e-7)
    assert torch.equal(found, global_norm(g, impl=impl))


@pytest.mark.parametrize("what", ["nan", "inf"])
def test_a_norm_that_is_not_finite_says_so(what):
    g = rand(3000)
    g[2222] = float(what)
    assert not global_norm(g, impl="triton").isfinite()


def steps(n, apply, sizes=(1.0, 1e-3, 1e-6, 30.0)):
    """p, m and v after a step for each size of gradient."""
    p, m, v = rand(n), torch.zeros(n, device=DEVICE), torch.zeros(n, device=DEVICE)
    for step, size in enumerate(sizes, start=1):
        apply(p, rand(n, seed=step, scale=size), m, v, step)
    return p, m, v


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n", [1, 2500])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)])
def test_adamw_is_torch_s(betas, weight_decay, n, impl):
    settings = {"beta1": betas[0], "beta2": betas[1], "eps": 1e-6, "weight_decay": weight_decay}

    def ours(p, g, m, v, step):
        numbers = AdamWStep(step=step, learning_rate=1e-2 / step, **settings)
        adamw_(p, g, m, v, numbers, impl=impl)

    theirs = rand(n).double().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], betas=betas, eps=1e-6, weight_decay=weight_decay)
    for step, size in enumerate((1.0, 1e-3, 1e-6, 30.0), start=1):
        optimizer.param_groups[0]["lr"] = 1e-2 / step
        theirs.grad = rand(n, seed=step, scale=size).double()
        optimizer.step()
    p, m, v = steps(n, ours)
    state = optimizer.state[theirs]
    for found, truth in ((p, theirs), (m, state["exp_avg"]), (v, state["exp_avg_sq"])):
        truth = truth.detach()
        assert (found.double() - truth).abs().max() <= 4e-7 * truth.abs().max()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
def test_clipping_is_torch_s_and_leaves_the_gradient(max_norm, impl):
    n, g = 2500, rand(2500, seed=7)
    before, leaf = g.clone(), torch.zeros(n, device=DEVICE)
    leaf.grad = g.clone()
    torch.nn.utils.clip_grad_norm_([leaf], max_norm)
    norm = global_norm(g, impl=impl)
    found = []
    settings = AdamWStep(1, 1e-2, 0.9, 0.99, 1e-3, 0.0, max_norm)
    for grad, clip in ((g, norm), (leaf.grad, None)):
        p, m, v = rand(n), torch.zeros(n, device=DEVICE), torch.zeros(n, device=DEVICE)
        adamw_(p, grad, m, v, settings, norm=clip, impl=impl)
        found.append((p, m, v))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-12)
    assert torch.equal(g, before)


def test_nothing_outside_the_slice_is_written():
    whole = torch.zeros(4, 3000, device=DEVICE)
    p, g, m, v = (row[1000:2500] for row in whole)
    g.fill_(1.0)
    adamw_(p, g, m, v, AdamWStep(1, 0.1, 0.9, 0.9, 0.0, 0.0), impl="triton")
    assert torch.allclose(p, torch.full_like(p, -0.1))
    whole[:, 1000:2500] = 0
    assert not whole.any()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="global_norm: the gradient is"):
        global_norm(rand(8, 2)[:, 0], impl="reference")
    a, b = rand(4), rand(5)
    settings = AdamWStep(1, 0.1, 0.9, 0.9, 0.0, 0.0)
    for bad in (b, a.half(), rand(4, 2)[:, 0]):
        with pytest.raises(ValueError, match="adamw_: a tensor is"):
            adamw_(a, a, a, bad, settings)
