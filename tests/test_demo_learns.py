"""The demo as a newcomer runs it: it learns what it should, and cannot from shuffled answers."""

import importlib.util
import json
from pathlib import Path

import pytest
from test_demo import shuffled_answers

from minisft import TrainConfig, train
from minisft.demo import HERE, demo_config

SCRIPTS = Path(__file__).parent.parent / "scripts"


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "outputs"
    assert load_script("train").main(["--output-dir", str(out)]) == 0
    return out


def test_the_demo_visibly_learns(demo):
    metrics = json.loads((demo / "train_output.json").read_text())["metrics"]
    assert metrics["eval_loss"] < 0.5 * metrics["eval_loss_before"]
    assert metrics["right_before"] <= 0.1 * metrics["answers"]
    assert metrics["right_after"] >= 0.8 * metrics["answers"]
    assert metrics["answers"] >= 50


def test_the_tuned_demo_answers_by_its_adapter(demo, capsys):
    question = ["--prompt", "Name the capital of Morocco."]
    generate = load_script("generate").main
    assert generate(["--adapter", str(demo), *question]) == 0
    assert capsys.readouterr().out.strip() == "Rabat"
    assert generate(question) == 0
    assert capsys.readouterr().out.strip() != "Rabat"


def test_the_demo_never_overwrites_a_run_of_ones_own(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"config": {"model": "my/model"}}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weeks of work")
    assert load_script("train").main(["--output-dir", str(tmp_path)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"weeks of work"


def test_shuffled_answers_teach_nothing(demo, tmp_path):
    lines = (HERE / "chat_train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    path = tmp_path / "shuffled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in shuffled_answers(rows, seed=1)))
    settings = vars(demo_config()) | {"dataset": str(path), "output_dir": str(tmp_path / "out")}
    metrics = train(TrainConfig(**settings)).metrics
    # It learns what an answer looks like (a name, then the end of the turn), and no fact.
    true = json.loads((demo / "train_output.json").read_text())["metrics"]
    assert metrics["right_after"] <= 0.05 * metrics["answers"]
    assert metrics["eval_loss"] > 10 * true["eval_loss"]


def test_running_the_demo_again_starts_over(demo):
    before = (demo / "adapter_model.safetensors").read_bytes()
    assert load_script("train").main(["--output-dir", str(demo), "--max-steps", "2"]) == 0
    assert (demo / "adapter_model.safetensors").read_bytes() != before
