"""Runs that are killed, at random and at every step of a save, and runs that are asked to stop.

`python tests/test_kill.py 40` kills forty runs and prints what was hit; the test suite takes fewer.
Both work in a process of their own, which loads torch once and forks a child for every run.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive a fork
ROOT = Path(__file__).parents[2]

NUMBERS = ("epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "num_loss_tokens")
SETTINGS = {
    "max_steps": 8, "save_steps": 1, "save_total_limit": 2, "lora_r": 4, "lora_dropout": 0.1,
    "modules_to_save": ["embed_tokens", "lm_head"], "max_length": 64, "learning_rate": 1e-2,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "warmup_steps": 2,
}  # fmt: skip


# ------------------------------------------------------------------------------- the forked runs


class Yard:
    """A directory of runs of one tiny model, each in a forked child."""

    def __init__(self, directory: Path):
        import torch
        import tyro  # noqa: F401  (loaded before the fork, not in every child)
        from runs import pairs, script, write_model, write_rows

        torch.set_num_threads(1)
        script("train")
        self.directory = directory
        self.inputs = {
            "model": write_model(directory / "model"),
            "dataset": write_rows(directory / "rows.jsonl", pairs(20)),
            "eval_dataset": write_rows(directory / "eval.jsonl", pairs(4, first=50)),
        }
        self.count = 0

    def place(self) -> Path:
        """A new output directory, with its log next to it."""
        self.count += 1
        return self.directory / f"out-{self.count}"

    def start(self, out: Path, prepare: Callable[[], None] | None = None, **changes) -> int:
        """Fork a child that trains into `out`; its process id. prepare() runs in the child."""
        from runs import flags, script

        argv = flags(**{**self.inputs, **SETTINGS, "output_dir": out, **changes})
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            log = os.open(log_of(out), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if prepare:
                prepare()
            code = script("train").main(argv)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def finish(self, out: Path, **changes) -> None:
        """Train into `out` to the end."""
        code = wait(self.start(out, **changes))
        assert code == 0, log_of(out).read_text()

    def reference(self) -> Path:
        """The uninterrupted run."""
        out = self.directory / "reference"
        if not out.exists():
            self.finish(out)
        return out


def log_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.log")


def wait(child: int) -> int:
    """The exit code; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for a condition of the files of a run."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.0005)


def newest(out: Path) -> int:
    """The highest N of the visible checkpoint-N, 0 if there is none."""
    if not out.exists():
        return 0
    return max((int(n[11:]) for n in os.listdir(out) if n.startswith("checkpoint-")), default=0)


def lines(out: Path) -> list[tuple]:
    """The numbers of metrics.jsonl that do not depend on the clock."""
    from runs import metrics

    return [tuple(m.get(n) for n in ("step", "eval_loss", *NUMBERS)) for m in metrics(out)]


def assert_intact(out: Path, seen: int) -> None:
    """Every visible checkpoint verifies, and none that was complete is lost."""
    from minisft.files.checkpoint import list_checkpoints, verify

    assert newest(out) >= seen, f"checkpoint-{seen} was complete, now the newest is {newest(out)}"
    for path in list_checkpoints(out):
        assert verify(path) == "", f"{path.name}: {verify(path)}"


def assert_completed(yard: Yard, out: Path) -> None:
    """The run equals the one that nobody interrupted, and left nothing behind."""
    from runs import read, tree

    whole = yard.reference()
    assert lines(out) == lines(whole)
    ours, theirs = tree(out), tree(whole)
    name = f"checkpoint-{SETTINGS['max_steps']}"
    for file in (
        "adapter_model.safetensors",
        f"{name}/adapter_model.safetensors",
        f"{name}/optimizer.safetensors",
    ):
        assert ours[file] == theirs[file], file
    assert (
        read(out / "train_output.json")["training_loss"]
        == (read(whole / "train_output.json")["training_loss"])
    )
    assert not [p for p in os.listdir(out) if "tmp" in p]


# -------------------------------------------------------------------------------------- scenarios


def kills(yard: Yard, how_many: int) -> dict:
    """SIGKILL at a random moment after each checkpoint, the export included; resume each."""
    out = yard.place()
    child = yard.start(out)
    until(lambda: newest(out) >= 1)
    started = time.perf_counter()
    assert wait(child) == 0
    step_time = (time.perf_counter() - started) / SETTINGS["max_steps"]
    shutil.rmtree(out)

    draw = random.Random(0)
    hit = {"killed": 0, "too_late": 0, "in_a_save": 0, "resumed_from": []}
    while hit["killed"] < how_many:
        out = yard.place()
        child = yard.start(out)
        after = 1 + hit["killed"] % SETTINGS["max_steps"]
        until(lambda out=out, after=after: newest(out) >= after)
        time.sleep(draw.random() * step_time)
        seen = newest(out)
        os.kill(child, signal.SIGKILL)
        if wait(child) == 0:
            hit["too_late"] += 1
            continue
        hit["killed"] += 1
        hit["in_a_save"] += any(n.startswith("tmp-checkpoint") for n in os.listdir(out))
        assert_intact(out, seen)
        hit["resumed_from"].append(newest(out))
        yard.finish(out, resume_from_checkpoint="auto")
        assert_completed(yard, out)
        shutil.rmtree(out)
    return hit


def dies_at(call: int, notes: Path) -> Callable[[], None]:
    """For a child: SIGKILL itself before its n-th change to a file (0: count them, in notes)."""

    def prepare() -> None:
        count = 0

        def counted(function):
            def wrapper(*args, **kwargs):
                nonlocal count
                count += 1
                if count == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = function(*args, **kwargs)
                if function is rename and Path(args[1]).name.startswith("checkpoint-"):
                    with open(notes, "a") as file:
                        file.write(f"{Path(args[1]).name[11:]}\n")
                if call == 0:
                    notes.with_suffix(".count").write_text(str(count))
                return result

            return wrapper

        rename = os.rename
        for name in ("fsync", "mkdir", "rename", "replace", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))

    return prepare


def every_call_of_a_save(yard: Yard, every: int) -> dict:
    """SIGKILL before each (every n-th) fsync, rename, unlink, ... of three saves with rotation."""
    short = {"max_steps": 3, "save_total_limit": 1, "target_modules": "q_proj"}
    out = yard.place()
    notes = out.with_suffix(".notes")
    assert wait(yard.start(out, dies_at(0, notes), **short)) == 0, log_of(out).read_text()
    calls = int(notes.with_suffix(".count").read_text())
    expected = lines(out)
    tried = 0
    for call in range(1, calls + 1, every):
        out = yard.place()
        notes = out.with_suffix(".notes")
        code = wait(yard.start(out, dies_at(call, notes), **short))
        assert code == -signal.SIGKILL, (call, code, log_of(out).read_text())
        complete = [int(n) for n in notes.read_text().split()] if notes.exists() else [0]
        if out.exists():
            assert_intact(out, complete[-1])
        yard.finish(out, **short, resume_from_checkpoint="auto")
        assert lines(out) == expected, call
        assert [n for n in os.listdir(out) if "checkpoint" in n] == ["checkpoint-3"], call
        shutil.rmtree(out)
        tried += 1
    return {"calls": calls, "tried": tried}


def slow_steps(seconds: float, only: int | None = None) -> Callable[[], None]:
    """For a child: each step (or the one that follows `only` done ones) takes so much longer."""

    def prepare() -> None:
        from minisft import run as loop

        real = loop.train_step_

        def train_step_(state, *args):
            if only is None or state.step == only:
                time.sleep(seconds)
            return real(state, *args)

        loop.train_step_ = train_step_

    return prepare


def asked_to_stop(yard: Yard, number: int) -> dict:
    """A signal between two steps: exit code 75, a complete checkpoint; `auto` goes on from it."""
    out = yard.place()
    child = yard.start(out, slow_steps(0.02), save_steps=500)
    until(lambda: (out / "metrics.jsonl").exists() and len(lines(out)) >= 3)
    os.kill(child, number)
    assert wait(child) == 75, log_of(out).read_text()
    step = newest(out)
    assert 2 <= step < 8
    assert_intact(out, step)
    assert lines(out)[-1][0] == step
    assert not (out / "train_output.json").exists()
    log = log_of(out).read_text()
    name = signal.Signals(number).name
    assert f"{name}: stopped after step {step}" in log and "Traceback" not in log, log
    assert f"checkpoint-{step} is complete" in log and "--resume-from-checkpoint auto" in log, log
    yard.finish(out, resume_from_checkpoint="auto")
    assert_completed(yard, out)
    return {"step": step}


def asked_twice(yard: Yard) -> dict:
    """The second SIGTERM ends the run at once; the checkpoints before it stay."""
    out = yard.place()
    child = yard.start(out, slow_steps(20, only=3))
    until(lambda: newest(out) == 3)
    time.sleep(0.05)
    os.kill(child, signal.SIGTERM)
    until(lambda: "stopping after this step" in log_of(out).read_text())
    started = time.perf_counter()
    os.kill(child, signal.SIGTERM)
    assert wait(child) == -signal.SIGTERM, log_of(out).read_text()
    seconds = time.perf_counter() - started
    assert seconds < 5
    assert_intact(out, 3)
    yard.finish(out, resume_from_checkpoint="auto")
    assert_completed(yard, out)
    return {"seconds": seconds}


def asked_in_the_last_step(yard: Yard) -> dict:
    """There is nothing left to interrupt: the run completes."""

    def prepare() -> None:
        from minisft import run as loop

        real = loop.train_step_

        def train_step_(state, *args):
            if state.step == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(state, *args)

        loop.train_step_ = train_step_

    out = yard.place()
    assert wait(yard.start(out, prepare)) == 0, log_of(out).read_text()
    assert_completed(yard, out)
    return {}


def asked_while_a_line_is_printed(yard: Yard) -> dict:
    """The reader of stdout is slow, so the signal arrives inside print: still exit code 75."""
    reader, writer = os.pipe()

    def prepare() -> None:
        from minisft import run as loop

        os.dup2(writer, 1)
        os.close(reader)
        sys.stdout = os.fdopen(1, "w", closefd=False)  # buffered under PYTHONUNBUFFERED too
        real = loop.train_step_

        def train_step_(state, *args):
            if state.step == 2:  # fill the pipe: the next line has to wait
                os.set_blocking(1, False)
                with contextlib.suppress(BlockingIOError):
                    while os.write(1, b"." * 4096):
                        pass
                os.set_blocking(1, True)
            return real(state, *args)

        loop.train_step_ = train_step_

    out = yard.place()
    child = yard.start(out, prepare)
    os.close(writer)
    until(lambda: (out / "metrics.jsonl").exists() and len(lines(out)) == 4)
    time.sleep(0.1)
    os.kill(child, signal.SIGTERM)
    time.sleep(0.1)
    assert len(lines(out)) == 4, "the line did not wait"
    while os.read(reader, 65536):
        pass
    os.close(reader)
    code = wait(child)
    assert code == 75, (code, log_of(out).read_text())
    assert newest(out) == 3
    assert_intact(out, 3)
    return {}


def two_runs_in_one_directory(yard: Yard) -> dict:
    """The second is refused while the first writes; the first does not notice."""
    out = yard.place()
    first = yard.start(out, slow_steps(0.1))
    until(lambda: newest(out) >= 1)
    second = yard.start(out, resume_from_checkpoint="auto")
    assert wait(second) == 2
    assert "another run is writing there" in log_of(out).read_text()
    assert wait(first) == 0
    assert_completed(yard, out)
    return {}


SCENARIOS: dict[str, Callable[[Yard, bool], dict]] = {
    "kills": lambda yard, full: kills(yard, 40 if full else 8),
    "every_call_of_a_save": lambda yard, full: every_call_of_a_save(yard, 1 if full else 8),
    "sigterm": lambda yard, full: asked_to_stop(yard, signal.SIGTERM),
    "sigint": lambda yard, full: asked_to_stop(yard, signal.SIGINT),
    "sigterm_twice": lambda yard, full: asked_twice(yard),
    "sigterm_in_the_last_step": lambda yard, full: asked_in_the_last_step(yard),
    "sigterm_while_printing": lambda yard, full: asked_while_a_line_is_printed(yard),
    "two_runs_in_one_directory": lambda yard, full: two_runs_in_one_directory(yard),
}


def main(directory: Path, full: bool) -> dict[str, dict]:
    """What each scenario found, and the traceback of what failed."""
    yard = Yard(directory)
    yard.reference()
    found = {}
    for name, scenario in SCENARIOS.items():
        started = time.perf_counter()
        try:
            found[name] = scenario(yard, full)
        except BaseException:
            found[name] = {"error": traceback.format_exc()}
        found[name]["seconds_taken"] = round(time.perf_counter() - started, 1)
    return found


# ------------------------------------------------------------------------------------ the tests


def run_all(directory: Path, full: bool) -> dict[str, dict]:
    """`main` in a fresh process, which may fork because no thread of torch was started in it."""
    command = [sys.executable, __file__, "40" if full else "8", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_all(tmp_path_factory.mktemp("kill"), full=False)


@pytest.mark.parametrize("name", SCENARIOS)
def test_an_interrupted_run_keeps_its_checkpoints_and_completes(found, name):
    assert "error" not in found[name], found[name]["error"]


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    place = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.mkdtemp())
    print(json.dumps(main(place, full=sys.argv[1] == "40"), indent=2))
