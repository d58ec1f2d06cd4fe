"""Two fresh processes give the same bits on a GPU, one of them stopped and resumed in the middle.

QLoRA of a model of the 1B shape, 50 steps: a few minutes. Run with `pytest -m gpu`.
"""

import os
import subprocess
import sys

import pytest
import torch
from runs import ROOT, flags, pairs, script, step_lines, write_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
NUMBERS = ("loss", "grad_norm", "learning_rate", "num_tokens", "num_loss_tokens")


def fresh(**settings):
    """scripts/train.py in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *flags(**settings)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_f22_qlora_of_the_1b_shape_is_bit_identical_over_processes_and_a_resume(tmp_path):
    argv = flags(shape="1b", output_dir=tmp_path / "1b")
    assert script("random_model").main(argv) == 0
    settings = {
        "model": tmp_path / "1b", "dataset": write_rows(tmp_path / "rows.jsonl", pairs(600)),
        "load_in_4bit": True, "packing": True, "max_length": 512, "max_steps": 50, "lora_r": 16,
        "save_steps": 25, "deterministic": True,
    }  # fmt: skip
    fresh(**settings, output_dir=tmp_path / "a")
    fresh(**settings, output_dir=tmp_path / "b")
    path = tmp_path / "b" / "checkpoint-25"
    fresh(**settings, output_dir=tmp_path / "c", resume_from_checkpoint=path)
    whole = step_lines(tmp_path / "a", *NUMBERS)
    assert len(whole) == 50 and whole[0][1] != whole[-1][1]
    assert step_lines(tmp_path / "b", *NUMBERS) == whole
    assert step_lines(tmp_path / "c", *NUMBERS) == whole[25:]
    file = "adapter_model.safetensors"
    for name in ("b", "c"):
        assert (tmp_path / name / file).read_bytes() == (tmp_path / "a" / file).read_bytes()
