"""SwiGLU and its gradients with the LoRA sums over tokens, against float64 autograd."""

import pytest
import torch
from fused import DTYPES, close, poisoned, rand, wide
from minisft.kernels.swiglu import swiglu, swiglu_backward_

CASES = pytest.mark.parametrize(
    "T, F, ranks",
    [
        (37, 70, (3, 3, 3)),
        (80, 128, (16, 0, 8)),
        (1, 5, (0, 0, 0)),
        (65, 64, (0, 2, 0)),
        (130, 70, (200, 64, 256)),
    ],
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CASES
def test_forward(T, F, ranks, dtype):
    x = wide(rand(T, 2 * F, dtype=dtype))
    found = [swiglu(x, F, extra=2, impl=impl) for impl in ("triton", "reference")]
    g, u = x.double().split(F, 1)
    assert found[0].shape == (T, F + 2)
    close(found[0][:, :F], found[1][:, :F], torch.nn.functional.silu(g) * u)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CASES
def test_backward(T, F, ranks, dtype):
    x, da = wide(rand(T, 2 * F, dtype=dtype)), wide(rand(T, F, dtype=dtype, seed=8))
    lefts = tuple(wide(rand(T, r, dtype=dtype, seed=i)) if r else None for i, r in enumerate(ranks))
    shapes = ((F, ranks[0]), (F, ranks[1]), (ranks[2], F))
    found = []
    for impl in ("triton", "reference"):
        mine = wide(x)
        partials = tuple(
            poisoned(2, *shape) if r else None for r, shape in zip(ranks, shapes, strict=True)
        )
        swiglu_backward_(mine, da, lefts=lefts, partials=partials, impl=impl)
        found.append((mine, [None if p is None else p.sum(0) for p in partials]))
    g, u = (p.requires_grad_() for p in x.double().split(F, 1))
    a = torch.nn.functional.silu(g) * u
    grads = torch.autograd.grad(a, (g, u), da.double())
    (x_k, p_k), (x_r, p_r) = found
    close(x_k, x_r, torch.cat(grads, 1), "d gate, d up")
    for i, grad in enumerate(grads):
        if ranks[i]:
            close(p_k[i], p_r[i], grad.T @ lefts[i].double(), f"dB {i}")
    if ranks[2]:
        close(p_k[2], p_r[2], lefts[2].double().T @ a.detach(), "dA of down")


def test_a_left_without_its_partial_is_refused():
    with pytest.raises(ValueError, match="every left needs its partial"):
        swiglu_backward_(rand(4, 10), rand(4, 5), lefts=(rand(4, 2), None, None))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # numpy's, of the interpreter
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_the_sigmoid_saturates(impl):
    """Where exp(-gate) overflows, gate and gradient are 0, not NaN; far above 0, silu is itself."""
    gate = torch.tensor([[-200.0, -90.0, 90.0, 200.0]])
    x = torch.cat((gate, torch.ones_like(gate)), 1)
    if torch.cuda.is_available():
        x = x.cuda()
    expected = torch.tensor([[0.0, 0.0, 90.0, 200.0]], device=x.device)
    assert swiglu(x, 4, impl=impl).allclose(expected)
    swiglu_backward_(x, torch.ones_like(x[:, :4]), impl=impl)
    assert x.allclose(torch.cat((expected.clamp(max=1), expected), 1))
