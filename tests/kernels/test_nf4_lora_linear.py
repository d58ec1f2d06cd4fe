"""The 4-bit linear with LoRA: kernels against float64; the op under compile and checkpointing."""

import functools

import pytest
import torch
from fused import DEVICE, DTYPES, GPU, close, rand, wide
from minisft.kernels._triton import num_sms
from minisft.kernels.nf4 import NF4Weight, dequantize, quantize
from minisft.kernels.nf4_lora_linear import Adapter, backward, forward, many_rows, nf4_lora_linear
from minisft.kernels.nf4_lora_linear.cases import DECODED_ONLY, JOINED, RAGGED_RANK, SMALL
from minisft.kernels.nf4_lora_linear.many_rows import is_fastest
from torch.utils.checkpoint import checkpoint

IMPLS = ("fused", "decode")


def make(M, I, O, R, dtype, double_quant=True, bias=False):
    weight = quantize(rand(O, I, scale=0.1), double_quant=double_quant)
    A = rand(R, I, dtype=dtype, seed=2) if R else None
    B = rand(O, R, dtype=dtype, seed=3, scale=0.3) if R else None
    b = rand(O, dtype=dtype, seed=4) if bias else None
    return rand(M, I, dtype=dtype, seed=1), weight, b, A, B


def lora(A, B, scaling=0.5):
    return None if A is None else Adapter(A, B, scaling)


def exact(x, weight, bias, A, B, s):
    """float64 leaves, and y of them; W as it decodes in x's dtype."""
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, A, B)]
    y = leaves[0] @ dequantize(weight, x.dtype).double().T
    if A is not None:
        y = y + leaves[0] @ leaves[1].T @ leaves[2].T * s
    return leaves, y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
@pytest.mark.parametrize(
    "case, impl",
    [(c, i) for c in SMALL for i in IMPLS]
    + [(c, "decode") for c in (*DECODED_ONLY, RAGGED_RANK)]
    + [(c, "joined") for c in JOINED],
    ids=str,
)
def test_forward_and_backward(case, impl, double_quant, dtype):
    if GPU and impl == "joined" and dtype == torch.float32:
        pytest.skip("the joined product takes half precision")
    x, weight, bias, A, B = make(*case, dtype, double_quant, bias=case[0] % 2 == 1)
    y, u = forward(x, weight, bias, lora(A, B), impl=impl)
    y_ref, u_ref = forward(x, weight, bias, lora(A, B), impl="reference")
    leaves, truth = exact(x, weight, bias, A, B, 0.5)
    close(y, y_ref, truth.detach(), "y")
    dy = rand(*y.shape, dtype=dtype, seed=5)
    grads = backward(dy, x, u, weight, lora(A, B), impl=impl)
    expected = backward(dy, x, u_ref, weight, lora(A, B), impl="reference")
    there = [leaf for leaf in leaves if leaf is not None]
    truths = iter(torch.autograd.grad(truth, there, dy.double()))
    for name, leaf, grad, ref in zip(("dx", "dA", "dB"), leaves, grads, expected, strict=True):
        if leaf is None:
            assert grad is None
        else:
            close(grad, ref, next(truths), name)
    nothing = backward(dy, x, u, weight, lora(A, B), need_dx=False, impl=impl)
    assert nothing[0] is None


@pytest.mark.parametrize("impl", (*IMPLS, "joined"))
def test_nothing_is_read_that_was_not_written(impl, monkeypatch):
    """Memory handed out holds NaN."""
    real = torch.empty

    def poisoned_empty(*args, **kwargs):
        out = real(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned_empty)
    x, weight, bias, A, B = make(16, 128, 72, 4, torch.float16)
    y, u = forward(x, weight, bias, lora(A, B), impl=impl)
    assert y.isfinite().all()
    for grad in backward(y, x, u, weight, lora(A, B), impl=impl):
        assert grad.isfinite().all()


def leaf_inputs(dtype=torch.float32, M=16):
    x, weight, _, A, B = make(M, 128, 70, 4, dtype)
    return x.requires_grad_(), weight, A.requires_grad_(), B.requires_grad_()


def linear(x, weight, A, B):
    return nf4_lora_linear(x, weight, None, A, B, 0.5)


def test_gradients_reach_x_a_b_and_bias():
    x, weight, A, B = leaf_inputs()
    bias = rand(70).requires_grad_()
    dy = rand(16, 70, seed=9)
    y = nf4_lora_linear(x, weight, bias, A, B, 0.5)
    grads = torch.autograd.grad(y, (x, A, B, bias), dy)
    leaves, truth = exact(x.detach(), weight, bias.detach(), A.detach(), B.detach(), 0.5)
    truths = (*torch.autograd.grad(truth, leaves, dy.double()), dy.sum(0))
    for grad, expected in zip(grads, truths, strict=True):
        assert torch.allclose(grad.double(), expected.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapted", [True, False])
def test_opcheck(adapted):
    x, weight, A, B = leaf_inputs()
    A, B = (A, B) if adapted else (None, None)
    parts = (*weight[:6], *weight.shape, weight.blocksize, weight.quant_type)
    torch.library.opcheck(torch.ops.minisft.nf4_lora_linear.default, (x, None, A, B, 0.5, *parts))


@pytest.mark.parametrize("M", [16, 100])
def test_compiles_whole_forward_and_backward(M):
    x, weight, A, B = leaf_inputs(M=M)
    torch._dynamo.reset()
    backend = "inductor" if GPU else "aot_eager"

    def loss(x, A, B):
        return linear(torch.sin(x), weight, A, B).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    ours = torch.autograd.grad(compiled(x, A, B), (x, A, B))
    theirs = torch.autograd.grad(loss(x, A, B), (x, A, B))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_checkpointing_recomputes_and_keeps_no_activation():
    x, weight, A, B = leaf_inputs()
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.minisft.nf4_lora_linear.default:
                calls.append(1)
            return func(*args, **(kwargs or {}))

    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with Count():
        with hooks:
            y = checkpoint(linear, x, weight, A, B, use_reentrant=False)
        assert len(calls) == 1
        y.sum().backward()
    assert len(calls) == 2
    inputs = {t.data_ptr() for t in (x, A, B)}
    assert {t.data_ptr() for t in kept if t.numel()} <= inputs, (
        "something beside the inputs was kept"
    )
    plain = torch.autograd.grad(linear(x, weight, A, B).sum(), (x, A, B))
    for leaf, expected in zip((x, A, B), plain, strict=True):
        assert torch.equal(leaf.grad, expected)


def test_a_policy_can_name_the_op():
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    x, weight, A, B = leaf_inputs()
    calls = []

    def policy(ctx, op, *args, **kwargs):
        mine = op is torch.ops.minisft.nf4_lora_linear.default
        calls.append((mine, ctx.is_recompute))
        return CheckpointPolicy.MUST_SAVE if mine else CheckpointPolicy.PREFER_RECOMPUTE

    context = functools.partial(create_selective_checkpoint_contexts, policy)
    y = checkpoint(linear, x, weight, A, B, use_reentrant=False, context_fn=context)
    y.sum().backward()
    assert (True, False) in calls


def test_the_joined_product_is_fastest_at_full_waves_and_ranks_up_to_64():
    """Tiles of 128 x 256; num_sms is two without a GPU."""
    many = num_sms(torch.device(DEVICE)) // 2
    x = torch.empty(128, 8, device=DEVICE)
    assert is_fastest(x, 2 * many * 256, 64) and not is_fastest(x, 2 * many * 256, 65)
    assert is_fastest(x.expand(2 * many, 128, 8).flatten(0, 1), 256, 16)
    assert not is_fastest(x, 256, 16) and not is_fastest(x, (2 * many + 1) * 256, 16)
    assert is_fastest(x, 2 * many * 256 * 9 + 1, 16)  # nine rounds and a little


@pytest.mark.parametrize("M", [1, 63, 64, 255, 256, 257, 1400, 4096, 5200, 16384, 100_001])
@pytest.mark.parametrize("blocks, padded", [(1, 16), (16, 16), (128, 16), (448, 256), (64, 64)])
def test_every_row_is_in_one_split(M, blocks, padded):
    """Of dB's, of equal size, and of dA's, of two sizes; whole blocks of rows, but for the last."""
    splits = many_rows.splits_of(M, blocks, padded)
    for rows in (splits.rows, splits.large, splits.small):
        assert rows % many_rows.BLOCK_T == 0
    assert splits.rows * splits.for_dB >= M and splits.for_dB in (1, 2, 4, 8, 16)
    small = splits.for_dA - many_rows.LARGE
    assert many_rows.LARGE * splits.large <= M and small >= 1
    assert many_rows.LARGE * splits.large + small * splits.small >= M


def joined_backward(dy, x, u, weight, A, B):
    return backward(dy, x, u, weight, lora(A, B), impl="joined")


@pytest.fixture
def joined():
    """(dy, x, u, weight, A, B) for the joined pass, and its gradients."""
    x, weight, _, A, B = make(300, 192, 264, 4, torch.float16)
    inputs = (rand(300, 264, dtype=torch.float16, seed=5), x, x @ A.T, weight, A, B)
    return inputs, joined_backward(*inputs)


def moved(x, offset=1):
    """The same, `offset` entries behind where torch would put it."""
    at = torch.empty(x.numel() + offset, dtype=x.dtype, device=x.device)[offset:]
    return at.view(x.shape).copy_(x)


@pytest.mark.parametrize(
    "place, change",
    [
        (1, moved),
        (1, wide),  # rows of odd length, with NaN between them
        (1, functools.partial(wide, extra=8)),  # rows aligned to 16 bytes, with NaN between them
        (0, functools.partial(wide, extra=8)),
        (2, wide),
        (3, lambda weight: weight._replace(packed=moved(weight.packed))),
        (5, lambda B: B.T.contiguous().T),
    ],
)
def test_inputs_that_lie_elsewhere(joined, place, change):
    """dy decides the path; x, u, B and the weight may be strided or unaligned."""
    inputs, expected = joined
    inputs = [change(given) if i == place else given for i, given in enumerate(inputs)]
    found = joined_backward(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_does_not_fit_is_refused():
    x, weight, A, B = leaf_inputs()
    with pytest.raises(ValueError, match=r"x is \(16, 64\); expected \[rows, 128\]"):
        linear(x[:, :64], weight, A, B)
    with pytest.raises(ValueError, match="must be given together"):
        nf4_lora_linear(x, weight, None, A, None)
    with pytest.raises(ValueError, match=r"A is \(4, 64\)"):
        linear(x, weight, A[:, :64], B)
    with pytest.raises(ValueError, match="expected one"):
        linear(x, weight, A.half(), B)
    with pytest.raises(ValueError, match=r"multiples of 16 bytes.* a weight \(70, 128\), rank 4"):
        forward(x.half(), weight, None, lora(A.half(), B.half()), impl="joined")
    x16, weight16, _, A16, B16 = make(16, 128, 72, 4, torch.float16)
    with pytest.raises(ValueError, match=r"one or more rows .* got x \(0, 128\)"):
        forward(x16[:0], weight16, None, lora(A16, B16), impl="joined")
    with pytest.raises(ValueError, match="no adapter"):
        forward(x.half(), weight, None, None, impl="joined")
    with pytest.raises(ValueError, match="takes 1 to 64 rows"):
        forward(rand(65, 128), weight, None, None, impl="fused")
    assert isinstance(weight, NF4Weight) and weight.packed.device.type == DEVICE.split(":")[0]
