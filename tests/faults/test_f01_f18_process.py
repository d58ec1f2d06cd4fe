"""Faults 1 to 18: what kills a process, what fails to store, and what is found on coming back."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, call, flags, metrics, pairs, read, step_lines, train, tree, write_model
from runs import write_rows as rows_file
from safetensors.torch import load_file

from minisft.files.checkpoint import list_checkpoints, verify

SETTINGS = {
    "max_steps": 4, "save_steps": 1, "lora_r": 4, "max_length": 64, "learning_rate": 1e-2,
    "gradient_accumulation_steps": 2,
}  # fmt: skip
RANKS = pytest.mark.skip(reason="waits for data parallel training")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    return {
        "model": write_model(directory / "model"),
        "dataset": rows_file(directory / "rows.jsonl", pairs(20)),
        **SETTINGS,
    }


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A finished run of four steps, a checkpoint after each."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train(**inputs, output_dir=out)
    return out


@pytest.fixture
def cut_short(whole, tmp_path):
    """The same, killed after the third checkpoint."""
    out = tmp_path / "cut"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoint-4")
    for name in ("train_output.json", "adapter_model.safetensors", "adapter_config.json"):
        (out / name).unlink()
    return out


@pytest.fixture(scope="module")
def long_form(tmp_path_factory):
    """What tests/faults/long_form.py finds at a fortieth of its counts."""
    place = tmp_path_factory.mktemp("long_form")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "faults" / "long_form.py"), "0.025", str(place)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = {k: v for line in done.stdout.splitlines() for k, v in json.loads(line).items()}
    for scenario in found.values():
        assert "error" not in scenario, scenario["error"]
    return found


def refused(inputs, out, **changes):
    """The one line of a run that ends with exit code 2."""
    outcome = call("train", flags(**inputs | changes, output_dir=out))
    assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome
    assert outcome.err.startswith("error: ")
    return outcome.err


def resumed(inputs, out, **changes):
    return train(**inputs | changes, output_dir=out, resume_from_checkpoint="auto")


def assert_as_whole(out, whole):
    """The log lines, the result and the last checkpoint are those of the run nobody disturbed."""
    names = ("loss", "grad_norm", "learning_rate", "num_tokens")
    assert step_lines(out, *names) == step_lines(whole, *names)
    for file in ("adapter_model.safetensors", "checkpoint-4/optimizer.safetensors"):
        assert (out / file).read_bytes() == (whole / file).read_bytes()


# --------------------------------------------------------------------------------- kills, signals


def test_f01_after_kill_9_the_newest_visible_checkpoint_loads(long_form):
    assert long_form["kills"]["kills"] >= 5 and long_form["kills"]["unusable"] == 0


def test_f02_after_kill_9_auto_continues_to_the_same_run(long_form):
    assert long_form["kills"]["wrong"] == []


def test_f03_sigterm_in_every_phase_saves_and_exits_75(long_form):
    found = long_form["terminations"]
    assert found["signals"] >= 6 and found["missed"] == [] and found["wrong"] == []
    assert found["lost_steps"] == 0 and found["slowest_exit_s"] < 30


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_f03_before_the_first_step_there_is_nothing_to_save(inputs, tmp_path, monkeypatch, name):
    from minisft import run

    def load_base(*args):
        os.kill(os.getpid(), getattr(signal, name))
        raise AssertionError("the signal was not raised")

    with monkeypatch.context() as patch:
        patch.setattr(run, "load_base", load_base)
        outcome = call("train", flags(**inputs, output_dir=tmp_path))
    assert outcome.code == 75
    assert f"{name}: stopped before its first step" in outcome.err
    assert os.listdir(tmp_path) == [".lock"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as before
    train(**inputs, output_dir=tmp_path)


def test_f03_an_evaluation_is_broken_off_and_made_up_for(inputs, tmp_path, monkeypatch):
    from minisft.session import evaluate

    given = inputs | {"eval_dataset": inputs["dataset"], "eval_strategy": "steps", "eval_steps": 2}
    train(**given, output_dir=tmp_path / "whole")
    real, calls = evaluate.evaluation, []

    def evaluation(*args):
        calls.append(1)
        if len(calls) == 2:  # the first is before step 1, the second after step 2
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the signal was not raised")
        return real(*args)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluation", evaluation)
        outcome = call("train", flags(**given | {"save_steps": 500}, output_dir=out))
    assert outcome.code == 75 and "SIGTERM: stopped after step 2" in outcome.err
    assert [p.name for p in list_checkpoints(out)] == ["checkpoint-2"]
    resumed(given, out)
    wanted = [(m["step"], m.get("eval_loss")) for m in metrics(tmp_path / "whole")]
    assert [(m["step"], m.get("eval_loss")) for m in metrics(out)] == wanted
    assert [step for step, value in wanted if value] == [0, 2, 4]


def test_f03_an_evaluation_that_no_checkpoint_knows_of_is_made_again(inputs, tmp_path, monkeypatch):
    """Stopped in the evaluation after step 2, made up for on resuming, then killed before step 3's
    checkpoint: the next resume makes it once more, and its line stands once."""
    from minisft import run as loop
    from minisft.session import evaluate

    given = inputs | {
        "eval_dataset": inputs["dataset"], "eval_strategy": "steps", "eval_steps": 2,
        "save_strategy": "best", "eval_generate": 2, "greater_is_better": True,
    }  # fmt: skip
    del given["save_steps"]
    train(**given, output_dir=tmp_path / "whole")
    real, out = evaluate.evaluation, tmp_path / "out"

    def stopped(*args):
        if (out / "step0.json").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    def killed(*args):
        raise MemoryError("as good as a kill")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluation", stopped)
        assert call("train", flags(**given, output_dir=out)).code == 75
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step_", killed)
        argv = flags(**given, output_dir=out, resume_from_checkpoint="auto")
        assert call("train", argv).code == 2
    assert metrics(out)[-1]["step"] == 2 and "eval_loss" in metrics(out)[-1]
    resumed(given, out)
    both = (out, tmp_path / "whole")
    values = [[(m["step"], m.get("eval_loss")) for m in metrics(d)] for d in both]
    assert values[0] == values[1]
    samples = [(d / "samples.jsonl").read_text() for d in both]
    assert samples[0] == samples[1]
    state = [read(d / "checkpoint-4" / "trainer_state.json") for d in both]
    assert state[0]["best_step"] == state[1]["best_step"] == 2  # the highest loss is the first


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_f04_a_second_signal_acts_at_once_and_breaks_no_checkpoint(inputs, tmp_path, name):
    """In the middle of a save, in a process of its own: the default action ends it."""
    code = (
        "import os, signal, sys, torch; torch.set_num_threads(1)\n"
        "from runs import script\n"
        "main = script('train').main\n"
        "from minisft.files import checkpoint\n"
        "real, calls = checkpoint.sync, []\n"
        "def sync(path):\n"
        "    real(path)\n"
        "    calls.append(path)\n"
        "    if path.name == 'optimizer.safetensors' and '-2-' in str(path):\n"
        f"        os.kill(os.getpid(), signal.{name})\n"
        f"        os.kill(os.getpid(), signal.{name})\n"
        "        raise AssertionError('still here')\n"
        "checkpoint.sync = sync\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    argv = flags(**inputs, output_dir=tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", code, *argv],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -getattr(signal, name), done.stderr
    assert [p.name for p in list_checkpoints(tmp_path / "out")] == ["checkpoint-1"]
    assert verify(tmp_path / "out" / "checkpoint-1") == ""
    assert resumed(inputs, tmp_path / "out").code == 0


@RANKS
def test_f05_a_signal_to_one_rank_stops_all():
    raise NotImplementedError


# ----------------------------------------------------------------------------------------- storage


def test_f06_no_room_for_a_checkpoint_is_said_before_the_first_step(inputs, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4096))
    message = refused(inputs, tmp_path / "out")
    assert "0.00 GiB free; one checkpoint and the result need" in message
    assert not list_checkpoints(tmp_path / "out")


def test_f06_a_disk_that_fills_up_keeps_the_old_checkpoint(inputs, whole, tmp_path, monkeypatch):
    """The fsync of the second save fails; the run ends, and goes on once there is room."""
    real = os.fsync

    def fsync(fd):
        if "tmp-checkpoint-2" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(28, os.strerror(28))
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        message = refused(inputs, tmp_path / "out")
    assert "No space left on device" in message and "free space" in message
    assert "Earlier checkpoints are intact" in message
    assert verify(tmp_path / "out" / "checkpoint-1") == ""
    resumed(inputs, tmp_path / "out")
    assert_as_whole(tmp_path / "out", whole)


def test_f07_an_output_directory_that_cannot_be_written_is_refused_at_the_start(inputs, tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("/proc/minisft", tmp_path / "file" / "out"):
        message = refused(inputs | {"model": "nobody/never-loaded"}, out)
        assert f"--output-dir {out}" in message and "choose another directory" in message


def test_f07_an_output_directory_that_vanishes_ends_the_run(inputs, tmp_path, monkeypatch):
    from minisft import run as loop

    real, out = loop.train_step_, tmp_path / "out"

    def train_step_(state, *args):
        if state.step == 1:
            shutil.rmtree(out)
        return real(state, *args)

    monkeypatch.setattr(loop, "train_step_", train_step_)
    message = refused(inputs, out)
    assert "checkpoint-2: cannot be written (No such file or directory" in message


def test_f08_truncated_files_of_a_checkpoint_are_skipped(long_form, inputs, whole, cut_short):
    assert long_form["cuts"]["tried"] >= 2 and long_form["cuts"]["undetected"] == []
    file = cut_short / "checkpoint-3" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    outcome = resumed(inputs, cut_short)
    assert "skipping checkpoint-3: adapter_model.safetensors does not match" in outcome.out
    assert "checkpoint-2 at step 2" in outcome.out
    assert_as_whole(cut_short, whole)


def test_f09_a_flipped_bit_is_found_by_the_digest(long_form, inputs, whole, cut_short):
    assert long_form["flips"]["tried"] >= 5 and long_form["flips"]["undetected"] == []
    file = cut_short / "checkpoint-3" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    assert "skipping checkpoint-3: optimizer.safetensors" in resumed(inputs, cut_short).out
    assert_as_whole(cut_short, whole)


def test_f09_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_0(inputs, cut_short):
    for path in cut_short.glob("checkpoint-*/optimizer.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    before = tree(cut_short)
    message = refused(inputs, cut_short, resume_from_checkpoint="auto")
    assert "all 3 checkpoints are damaged" in message and "--overwrite-output-dir" in message
    assert tree(cut_short) == before


FILES = (
    "adapter_config.json", "adapter_model.safetensors", "manifest.json", "optimizer.safetensors",
    "trainer_state.json",
)  # fmt: skip


def test_f10_a_missing_file_makes_a_checkpoint_incomplete_and_is_named(inputs, whole, tmp_path):
    assert tuple(sorted(p.name for p in (whole / "checkpoint-3").iterdir())) == FILES
    for name in FILES:
        out = tmp_path / name
        shutil.copytree(whole, out, ignore=shutil.ignore_patterns("checkpoint-4", "adapter_*n"))
        (out / "train_output.json").unlink()
        for kept in ("checkpoint-2", "checkpoint-3"):  # the pattern took these files as well
            shutil.copytree(whole / kept, out / kept, dirs_exist_ok=True)
        (out / "checkpoint-3" / name).unlink()
        outcome = resumed(inputs, out)
        line = next(x for x in outcome.out.splitlines() if x.startswith("skipping checkpoint-3"))
        assert name in line, line
        assert "checkpoint-2 at step 2" in outcome.out


def test_f11_leftovers_of_killed_runs_are_removed(inputs, cut_short):
    for name in ("tmp-checkpoint-9-123", "tmp-checkpoint-2-7", "tmp-checkpoint-removed-x"):
        shutil.copytree(cut_short / "checkpoint-2", cut_short / name)
    for name in (".run.json.tmp", ".run.json.new.tmp", ".part-0.safetensors"):
        (cut_short / name).write_text("half")
    outcome = resumed(inputs, cut_short)
    assert "checkpoint-3 at step 3" in outcome.out
    assert not [n for n in os.listdir(cut_short) if "tmp" in n or "part" in n]


def test_f12_keeping_one_checkpoint_there_is_always_one(inputs, tmp_path, monkeypatch):
    """Looked at before every change to the file system, after the first checkpoint is complete."""
    seen, out = [], tmp_path / "out"

    def watched(function):
        def wrapper(*args, **kwargs):
            if seen or (out / "checkpoint-1").exists():
                seen.append([p.name for p in list_checkpoints(out) if verify(p) == ""])
            return function(*args, **kwargs)

        return wrapper

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    train(**inputs, output_dir=out, save_total_limit=1)
    assert len(seen) > 30 and all(seen)
    assert any(len(names) == 2 for names in seen)  # never fewer, so at times one more
    assert [p.name for p in list_checkpoints(out)] == ["checkpoint-4"]


# ------------------------------------------------------------------------------------ coming back

UNSAFE = {
    "lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "use_rslora": True, "seed": 1,
    "target_modules": "q_proj", "modules_to_save": "lm_head", "max_length": 48, "packing": True,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "dtype": "bfloat16",
}  # fmt: skip
SAFE = {
    "learning_rate": 5e-3, "warmup_steps": 1.0, "max_grad_norm": 0.5, "weight_decay": 0.1,
    "save_steps": 2, "logging_steps": 2, "save_total_limit": 2, "adam_beta1": 0.8, "max_steps": 5,
    "lr_scheduler_type": "cosine", "gradient_checkpointing": "block",
}  # fmt: skip


@pytest.mark.parametrize("name", UNSAFE)
def test_f13_a_setting_that_makes_another_run_is_refused_with_the_difference(
    inputs, cut_short, name
):
    before = tree(cut_short)
    message = refused(inputs, cut_short, **{name: UNSAFE[name]}, resume_from_checkpoint="auto")
    assert f"--{name.replace('_', '-')} was " in message and ", now " in message
    assert tree(cut_short) == before


@pytest.mark.parametrize("name", SAFE)
def test_f13_a_setting_that_may_change_is_said(inputs, cut_short, name):
    outcome = resumed(inputs, cut_short, **{name: SAFE[name]})
    value = SAFE[name]
    assert f"--{name.replace('_', '-')} is {value!r} now; the checkpoint was made" in outcome.out


def test_f13_other_rows_or_another_base_are_refused(inputs, cut_short, tmp_path):
    rows = pairs(20)
    rows[3]["completion"] += "!"
    other = write_model(tmp_path / "weights", seed=5)
    for change, text in (
        ({"dataset": rows_file(tmp_path / "rows.jsonl", rows)}, "training rows differ"),
        ({"model": other}, "the base model's weights differ"),
        ({"model": write_model(tmp_path / "eps", rms_norm_eps=1e-6)}, "config.json differs"),
    ):
        assert text in refused(inputs, cut_short, **change, resume_from_checkpoint="auto")


def test_f13_two_spellings_of_the_same_targets_are_one_run(inputs, cut_short, whole):
    outcome = resumed(inputs, cut_short, target_modules="all-linear")
    assert "--target-modules is ['all-linear'] now" in outcome.out
    assert_as_whole(cut_short, whole)


def test_f13_a_checkpoint_beyond_the_last_step_is_refused(inputs, cut_short):
    message = refused(inputs, cut_short, max_steps=2, resume_from_checkpoint="auto")
    assert "beyond the end of this run, which has 2 steps" in message and "--max-steps" in message


def test_f13_damaged_records_beside_the_checkpoints_do_no_harm(inputs, whole, tmp_path):
    for name, content in (
        ("train_output.json", b"[1, 2]"),
        ("train_output.json", b'{"global_step": "x"}'),
        ("run.json", b"{"),
        ("metrics.jsonl", b'[3]\n{"step": "two"}\n\xff\xfe\n{"step": 1, "loss": 2.0}\n{"st'),
    ):
        out = tmp_path / f"{name}-{len(content)}"
        shutil.copytree(whole, out)
        (out / name).write_bytes(content)
        outcome = resumed(inputs, out)
        if name == "metrics.jsonl":
            assert "complete already" in outcome.out
            (out / "train_output.json").unlink()
            outcome = resumed(inputs, out)
            assert "3 lines of" in outcome.out and "damaged" in outcome.out
            assert [m["step"] for m in metrics(out)] == [1]
        else:
            assert "is damaged" in outcome.out
            assert read(out / "train_output.json")["global_step"] == 4


@RANKS
def test_f14_resuming_on_another_number_of_gpus():
    raise NotImplementedError


def test_f15_a_second_run_in_the_same_directory_is_refused(inputs, tmp_path):
    """While the first holds the lock, in all three ways to ask for the directory."""
    train(**inputs, output_dir=tmp_path)
    before = tree(tmp_path)
    with open(tmp_path / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for more in ({}, {"resume_from_checkpoint": "auto"}, {"overwrite_output_dir": True}):
            message = refused(inputs, tmp_path, **more)
            assert "another run is writing there" in message and "wait for it" in message
    assert tree(tmp_path) == before


@RANKS
def test_f16_when_one_rank_fails_the_others_leave():
    raise NotImplementedError


@pytest.mark.parametrize("kind", ["gpu", "host"])
def test_f17_out_of_memory_names_the_levers_and_the_estimate(inputs, tmp_path, monkeypatch, kind):
    from minisft import run as loop

    real = loop.train_step_
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.")
    if kind == "host":
        error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")

    def train_step_(state, *args):
        if state.step == 2:
            raise error
        return real(state, *args)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step_", train_step_)
        message = refused(inputs, out)
    assert "out of memory" in message and "frozen weights 0.00 GiB" in message
    assert "halve --per-device-train-batch-size 2" in message
    assert "--gradient-checkpointing full" in message and "--max-length 64" in message
    assert "Earlier checkpoints are intact" in message
    assert [p.name for p in list_checkpoints(out)] == ["checkpoint-1", "checkpoint-2"]
    resumed(inputs, out)


@pytest.mark.gpu
def test_f17_out_of_memory_on_a_gpu(inputs, tmp_path):
    rows = [{"input_ids": [5 + i % 300 for i in range(250)]} for _ in range(4096)]
    given = inputs | {"dataset": rows_file(tmp_path / "rows.jsonl", rows), "max_length": 250}
    torch.cuda.set_per_process_memory_fraction(0.002)
    try:
        message = refused(given, tmp_path / "out", per_device_train_batch_size=4096)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory" in message and "--max-length 250" in message
    assert not list_checkpoints(tmp_path / "out")


# ------------------------------------------------------------------------------- what nobody reads


def test_f18_a_logger_without_its_server_ends_no_run(inputs, tmp_path, monkeypatch):
    """wandb fails at every call, as behind a closed port: one warning, and the same numbers."""
    calls = []

    class Fake:
        def __getattr__(self, name):
            def fails(*args, **kwargs):
                calls.append(name)
                raise ConnectionError("connection refused")

            return fails

    monkeypatch.setitem(sys.modules, "wandb", Fake())
    outcome = train(**inputs, output_dir=tmp_path / "out", report_to="wandb")
    assert calls and outcome.code == 0
    told = [line for line in outcome.out.splitlines() if "connection refused" in line]
    assert len(told) == 1 and "warning" in told[0]
    assert len(step_lines(tmp_path / "out")) == 4


def test_f18_a_reader_of_stdout_that_leaves_ends_no_run(inputs, tmp_path):
    """`| head -1`: the pipe closes at once, the run goes on to its result."""
    argv = flags(**inputs, output_dir=tmp_path / "out")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *argv],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert read(tmp_path / "out" / "train_output.json")["global_step"] == 4
    assert len(step_lines(tmp_path / "out")) == 4


# --------------------------------------------------------------------------- somebody else's files


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "config.json", "metrics.jsonl"])
@pytest.mark.parametrize(
    "how", [{}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "auto"}]
)
def test_f50_files_that_no_run_made_are_not_overwritten(inputs, tmp_path, name, how):
    (tmp_path / name).write_text("mine")
    message = refused(inputs, tmp_path, **how)
    assert f"holds {name} but no run.json" in message and "choose another directory" in message
    assert (tmp_path / name).read_text() == "mine"


def test_f50_a_folder_merged_that_no_run_made_stays(inputs, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    assert "holds merged but no run.json" in refused(inputs, tmp_path, save_merged=True)
    assert (tmp_path / "merged" / "notes.txt").read_text() == "mine"


def test_f06_overwriting_keeps_the_old_run_until_the_new_record_is_written(
    inputs, tmp_path, monkeypatch
):
    train(**inputs, output_dir=tmp_path)
    before = tree(tmp_path)
    real = os.fsync

    def fsync(fd):
        if "run.json" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(28, os.strerror(28))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    refused(inputs, tmp_path, overwrite_output_dir=True, seed=1)
    assert tree(tmp_path) == before


def test_the_undisturbed_run_learnt(whole):
    tensors = load_file(whole / "adapter_model.safetensors")
    assert all(t.abs().sum() > 0 for t in tensors.values())
    assert Path(whole / "checkpoint-4").is_dir()
