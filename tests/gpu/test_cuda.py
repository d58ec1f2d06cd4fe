"""The same mathematics on the GPU: run with `pytest -m gpu`.

Rule of comparison: the error of a low-precision result against float32 is at most three times that
of plain PyTorch in the same precision.
"""

import pytest
import torch
import torch.nn.functional as F

from minisft.batches import Batches, RowSchedule, TokenizedDataset
from minisft.config.lora import LoraConfig
from minisft.config.model import ModelConfig
from minisft.llama import Compute
from minisft.lora import allocate, init_lora_, trainable_shapes
from minisft.nn import documents_of, dropout, packed_attention
from minisft.step import ExecutionPlan, loss_and_grads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CFG = ModelConfig(
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=448,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
)
LENGTHS = {"uneven": (1, 63, 200, 17, 128), "equal": (128, 128, 128), "one": (300,)}


def documents(lengths, device):
    return documents_of(lengths, device)


def reference_attention(q, k, v, lengths):
    """Softmax attention written out, one document and head at a time."""
    out = []
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    for q_, k_, v_ in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        scores = torch.einsum("tnh,snh->nts", q_, k_) / q.shape[-1] ** 0.5
        causal = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril()
        p = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        out.append(torch.einsum("nts,snh->tnh", p, v_))
    return torch.cat(out)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_packed_attention_forward_and_gradients(dtype, case, head_dim):
    lengths = LENGTHS[case]
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(sum(lengths), n, head_dim) for n in (4, 2, 2, 4)]
    q, k, v, dy = (torch.randn(s, device="cuda", generator=generator) for s in shapes)

    def run(attend, dtype):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        y = attend(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    truth = run(lambda *x: reference_attention(*x, lengths), torch.float64)
    plain = run(lambda *x: reference_attention(*x, lengths), dtype)
    ours = run(lambda *x: packed_attention(*x, documents(lengths, "cuda")), dtype)
    for name, t, p, o in zip(("y", "dq", "dk", "dv"), truth, plain, ours, strict=True):
        assert relative(o, t) <= 3 * relative(p, t) + 1e-5, name


def test_documents_do_not_see_each_other():
    lengths = (50, 70)
    q, k, v = (torch.randn(120, n, 64, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2))
    before = packed_attention(q, k, v, documents(lengths, "cuda"))[50:]
    k[:50], v[:50] = torch.randn_like(k[:50]), torch.randn_like(v[:50])
    after = packed_attention(q, k, v, documents(lengths, "cuda"))[50:]
    assert torch.equal(before, after)


def make_problem(device, dtype, lora_dropout=0.0, checkpoint_blocks=False):
    generator = torch.Generator().manual_seed(1)
    frozen = {
        n: (torch.randn(s, generator=generator) * 0.05 + (1.0 if "norm" in n else 0.0)).to(
            device, dtype
        )
        for n, s in CFG.weight_shapes().items()
    }
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=lora_dropout)
    flat = allocate(trainable_shapes(lora, CFG), torch.device("cpu"))
    init_lora_(flat, 0)
    flat.buffer.add_(torch.randn(flat.buffer.shape, generator=generator) * 0.02)
    moved = allocate(trainable_shapes(lora, CFG), torch.device(device))
    moved.buffer.copy_(flat.buffer)
    lengths = torch.tensor([40, 7, 133, 90, 5, 61, 77, 80])
    total = int(lengths.sum())
    dataset = TokenizedDataset(
        input_ids=torch.randint(0, 1000, (total,), generator=generator, dtype=torch.int32),
        labels=torch.randint(0, 1000, (total,), generator=generator, dtype=torch.int32),
        document_offsets=torch.cat((torch.zeros(1), lengths.cumsum(0))).long(),
        row_offsets=torch.arange(9),
        stats={},
    )
    batches = Batches(
        dataset, RowSchedule(8, 2, 4, seed=0), 200, torch.device(device), dropout=lora_dropout > 0
    )
    compute = Compute(CFG, dtype, lora.scaling, lora_dropout, checkpoint_blocks)
    return moved, frozen, batches.batch(0), ExecutionPlan(compute)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_float32_step_equals_cpu(rate):
    cpu = loss_and_grads(*make_problem("cpu", torch.float32, rate))
    gpu = loss_and_grads(*make_problem("cuda", torch.float32, rate))
    assert abs(cpu[0].item() - gpu[0].item()) < 1e-5
    assert relative(gpu[1].cpu(), cpu[1]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_step_is_near_float32(dtype):
    truth = loss_and_grads(*make_problem("cuda", torch.float32))
    plain = loss_and_grads(*make_problem("cpu", dtype))  # no fused attention there
    ours = loss_and_grads(*make_problem("cuda", dtype))
    assert (
        abs(ours[0].item() - truth[0].item()) <= 3 * abs(plain[0].item() - truth[0].item()) + 2e-3
    )
    assert relative(ours[1], truth[1]) <= 3 * relative(plain[1].cuda(), truth[1])


def test_checkpointing_changes_nothing():
    plain = loss_and_grads(*make_problem("cuda", torch.float32, 0.1, False))
    again = loss_and_grads(*make_problem("cuda", torch.float32, 0.1, True))
    assert torch.equal(plain[0], again[0])
    assert relative(again[1], plain[1]) < 1e-6


def test_dropout_draws_are_the_cpu_s():
    x, keys = torch.randn(50, 96), torch.arange(50) * 977
    assert torch.equal(dropout(x, keys, 5, 0.3), dropout(x.cuda(), keys.cuda(), 5, 0.3).cpu())


def test_dense_and_packed_paths_agree():
    lengths = (64, 64)
    q, k, v = (torch.randn(128, n, 64, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2))
    dense = packed_attention(q, k, v, documents(lengths, "cuda"))
    one = torch.cat([
        F.scaled_dot_product_attention(
            *(x[s].transpose(0, 1).unsqueeze(0) for x in (q, k, v)), is_causal=True, enable_gqa=True
        ).squeeze(0).transpose(0, 1)
        for s in (slice(0, 64), slice(64, 128))
    ])  # fmt: skip
    assert relative(dense, one) < 5e-3
