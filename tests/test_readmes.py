"""Every code block of every README runs, with hub ids and file names replaced by local ones.

Mutant that turned it red: `minisft.step import loss_and_grad` in the README's python block.
"""

import contextlib
import io
import re
import shlex
import subprocess
import sys

import pytest
import torch
from runs import ROOT, call, pairs, write_model, write_rows

# Blocks of the kinds `text`, `json` and the like are shown, not run.
RUN = ("bash", "python")
READMES = sorted(
    path
    for folder in ("minisft", "kernels", "scripts", "tests")
    for path in (ROOT / folder).rglob("README.md")
    if ".git" not in path.parts
)
# What a block says -> what the test runs. Installing and the whole suite are what CI itself does.
SMALL = [
    ("pip install -e . && ", ""),
    ("pip install -e '.[dev,parity]' && ", ""),
    ("python -m pytest  ", "python -c pass  "),
]


def blocks(path):
    """(kind, first line number, text) of each fenced block."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
    text = path.read_text(encoding="utf-8")
    return [(m[1], text[: m.start()].count("\n") + 1, m[2]) for m in found]


CASES = [
    pytest.param(path, id=str(path.relative_to(ROOT)))
    for path in [ROOT / "README.md", *READMES]
    if any(kind in RUN for kind, _, _ in blocks(path))
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with the files that the READMEs name."""
    directory = tmp_path_factory.mktemp("readme")
    (directory / "model").mkdir()
    write_model(directory / "model")
    rows = write_rows(directory / "rows.jsonl", pairs(12))
    for name in ("a.jsonl", "b.jsonl", "eval.jsonl"):
        (directory / name).write_bytes(rows.read_bytes())
    return directory


@pytest.fixture(autouse=True)
def small(place, monkeypatch):
    """Inside the place, without a network; a chat that ends at once."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "stdin", io.StringIO("/exit\n"))


def local(text, directory):
    """The block with its hub ids replaced by a local model."""
    for old, new in SMALL:
        text = text.replace(old, new)
    named = r"(meta-llama|unsloth|TinyLlama)/[\w.-]+|path/to/model"
    return re.sub(named, str(directory / "model"), text)


def commands(text):
    """Commands of a bash block as lists of words, comments dropped, continued lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split("&&")]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def run_command(words):
    """A script of scripts/ in process; tests are only collected; nothing else is known here."""
    words = words[1:] if "=" in words[0] else words  # an environment variable
    assert words[0] == "python", f"a block runs {words}; teach tests/test_readmes.py how"
    if words[1] == "-c":
        return
    if words[1:3] == ["-m", "pytest"]:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *words[3:]]
        assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0, words
        return
    script = re.fullmatch(r"scripts/(\w+)\.py", words[1])
    assert script, f"a block runs {words}; teach tests/test_readmes.py how"
    argv = words[2:]
    if script[1] == "train":
        resumed = "--resume-from-checkpoint" in argv
        argv += ["--max-steps", "2"] + ([] if resumed else ["--overwrite-output-dir"])
        argv += ["--device", "cpu"] if "--model" in argv else []
    outcome = call(script[1], argv)
    on_gpu_only = script[1] == "bench" and not torch.cuda.is_available()
    assert outcome.code == 0 or (on_gpu_only and "GPU" in outcome.err), (words, outcome.err)


@pytest.mark.parametrize("path", CASES)
def test_the_blocks_of_a_readme_run(path, place):
    for kind, line, text in blocks(path):
        text = local(text, place)
        if kind == "bash":
            for words in commands(text):
                run_command(words)
        elif kind == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(text, f"{path}:{line}", "exec"), {"__name__": "readme"})


def test_there_are_readmes_and_blocks():
    rooms = {p.parent for p in (ROOT / "minisft").glob("*/__init__.py")} - {ROOT / "minisft/demo"}
    assert {r.name for r in rooms} <= {p.parent.name for p in READMES}, "a room without a README"
    assert [kind for kind, _, _ in blocks(ROOT / "README.md") if kind in RUN].count("bash") >= 3
