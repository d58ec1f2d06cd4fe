"""linear_cross_entropy against float64 and plain torch, its chunks, its messages, its memory."""

import pytest
import torch
import torch.nn.functional as F
from fused import DTYPES as FUSED_DTYPES
from fused import close, rand
from minisft.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_grad
from minisft.kernels.linear_cross_entropy.cases import (
    DTYPES,
    LLAMA,
    SMALL,
    Case,
    Inputs,
    make_inputs,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TINY = 1e-6  # relative: where plain torch happens to be exact
NAMES = ("loss", "d_hidden", "d_head")


def plain(hidden_MD, head_VD, targets_M):
    """The formula on whole logits."""
    return F.cross_entropy((hidden_MD @ head_VD.T).float(), targets_M, reduction="sum")


def definition(hidden_MD, head_VD, targets_M):
    """The formula in float64."""
    z_MV = hidden_MD @ head_VD.T
    return (z_MV.logsumexp(1) - z_MV[torch.arange(len(targets_M)), targets_M]).sum()


def run(function, inputs: Inputs, dtype, scale=1.0):
    """(loss, d_hidden, d_head) of scale * loss, the inputs cast to dtype first."""
    leaves = [x.to(dtype).detach().clone().requires_grad_() for x in inputs[:2]]
    loss = function(*leaves, inputs.targets_M)
    return [loss.detach(), *torch.autograd.grad(loss * scale, leaves)]


def error(a, b):
    return (a.double() - b.double()).norm().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMALL)
def test_error_is_at_most_three_times_that_of_plain_torch(case, dtype):
    inputs = make_inputs(SMALL[case], DTYPES[dtype])
    truth = run(definition, inputs, torch.float64, scale=0.125)
    reference = run(plain, inputs, DTYPES[dtype], scale=0.125)
    ours = run(lambda *x: linear_cross_entropy(*x, chunk=24), inputs, DTYPES[dtype], scale=0.125)
    for name, t, r, o in zip(NAMES, truth, reference, ours, strict=True):
        assert o.shape == t.shape, name
        assert error(o, t) <= 3 * error(r, t) + TINY * t.norm().item(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_the_results(dtype):
    inputs = make_inputs(SMALL["odd"], DTYPES[dtype])
    loss, d_hidden, d_head = run(linear_cross_entropy, inputs, DTYPES[dtype])
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert d_hidden.dtype == d_head.dtype == DTYPES[dtype]


@pytest.mark.parametrize("chunk", [1, 7, 63, 64, 130, 131, 132, 0])
def test_chunk_size_changes_nothing(chunk):
    inputs = make_inputs(SMALL["primes"], torch.float32)
    whole = run(lambda *x: linear_cross_entropy(*x, chunk=10**6), inputs, torch.float32)
    cut = run(lambda *x: linear_cross_entropy(*x, chunk=chunk), inputs, torch.float32)
    for name, a, b in zip(NAMES, cut, whole, strict=True):
        assert error(a, b) <= 1e-6 * b.norm().item(), name


def test_head_gradient_is_summed_in_float32_over_many_chunks():
    """A bfloat16 running sum would lose the small ones: 1 + 2**-9 rounds to 1."""
    inputs = make_inputs(Case(4000, 4, 3), torch.bfloat16, logit_scale=1.0)
    truth = run(definition, inputs, torch.float64)[2]
    ours = run(lambda *x: linear_cross_entropy(*x, chunk=1), inputs, torch.bfloat16)[2]
    reference = run(plain, inputs, torch.bfloat16)[2]
    assert error(ours, truth) <= 3 * error(reference, truth) + TINY * truth.norm().item()


def test_the_scale_of_the_loss_does_not_lose_bits_in_bfloat16():
    """Training multiplies by 1 / num_tokens, which bfloat16 holds to three digits only."""
    inputs = make_inputs(SMALL["odd"], torch.bfloat16)
    unscaled, scaled = (run(linear_cross_entropy, inputs, torch.bfloat16, s) for s in (1.0, 1 / 3))
    for name, a, b in zip(NAMES[1:], scaled[1:], unscaled[1:], strict=True):
        assert torch.allclose(a.float(), b.float() / 3, rtol=2**-7, atol=0), name
        bias = ((a.float() - b.float() / 3) * b.sign()).sum() / b.float().abs().sum()
        assert bias.abs() < 1e-4, name  # 1/3 in bfloat16 is 6.5e-4 too large


def test_no_rows():
    hidden, head = torch.empty(0, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    loss = linear_cross_entropy(hidden, head, torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and loss.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.shape == (0, 5)
    assert head.grad is not None and torch.equal(head.grad, torch.zeros(7, 5))


@pytest.mark.parametrize("trained", [(True, False), (False, True), (True, True), (False, False)])
def test_gradients_flow_where_they_are_asked_for(trained):
    hidden, head, targets = make_inputs(SMALL["odd"], torch.float32)
    want = run(plain, Inputs(hidden, head, targets), torch.float32)
    hidden, head = hidden.requires_grad_(trained[0]), head.requires_grad_(trained[1])
    loss = linear_cross_entropy(hidden, head, targets, chunk=16)
    assert error(loss.detach(), want[0]) < 1e-6 * want[0].item()
    assert loss.requires_grad == any(trained)
    if any(trained):
        loss.backward()
    for x, grad, asked in zip((hidden, head), want[1:], trained, strict=True):
        assert (x.grad is not None) == asked
        if asked:
            assert error(x.grad, grad) < 1e-5 * grad.norm().item()


def test_inputs_are_left_alone_and_may_be_strided():
    inputs = make_inputs(SMALL["block and one"], torch.float32)
    before = [x.clone() for x in inputs]
    want = run(linear_cross_entropy, inputs, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    hidden = torch.stack((inputs.hidden_MD, inputs.hidden_MD * 9), 2)[..., 0].requires_grad_()
    head = inputs.head_VD.T.contiguous().T.requires_grad_()
    assert not hidden.is_contiguous() and not head.is_contiguous()
    targets = inputs.targets_M.repeat_interleave(2)[::2]
    loss = linear_cross_entropy(hidden, head, targets, chunk=10)
    got = [loss.detach(), *torch.autograd.grad(loss, (hidden, head))]
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert error(a, b) <= 1e-5 * b.norm().item(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_stay_finite(dtype):
    """exp(500) is beyond float32: the largest logit has to be taken out first."""
    inputs = make_inputs(SMALL["odd"], dtype, logit_scale=500.0)
    loss, d_hidden, d_head = run(linear_cross_entropy, inputs, dtype)
    truth = run(definition, inputs, torch.float64)
    assert error(loss, truth[0]) < 1e-2 * truth[0].item()
    assert d_hidden.isfinite().all() and d_head.isfinite().all()


@pytest.mark.parametrize(
    ("hidden", "head", "targets", "words"),
    [
        ((4, 8), (9, 7), (4,), r"\(4, 8\).*\(9, 7\)"),
        ((4, 8), (9, 8), (5,), r"targets \(5,\)"),
        ((4, 8), (9, 8), (4, 1), r"targets \(4, 1\)"),
    ],
)
def test_shapes_that_do_not_fit(hidden, head, targets, words):
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(
            torch.zeros(hidden), torch.zeros(head), torch.zeros(targets, dtype=torch.int64)
        )


@pytest.mark.parametrize(
    ("hidden", "head", "targets", "words"),
    [
        (torch.float32, torch.bfloat16, torch.int64, "hidden torch.float32, head torch.bfloat16"),
        (torch.float32, torch.float32, torch.int32, "torch.int32; expected .* int64 targets"),
    ],
)
def test_dtypes_that_do_not_fit(hidden, head, targets, words):
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(
            torch.zeros(4, 8, dtype=hidden),
            torch.zeros(9, 8, dtype=head),
            torch.zeros(4, dtype=targets),
        )


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return out


@pytest.mark.parametrize("need_head", [False, True])
def test_no_tensor_has_rows_times_vocab_elements(need_head):
    M, D, V, chunk = 512, 16, 1024, 64
    hidden, head, targets = make_inputs(Case(M, D, V), torch.float32)
    hidden.requires_grad_(), head.requires_grad_(need_head)
    with LargestTensor() as seen:
        linear_cross_entropy(hidden, head, targets, chunk=chunk).backward()
    assert seen.numel == chunk * V  # of M * V
    with LargestTensor() as seen:
        plain(hidden, head, targets).backward()
    assert seen.numel == M * V  # the recorder does see such tensors


def test_nothing_of_the_logits_is_kept_for_the_backward_pass():
    M, D, V = 256, 8, 512
    hidden, head, targets = make_inputs(Case(M, D, V), torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        linear_cross_entropy(hidden.requires_grad_(), head, targets, chunk=32)
    assert sum(kept) == M * D


@pytest.mark.parametrize("case", LLAMA)
def test_the_default_chunk_keeps_about_256_mib_of_logits(case, monkeypatch):
    """At most a quarter more than 256 MiB of float32, and no fewer rows than a GEMM wants."""
    from minisft.kernels.linear_cross_entropy import op

    M, _, V = LLAMA[case]
    asked = {}

    def record(hidden, head, targets, *, chunk, **_):
        asked["chunk"] = chunk
        return torch.zeros(()), None, None

    monkeypatch.setattr(op, "loss_and_grads_by_chunk", record)
    head = torch.zeros(1).expand(V, 1)  # no memory
    linear_cross_entropy(torch.zeros(M, 1), head, torch.zeros(M, dtype=torch.int64))
    assert 64 <= asked["chunk"] <= 4096
    assert 2**27 < asked["chunk"] * V * 4 <= 1.25 * 2**28


@pytest.mark.parametrize("chunk", [5, 64])
def test_every_gradient_is_written(chunk):
    """With unwritten memory poisoned (torch fills it with NaN on request) nothing is left NaN."""
    inputs = make_inputs(SMALL["block and one"], torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        results = run(lambda *x: linear_cross_entropy(*x, chunk=chunk), inputs, torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=str)
@pytest.mark.parametrize("M, V, chunk", [(5, 131, 2), (1, 1, 8), (9, 300, 9), (3, 40000, 1)])
def test_the_kernel_gives_loss_and_gradient_and_skips_rows_without_a_target(M, V, chunk, dtype):
    hidden, head = rand(M, 24, dtype=dtype), rand(V, 24, dtype=dtype, seed=1)
    targets = torch.randint(V, (M,), generator=torch.Generator().manual_seed(0)).to(hidden.device)
    targets[M // 2] = -1
    weight = torch.full((1,), 0.25, device=hidden.device)
    found = [
        linear_cross_entropy_grad(hidden, head, targets, weight, chunk=chunk, impl=impl)
        for impl in ("triton", "reference")
    ]
    leaf, there = hidden.double().requires_grad_(), targets >= 0
    z = (leaf @ head.double().T)[there]
    loss = torch.nn.functional.cross_entropy(z, targets[there], reduction="sum")
    (d_hidden,) = torch.autograd.grad(loss, leaf)
    close(found[0][0], found[1][0], loss.detach(), "loss")
    close(found[0][1], found[1][1], d_hidden * 0.25, "d hidden")
    assert not found[0][1][~there].any()
