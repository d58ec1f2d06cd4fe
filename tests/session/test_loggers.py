"""What TensorBoard and an offline W&B run hold, read back; a logger that fails stops nothing."""

import json
import struct
import sys
import types

import pytest
from runs import call, flags, metrics, pairs, read, train, write_model, write_rows

from minisft.config.errors import UserError
from minisft.config.train import TrainConfig
from minisft.session import loggers as module
from minisft.session.loggers import Logger, loggers, named

pytest.importorskip("tensorboard")
SMALL = {"lora_r": 4, "max_length": 64, "learning_rate": 1e-2, "max_steps": 3, "save_steps": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    return {
        "model": write_model(directory / "model"),
        "dataset": write_rows(directory / "train.jsonl", pairs(20)),
        "eval_dataset": write_rows(directory / "eval.jsonl", pairs(6, first=50)),
    }


def logged(out):
    """(name, step) -> value of everything in metrics.jsonl; the last where a step has two."""
    return {(name, m["step"]): v for m in metrics(out) for name, v in named(m).items()}


def scalars(directory):
    """(tag, step) -> value, as TensorBoard itself reads its event files."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}


def test_tensorboard_holds_every_number(inputs, tmp_path):
    out = tmp_path / "out"
    train(**inputs, **SMALL, output_dir=out, report_to="tensorboard", run_name="first")
    found = scalars(out / "runs" / "first")
    assert found == pytest.approx(logged(out), rel=1e-6)  # float32 in the event files
    assert {("train/loss", 1), ("eval/loss", 0), ("eval/loss", 3)} <= set(found)
    assert ("train/learning_rate", 3) in found


def test_a_resumed_run_goes_on_in_the_same_place(inputs, tmp_path):
    out, logs = tmp_path / "out", tmp_path / "logs"
    settings = {**inputs, **SMALL, "report_to": "tensorboard", "logging_dir": logs}
    train(**settings, output_dir=out)
    (out / "train_output.json").unlink()
    train(**settings, output_dir=out, resume_from_checkpoint=out / "checkpoint-2")
    found = scalars(logs / "out")
    assert [step for name, step in sorted(found) if name == "train/loss"] == [1, 2, 3]
    assert found == pytest.approx(logged(out), rel=1e-6)


def wandb_records(data):
    """The records of a .wandb file: LevelDB's log format after seven bytes.

    Blocks of 32 KiB hold pieces: checksum (4 bytes), length (2), kind (1: 1 whole, 2 first, 3
    middle, 4 last), content; fewer than seven bytes at a block's end are filling.
    """
    place, parts = 7, []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def test_an_offline_wandb_run_holds_every_number(inputs, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "out"
    train(**inputs, **SMALL, output_dir=out, report_to=["tensorboard", "wandb"], run_name="mine")
    (file,) = out.glob("wandb/offline-run-*/run-*.wandb")
    found, names = {}, []
    for data in wandb_records(file.read_bytes()):
        record = Record.FromString(data)
        names += [record.run.display_name] if record.HasField("run") else []
        items = {"".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        for name, text in items.items():
            if "/" in name:
                found[name, int(items["_step"])] = json.loads(text)
    assert found == pytest.approx(logged(out), rel=1e-12)
    assert set(names) == {"mine"}
    assert scalars(out / "runs" / "mine") == pytest.approx(found, rel=1e-6)


def test_trackio_is_given_every_number(inputs, tmp_path, monkeypatch):
    """By a stand-in of its interface: the package itself starts a server."""
    seen = []
    fake = types.ModuleType("trackio")
    fake.init = lambda **settings: types.SimpleNamespace(
        log=lambda metrics, step: seen.append((step, metrics)),
        finish=lambda: seen.append(settings["name"]),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: True)
    train(**inputs, **SMALL, output_dir=tmp_path / "out", report_to="trackio")
    assert seen.pop() == "out"
    assert {(n, step): v for step, m in seen for n, v in m.items()} == logged(tmp_path / "out")


@pytest.mark.parametrize("where", ["open", "write", "close"])
def test_a_logger_that_fails_is_one_warning(inputs, tmp_path, monkeypatch, where):
    def fail(*_):
        raise RuntimeError("no connection\nand more")

    def opened(config, out, first_step):
        if where == "open":
            fail()
        return Logger("wandb", fail if where == "write" else lambda *_: None, fail)

    monkeypatch.setitem(module._OPEN, "wandb", opened)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: True)
    out = tmp_path / "out"
    outcome = train(**inputs, **SMALL, output_dir=out, report_to=["wandb", "tensorboard"])
    warnings = [line for line in outcome.out.splitlines() if line.startswith("warning: --report")]
    assert len(warnings) == 1 and "(no connection); metrics.jsonl has the numbers" in warnings[0]
    assert read(out / "train_output.json")["global_step"] == 3
    assert scalars(out / "runs" / "out") == pytest.approx(logged(out), rel=1e-6)


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    line = {"step": 4, "loss": float("nan"), "eval_loss": 2.0, "grad_norm": None, "epoch": 1.0}
    assert named(line) == {"eval/loss": 2.0, "train/epoch": 1.0}
    with loggers(TrainConfig(), tmp_path, 0, print) as log:
        log(line)


def test_a_logger_that_is_not_installed_is_told_before_anything_is_removed(inputs, tmp_path):
    settings = {**inputs, **SMALL, "output_dir": tmp_path}
    train(**settings)
    before = read(tmp_path / "train_output.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.importlib.util, "find_spec", lambda name: None)
        outcome = call("train", flags(**settings, report_to="wandb", overwrite_output_dir=True))
    assert outcome.code == 2 and "--report-to wandb: the package is not installed" in outcome.err
    assert read(tmp_path / "train_output.json") == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"report_to": "comet_ml"}, "expected some of none, tensorboard, wandb, trackio"),
        ({"run_name": "x"}, "--run-name x has no effect with --report-to none"),
        ({"logging_dir": "x", "report_to": "none"}, "--logging-dir x has no effect"),
    ],
)
def test_malformed_settings_are_told(settings, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings)


def test_none_means_none():
    assert TrainConfig(report_to="none").report_to == ()
