"""8-bit and paged optimizers on the GPU: run with `pytest -m gpu`."""

import pytest
import torch
from minisft.kernels.adamw import global_norm
from runs import metrics, pairs, read, train, write_model, write_rows
from safetensors import safe_open

from minisft.config.train import TrainConfig
from minisft.lora import allocate, param_groups
from minisft.optim import init_moments, update_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPES = {"p.lora_A.weight": (64, 4096), "p.lora_B.weight": (4096, 64), "norm.weight": (33,)}


def ten_steps(optim, device, learning_rate=1e-2):
    """The buffer after ten steps of noise of several sizes, and the state's bytes."""
    config = TrainConfig(optim=optim, learning_rate=learning_rate, weight_decay=0.1)
    flat = allocate(SHAPES, torch.device(device))
    generator = torch.Generator().manual_seed(0)
    flat.buffer.copy_(torch.randn(flat.buffer.shape, generator=generator))
    slices = param_groups(SHAPES, config)
    moments = init_moments(flat, slices, optim)
    for step in range(1, 11):
        noise = torch.randn(flat.buffer.shape, generator=generator) * 10.0 ** (step % 4 - 3)
        grads = noise.to(device)
        settings = {"norm": global_norm(grads), "step": step, "config": config}
        update_(flat, grads, moments, slices, **settings)
    return flat.buffer.cpu(), sum(t.nbytes for t in moments.values())


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "lion_8bit", "adafactor", "sgd"])
def test_the_gpu_follows_the_cpu(optim):
    """Codes may differ where a moment lies between two of them; the parameters by a small step."""
    ours, reference = ten_steps(optim, "cuda")[0], ten_steps(optim, "cpu")[0]
    moved = (reference - ten_steps(optim, "cpu", 0.0)[0]).abs().mean()
    share = (ours - reference).abs().mean() / moved
    assert share < (0.02 if "8bit" in optim else 1e-5)


def test_paged_state_gives_the_same_step():
    plain, paged = ten_steps("adamw_8bit", "cuda"), ten_steps("paged_adamw_8bit", "cuda")
    assert torch.equal(plain[0], paged[0]) and plain[1] == paged[1]


def test_eight_bits_stay_within_two_percent_of_fp32_in_a_quarter_of_its_memory(tmp_path):
    """200 steps of a run: the final loss, and the state that a checkpoint holds."""
    model = write_model(tmp_path / "model", hidden_size=256, intermediate_size=512)
    rows = write_rows(tmp_path / "rows.jsonl", pairs(400))
    final, sizes = {}, {}
    for optim in ("adamw", "adamw_8bit", "paged_adamw_8bit"):
        out = tmp_path / optim
        train(
            model=model, dataset=rows, output_dir=out, optim=optim, max_steps=200, lora_r=16,
            max_length=128, learning_rate=1e-3, logging_steps=20,
        )  # fmt: skip
        final[optim] = [m["loss"] for m in metrics(out) if "loss" in m][-1]
        with safe_open(out / "checkpoint-200" / "optimizer.safetensors", "pt") as file:
            sizes[optim] = sum(file.get_tensor(k).nbytes for k in file.keys())  # noqa: SIM118
    assert final["adamw_8bit"] == pytest.approx(final["adamw"], rel=0.02)
    assert final["paged_adamw_8bit"] == pytest.approx(final["adamw"], rel=0.02)
    assert sizes["adamw_8bit"] < 0.3 * sizes["adamw"]
    assert sizes["paged_adamw_8bit"] < 0.3 * sizes["adamw"]
    assert read(tmp_path / "paged_adamw_8bit" / "train_output.json")["global_step"] == 200


def test_paged_state_resumes(tmp_path):
    model = write_model(tmp_path / "model", hidden_size=256, intermediate_size=512)
    rows = write_rows(tmp_path / "rows.jsonl", pairs(40))
    given = {"model": model, "dataset": rows, "optim": "paged_adamw_8bit", "max_steps": 6}
    given |= {"save_steps": 3, "max_length": 128}
    train(**given, output_dir=tmp_path / "a")
    path = tmp_path / "a" / "checkpoint-3"
    train(**given, output_dir=tmp_path / "b", resume_from_checkpoint=path)
    losses = [[m["loss"] for m in metrics(tmp_path / n) if "loss" in m] for n in "ab"]
    assert losses[1] == pytest.approx(losses[0][3:], rel=1e-3)
