"""Quantising while loading, on the GPU: where the tensors are, what they hold, what it takes."""

import pytest
import torch
from minisft.kernels.nf4 import NF4Weight, dequantize
from runs import write_model

from minisft.config.train import TrainConfig
from minisft.files.load import load_base

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
LARGEST = 4096 * 1024 * 4  # bytes of an MLP matrix as it is stored, float32
PIECE = 48 * 2**20  # what quantising a piece at a time takes


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base"), **SHAPE)


def test_the_peak_is_the_quantised_model_and_one_tensor(base):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model, state = load_base(TrainConfig(model=str(base), device="cuda", lora_r=1))
    kept = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    packed = [w for w in model.frozen.values() if isinstance(w, NF4Weight)]
    assert len(packed) == 7 * SHAPE["num_hidden_layers"]
    assert all(t.is_cuda for w in packed for t in w if isinstance(t, torch.Tensor))
    assert peak - kept <= LARGEST + PIECE
    plain = sum(4096 * 1024 * 3 + 1024 * 1024 * 3 for _ in range(SHAPE["num_hidden_layers"])) * 2
    assert kept < 0.5 * plain
    assert state.trainable.buffer.is_cuda


def test_the_gpu_quantises_as_the_cpu(base):
    """The mean of the scales is summed in another order: codes are equal, scales to a rounding."""
    ours, _ = load_base(TrainConfig(model=str(base), device="cuda", dtype="float32"))
    theirs, _ = load_base(TrainConfig(model=str(base), device="cpu", dtype="float32"))
    for name, weight in ours.frozen.items():
        other = theirs.frozen[name]
        if not isinstance(weight, NF4Weight):
            assert torch.equal(weight.cpu(), other)
            continue
        assert torch.equal(weight.packed.cpu(), other.packed), name
        a, b = dequantize(weight, torch.float32).cpu(), dequantize(other, torch.float32)
        assert (a - b).norm() <= 1e-3 * b.norm(), name
