"""scripts/bench.py on a CPU: its output, its errors, and its lower bounds."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench
from random_model import config_json

from minisft.config.hf import parse_model_config

TINY = ["--shape", "tiny", "--vocab-size", "300", "--length", "32", "--steps", "1"]
TINY += ["--device", "cpu"]


@pytest.mark.parametrize("impl", ["autograd", "explicit"])
@pytest.mark.parametrize("rows", [[], ["--rows", "short", "--packing"], ["--rows", "short"]])
def test_a_step_is_one_line_of_json(impl, rows, capsys):
    assert bench.main(["step", *TINY, "--step-impl", impl, *rows]) == 0
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    found = json.loads(line)
    assert found["tokens_per_second"] > 0 and found["device"] == "cpu"
    assert found["pass"].startswith("autograd" if impl == "autograd" else "explicit block")
    assert err.startswith(
        "tiny on cpu: 2 layers, vocabulary 300; 4 steps of 2 x 4 rows of up to 32"
    )
    assert "tokens_per_second" in err
    if not rows:
        assert found["tokens_per_step"] == 2 * 4 * 32


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "is not a benchmark"),
        (["speed"], "is not a benchmark"),
        (["table", "--quick"], "is not a benchmark"),
        (["kernel"], "is not a benchmark"),
        (["kernel", "nf4", "--device", "cpu"], "kernels are timed on a GPU"),
        (["kernel", "softmax"], "expected one of"),
        (["step", "--shape", "2b"], "expected one of tiny"),
        (
            ["step", "--device", "cpu"],
            "1b on cpu: 16 layers, vocabulary 128256; 15 steps of 2 x 4 r",
        ),
        (
            ["step", "--device", "cpu"],
            " s: too long; use a GPU or a smaller benchmark, such as --shape tiny",
        ),
        (["step", *TINY, "--rows", "long"], "expected full or short"),
        (["step", *TINY, "--gradient-checkpointing", "offload"], "needs the explicit pass"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(argv, message, capsys):
    assert bench.main(argv) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_the_table_has_a_row_for_each_and_goes_on_after_one_that_fails(monkeypatch, capsys):
    monkeypatch.setattr(bench, "ROWS", ("--shape nope", " ".join(TINY)))
    assert bench.main(["table"]) == 2
    out, err = capsys.readouterr()
    assert err == "error: 1 of 2 rows failed; the table shows each error\n"
    lines = out.splitlines()
    assert len(lines) == 4 and "autograd" in lines[3] and "--shape is 'nope'" in lines[2]


@pytest.mark.parametrize("shape, floor", [("1b", 144.5e3), ("8b", 24.6e3)])
def test_the_arithmetic_floor_is_that_of_the_formulas(shape, floor):
    """The expected FLOPs per token were counted on paper: 790 TFLOP/s, rows of 2,048 tokens."""
    cfg = parse_model_config(config_json(shape, 128256))
    arithmetic, roofline = bench.floors(cfg, 16, 2048, 4096)
    assert 1 / arithmetic == pytest.approx(floor, rel=2e-3)
    assert roofline > arithmetic
