"""The long form of the fault matrix: kills, signals in every phase, flipped bits, cut files.

    python tests/faults/long_form.py          200 kills, 60 signals, 200 flips, 100 cuts
    python tests/faults/long_form.py 0.05     a twentieth of each, as the test suite has it

Runs are forked from one process that has loaded torch. Prints one line of JSON per scenario; the
figures are counts of what went wrong, and of how often it was tried.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "session")]

from test_kill import (  # noqa: E402
    Yard,
    lines,
    log_of,
    newest,
    until,
    wait,
)

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
PHASES = ("start", "load", "tokenise", "step", "eval", "save")
STRETCH = 0.3  # seconds that a phase lasts while a signal is sent at a random moment of it


def whole(yard: Yard) -> Path:
    """The uninterrupted run that the others must equal."""
    out = yard.directory / "whole"
    if not out.exists():
        yard.finish(out, **EVALUATED)
    return out


def differences(out: Path, reference: Path) -> list[str]:
    """How a finished run differs from another: its log lines, its result, leftovers."""
    found = []
    if lines(out) != lines(reference):
        found.append("metrics.jsonl")
    name = "adapter_model.safetensors"
    if (out / name).read_bytes() != (reference / name).read_bytes():
        found.append(name)
    return found + [n for n in os.listdir(out) if "tmp" in n]


def unusable(out: Path) -> bool:
    """Whether the newest visible checkpoint does not verify."""
    from minisft.files.checkpoint import verify

    return bool(newest(out)) and verify(out / f"checkpoint-{newest(out)}") != ""


# ------------------------------------------------------------------------------------------ kill -9


def kills(yard: Yard, count: int) -> dict:
    """SIGKILL at a random moment of the whole run; every killed run is resumed and compared."""
    out = yard.place()
    started = time.perf_counter()
    yard.finish(out, **EVALUATED)
    seconds = time.perf_counter() - started
    draw = random.Random(1)
    found = {"kills": 0, "in_a_save": 0, "before_a_checkpoint": 0, "unusable": 0, "wrong": []}
    while found["kills"] < count:
        out = yard.place()
        child = yard.start(out, **EVALUATED)
        time.sleep(draw.random() * seconds)
        os.kill(child, signal.SIGKILL)
        if wait(child) == 0:
            continue  # it was quicker
        found["kills"] += 1
        found["before_a_checkpoint"] += newest(out) == 0
        if out.exists():
            found["in_a_save"] += any(n.startswith("tmp-checkpoint") for n in os.listdir(out))
            found["unusable"] += unusable(out)
        yard.finish(out, **EVALUATED, resume_from_checkpoint="auto")
        found["wrong"] += differences(out, whole(yard))
        shutil.rmtree(out)
    return found


# ------------------------------------------------------------------------------------------ SIGTERM


def stretched(real: Callable, delay: float, seconds: float = STRETCH, entry: int = 1) -> Callable:
    """`real`, made over and over for `seconds` at its n-th call; SIGTERM comes after `delay`."""
    calls = 0

    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls != entry:
            return real(*args, **kwargs)
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM)).start()
        end = time.monotonic() + seconds
        while True:
            result = real(*args, **kwargs)
            if time.monotonic() > end:
                return result

    return wrapper


def in_phase(phase: str, draw: random.Random) -> Callable[[], None]:
    """For a child: a SIGTERM at a random moment of a phase. What is repeated changes no state."""
    delay = draw.random() * STRETCH
    entry = draw.randint(2, 6)

    def prepare() -> None:
        from minisft import run, step
        from minisft.files import checkpoint
        from minisft.session import evaluate

        module, name, call = {
            "load": (run, "load_base", 1),
            "tokenise": (run, "load_data", 1),
            "step": (step, "loss_and_grads", entry),
            "eval": (evaluate, "evaluation", entry - 1),  # before step 1, in between, at the end
            "save": (checkpoint, "file_digest", 4 * entry),
        }[phase]
        setattr(module, name, stretched(getattr(module, name), delay, entry=call))

    return prepare


def terminations(yard: Yard, each: int) -> dict:
    """SIGTERM in every phase: exit code 75 in time, and the resumed run equals the whole one."""
    draw = random.Random(2)
    found = {"signals": 0, "missed": [], "slowest_exit_s": 0.0, "lost_steps": 0, "wrong": []}
    for phase in PHASES:
        for _ in range(each):
            out = yard.place()
            if phase == "start":
                code, seconds = started_and_stopped(yard, out, draw)
            else:
                child = yard.start(out, in_phase(phase, draw), **EVALUATED)
                log = log_of(out)
                until(lambda log=log: log.exists() and "SIGTERM: " in log.read_text(), seconds=20)
                asked = time.perf_counter()
                code, seconds = wait(child), time.perf_counter() - asked
            found["signals"] += 1
            found["slowest_exit_s"] = max(found["slowest_exit_s"], round(seconds, 2))
            if code != 75:
                found["missed"].append(f"{phase}: exit code {code}: {log_of(out).read_text()}")
            if phase in ("step", "eval") and out.exists() and (out / "metrics.jsonl").exists():
                done = [line[0] for line in lines(out)]
                found["lost_steps"] += max(done, default=0) - newest(out)
            yard.finish(out, **EVALUATED, resume_from_checkpoint="auto")
            found["wrong"] += [f"{phase}: {d}" for d in differences(out, whole(yard))]
            shutil.rmtree(out)
    return found


def started_and_stopped(yard: Yard, out: Path, draw: random.Random) -> tuple[int, float]:
    """SIGTERM to a process that is still importing torch: (exit code, seconds to the exit)."""
    from runs import flags
    from test_kill import SETTINGS

    argv = flags(**{**yard.inputs, **SETTINGS, **EVALUATED, "output_dir": out})
    with open(log_of(out), "w") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "train.py"), *argv],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
        )
    until(lambda: catches_sigterm(process.pid))
    time.sleep(draw.random() * 0.8)
    asked = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    return code, time.perf_counter() - asked


def catches_sigterm(pid: int) -> bool:
    """Whether the process has a handler for SIGTERM: Python's own first lines are over."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt"):
                return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


# ------------------------------------------------------------------------------------------- damage


def damaged(yard: Yard, count: int, damage: Callable[[Path, random.Random], None]) -> dict:
    """Damage one file of the newest of two checkpoints; `auto` must take the other one."""
    from minisft.files.checkpoint import find_checkpoint

    reference = whole(yard)
    kept = sorted(p.name for p in reference.glob("checkpoint-*"))[-2:]
    assert len(kept) == 2 and kept[1] == "checkpoint-8"
    draw = random.Random(3)
    found: dict = {"tried": 0, "undetected": []}
    for _ in range(count):
        out = yard.place()
        out.mkdir()
        for name in kept:
            shutil.copytree(reference / name, out / name)
        file = draw.choice(sorted((out / "checkpoint-8").iterdir()))
        damage(file, draw)
        said: list[str] = []
        path = find_checkpoint(out, "auto", said.append)
        found["tried"] += 1
        if path != out / kept[0] or not any("skipping checkpoint-8" in s for s in said):
            found["undetected"].append(file.name)
        shutil.rmtree(out)
    return found


def flip(file: Path, draw: random.Random) -> None:
    """One bit of a file becomes the other."""
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def cut(file: Path, draw: random.Random) -> None:
    """A file ends early, at any byte."""
    data = file.read_bytes()
    file.write_bytes(data[: draw.randrange(len(data))])


# -------------------------------------------------------------------------------------------------


def main(directory: Path, share: float) -> dict[str, dict]:
    """Every scenario at this share of the full counts; the traceback of what failed."""
    yard = Yard(directory)
    scenarios: dict[str, Callable[[], dict]] = {
        "kills": lambda: kills(yard, max(1, round(200 * share))),
        "terminations": lambda: terminations(yard, max(1, round(10 * share))),
        "flips": lambda: damaged(yard, max(1, round(200 * share)), flip),
        "cuts": lambda: damaged(yard, max(1, round(100 * share)), cut),
    }
    found = {}
    for name, scenario in scenarios.items():
        started = time.perf_counter()
        try:
            found[name] = scenario()
        except BaseException:
            found[name] = {"error": traceback.format_exc()}
        found[name]["seconds"] = round(time.perf_counter() - started, 1)
        print(json.dumps({name: found[name]}), flush=True)
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(scratch)
        main(place, float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
