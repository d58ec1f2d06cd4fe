"""The concurrent launches of the 4-bit linear's backward pass, under load."""

import pytest
import torch
from fused import GPU
from minisft.kernels.nf4 import dequantize_into, quantize
from minisft.kernels.nf4 import kernel as nf4_kernel
from minisft.kernels.nf4_lora_linear import Adapter, many_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no CUDA device")]
# M, I, O. The product ends long after what runs beside it, long before it, and at about the same
# time; ragged rows and columns.
SHAPES = [(4096, 1024, 8192), (4096, 8192, 256), (4096, 2048, 2048), (3001, 1032, 776)]


def rand(*shape, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator, dtype=torch.bfloat16)


@pytest.fixture(params=SHAPES, ids=str)
def passes(request):
    """A function of nothing: dy is decoded, which lets what follows start at once, then backward.

    dy and u are NaN until just before. (dx, dA, dB), as read by kernels behind it.
    """
    M, I, O = request.param
    weight, as_dy = (quantize(rand(*shape, seed=1)) for shape in ((O, I), (M, O)))
    A, B, x = rand(16, I, seed=2), rand(O, 16, seed=3), rand(M, I, seed=4)
    dy = torch.empty((M, O), device="cuda", dtype=torch.bfloat16)
    u = torch.empty((M, 16), device="cuda", dtype=torch.bfloat16)

    def run(pdl=True):
        dy.fill_(float("nan"))
        u.fill_(float("nan"))
        torch.mm(x, A.T, out=u)
        dequantize_into(as_dy, dy, pdl=pdl)
        return tuple(g.clone() for g in many_rows.backward(dy, x, u, weight, Adapter(A, B, 0.5)))

    return run


@pytest.fixture
def expected(passes, monkeypatch):
    """The same, each launch after the one before."""
    with monkeypatch.context() as patch:
        for module in (many_rows, nf4_kernel):
            patch.setattr(module, "pdl_option", lambda device: {})
        out = passes(pdl=False)
        torch.cuda.synchronize()
    assert all(g.isfinite().all() for g in out)
    return out


@pytest.fixture(params=[False, True], ids=["", "filled"])
def filled(request, expected):
    """Whether all that backward takes is NaN at first, by launches of torch's between dy and it.

    Without, its first launch follows the decode, but its memory may hold what the pass before left.
    """
    torch.use_deterministic_algorithms(request.param, warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(False)


def same(found, expected):
    return [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * 3


def test_the_same_bits_as_one_after_another(passes, expected, filled):
    assert torch.empty(1 << 20, device="cuda").isnan().all() == filled
    for _ in range(30):
        assert same(passes(), expected)


def test_the_same_bits_from_a_graph(passes, expected, filled):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        passes()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = [passes() for _ in range(3)]
    for _ in range(10):
        graph.replay()
        torch.cuda.synchronize()
        assert all(same(f, expected) for f in found)
