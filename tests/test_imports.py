"""Imports go down only, heavy packages stay out, and a run touches nothing but its output."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from runs import ROOT, pairs, tree, write_model, write_rows

# A line of the README's drawing: "  room/   what it is for   <- what it may import".
_LINE = re.compile(r"^ *(?P<room>[\w./*]+) +.*<- (?P<below>.+)$")


def drawing(readme):
    """{room: names of the rooms that it may import} as the README's drawing has it."""
    found = [_LINE.match(line) for line in readme.splitlines()]
    return {m["room"].rstrip("/"): set(m["below"].split()) for m in found if m}


def core_order(readme):
    """The core's files from the top of the reading list down."""
    (line,) = [line for line in readme.splitlines() if line.startswith("Reading order: ")]
    return re.findall(r"`(\w+)\.py`", line)


README = (ROOT / "README.md").read_text(encoding="utf-8")
DRAWING = drawing(README)
CORE = "minisft/*.py"
# Packages that take long to import, or that few runs need: who may import them, inside a function.
LAZY = {
    "tyro": ["flags"],
    "rich": ["report"],
    "huggingface_hub": ["weights"],
    "datasets": ["readers"],
    "pyarrow": ["readers"],
    "bitsandbytes": ["eight_bit", "bench_kernels"],
    "peft": ["bench_kernels"],
    "liger_kernel": ["bench_kernels"],
    "wandb": ["loggers"],
    "trackio": ["loggers"],
    "matplotlib": ["plot"],
}
# Packages that any file may import.
EAGER = {"torch", "numpy", "safetensors", "tokenizers", "jinja2", "yaml"}
PEERS = ("transformers", "trl", "peft", "accelerate")
SOURCES = sorted(
    p for folder in ("minisft", "kernels", "scripts") for p in (ROOT / folder).rglob("*.py")
)


def room_of(parts):
    """The room of a module by its dotted name's parts: ("minisft", "run") -> "minisft/run.py"."""
    if parts[0] == "scripts":
        return "scripts"
    if parts[:3] == ("minisft", "files", "disk"):
        return "files/disk.py"
    if len(parts) > 1 and f"minisft/{parts[1]}.py" in DRAWING:
        return f"minisft/{parts[1]}.py"
    is_folder = len(parts) > 1 and (parts[1] == "kernels" or (ROOT / "minisft" / parts[1]).is_dir())
    return parts[1] if is_folder else CORE


def module_of(path):
    """kernels/nf4/op.py -> ("minisft", "kernels", "nf4", "op")."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("minisft", *parts) if parts[0] == "kernels" else parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path):
    """(dotted module, whether at the top of the file) of each import in a file."""
    return imports_of(path.read_text(encoding="utf-8"), path)


def imports_of(source, path):
    nodes = ast.parse(source)
    inside = {
        id(n)
        for f in ast.walk(nodes)
        if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)
        for n in ast.walk(f)
    }
    for node in ast.walk(nodes):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            folder = ROOT / (node.module or "").replace(".", "/").replace(
                "minisft/kernels", "kernels"
            )
            if folder.is_dir() and folder != ROOT:  # `from minisft.text import chat` names a module
                files = [a.name for a in node.names if (folder / f"{a.name}.py").exists()]
                names = [f"{node.module}.{name}" for name in files] or names
        else:
            continue
        for name in names:
            yield name, id(node) not in inside


def wrong_imports(path, source=None):
    """What a file imports against the drawing, in words. source: another text in its place."""
    source = path.read_text(encoding="utf-8") if source is None else source
    me = module_of(path)
    room, found = room_of(me), []
    for module, _ in imports_of(source, path):
        parts = tuple(module.split("."))
        # The package's own names (`minisft.train`) are loaded when they are used.
        if parts[0] != "minisft" or me == ("minisft",):
            continue
        other = room_of(parts)
        if room == "scripts":
            pass
        elif other == room == CORE:
            order = core_order(README)
            if order.index(parts[1]) <= order.index(me[1]):
                found.append(f"{me[1]} imports {parts[1]}, which is above it in the reading order")
        elif other != room and other not in DRAWING[room]:
            found.append(f"{'.'.join(me)} imports {module}: {room} may not import {other}")
        if other == "explicit" != room and len(parts) > 2:
            found.append(f"{'.'.join(me)} imports {module}: only `minisft.explicit` itself is open")
    return found


def test_the_drawing_has_every_room():
    folders = {p.parent.name for p in (ROOT / "minisft").glob("*/__init__.py")}
    rooms = {r for r in DRAWING if "." not in r and r != "scripts"}
    assert rooms == folders | {"kernels"}, "draw every room in README.md"
    core = {p.stem for p in (ROOT / "minisft").glob("*.py")} - {"__init__"}
    assert set(core_order(README)) == core, "list every file of the core in README.md"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_drawing(path):
    assert wrong_imports(path) == []


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("minisft/lora.py", "from minisft.session.report import say", "may not import session"),
        ("minisft/config/hf.py", "import minisft.nn", "config may not import minisft/*.py"),
        ("minisft/rope.py", "from minisft import nn", "nn, which is above it"),
        ("minisft/files/load.py", "from minisft.text import chat", "files may not import text"),
        ("minisft/explicit/plan.py", "from minisft.step import State", "may not import minisft/"),
        ("minisft/step.py", "from minisft.explicit.block import forward", "itself is open"),
        ("scripts/bench.py", "    from minisft.explicit import block", "itself is open"),
    ],
)
def test_an_import_against_the_drawing_is_found(file, line, message):
    """Mutants of the rules above: one import put into a file."""
    source = f"def f():\n{line}\n" if line.startswith(" ") else f"{line}\n"
    (found,) = wrong_imports(ROOT / file, source)
    assert message in found


def test_a_room_that_is_not_drawn_is_found(monkeypatch):
    without = {room: below for room, below in DRAWING.items() if room != "text"}
    monkeypatch.setitem(globals(), "DRAWING", without)
    with pytest.raises(AssertionError, match="draw every room"):
        test_the_drawing_has_every_room()


ALONE = textwrap.dedent(
    """
    import torch

    from minisft.batches import Batches, RowSchedule, TokenizedDataset
    from minisft.config.lora import LoraConfig
    from minisft.config.model import ModelConfig
    from minisft.config.train import TrainConfig
    from minisft.llama import Compute
    from minisft.lora import allocate, init_lora_, param_groups, trainable_shapes
    from minisft.optim import init_moments
    from minisft.step import ExecutionPlan, State, train_step_

    cfg = ModelConfig(64, 16, 32, 2, 2, 1, 8)
    draw = torch.Generator().manual_seed(0)
    frozen = {n: torch.randn(s, generator=draw) / 4 for n, s in cfg.weight_shapes().items()}
    config = TrainConfig(lora_r=4, learning_rate=0.05)
    shapes = trainable_shapes(LoraConfig(r=4), cfg)
    trainable = allocate(shapes, torch.device("cpu"))
    init_lora_(trainable, 0)
    groups = param_groups(shapes, config)
    state = State(trainable, init_moments(trainable, groups, "adamw"))
    ids = torch.arange(60, dtype=torch.int32) % 7
    rows = TokenizedDataset(ids, ids, torch.arange(0, 61, 10), torch.arange(7), {})
    batches = Batches(rows, RowSchedule(6, 2, 3, seed=0), 100, torch.device("cpu"))
    plan = ExecutionPlan(Compute(cfg))
    losses = [
        train_step_(state, frozen, batches.batch(i), plan, groups, config, 1.0).loss
        for i in range(24)
    ]
    assert losses[-1] < 0.8 * losses[0], losses
    """
)


def test_the_core_trains_without_the_rooms_above_it(tmp_path):
    """A copy without text/, data/, session/ and files/ trains on hand-made arrays."""
    rooms = ("text", "data", "session", "files", "demo")
    ignored = shutil.ignore_patterns("__pycache__", *rooms)
    shutil.copytree(ROOT / "minisft", tmp_path / "minisft", ignore=ignored)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        env=environment(tmp_path, PYTHONPATH=str(tmp_path)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_config_needs_the_standard_library_only():
    for path in (ROOT / "minisft" / "config").glob("*.py"):
        for module, at_the_top in imports(path):
            package = module.split(".")[0]
            known = package in sys.stdlib_module_names or package == "minisft"
            assert known or (package in ("tyro", "yaml") and not at_the_top), f"{path}: {module}"


# An op that is made of others.
BUILT_ON = {
    "rms_norm": ["low_rank"],
    "rope": ["low_rank"],
    "swiglu": ["low_rank"],
    "nf4": ["low_rank"],
    "nf4_lora_linear": ["low_rank", "nf4"],
}


def test_kernels_import_torch_triton_and_their_own_folder_only():
    for path in SOURCES:
        if not path.is_relative_to(ROOT / "kernels"):
            continue
        folder = ".".join(("minisft", *path.relative_to(ROOT).parts[:-1]))
        for module, _ in imports(path):
            known = sys.stdlib_module_names | {"torch", "triton"}
            op = folder.removeprefix("minisft.kernels.")
            below = [f"minisft.kernels.{other}" for other in BUILT_ON.get(op, [])]
            # files directly in kernels/ are shared by all ops
            allowed = module.startswith((folder, "minisft.kernels._", *below))
            assert module.split(".")[0] in known or allowed, f"{path}: {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_packages_are_imported_where_they_belong(path):
    for module, at_the_top in imports(path):
        package = module.split(".")[0]
        if package in sys.stdlib_module_names or package in ("minisft", "triton"):
            assert package not in ("pickle", "shelve", "marshal"), f"{path}: {module}"
        elif path.parent.name == "scripts" and (path.parent / f"{package}.py").exists():
            pass  # a script in the same folder
        elif package not in EAGER:
            assert package in LAZY, f"{path}: {module} is not a known dependency"
            assert not at_the_top, f"{path}: import {module} inside the function that needs it"
            assert path.stem in LAZY[package], f"{path}: {module}"


def test_no_pickle_is_read_or_written():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = f"{node.value.id}.{node.attr}"
                assert called not in ("torch.load", "torch.save", "np.load"), f"{path}: {called}"


# ---------------------------------------------------------------------------------- in a process

WATCHED = textwrap.dedent(
    """
    import contextlib, importlib.util, json, os, sys, time

    import torch

    start = time.perf_counter()
    import minisft

    minisft.train
    seconds = time.perf_counter() - start
    imported = sorted(sys.modules)
    events = []
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    changes = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link",
               "os.symlink", "shutil.", "tempfile.")
    leaving = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind",
               "subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.fork")

    def watch(event, args):
        if event == "open" and isinstance(args[0], (str, bytes)) and args[2] & writing:
            events.append(["write", os.path.abspath(os.fsdecode(args[0]))])
        elif event.startswith(changes) and isinstance(args[0], (str, bytes, os.PathLike)):
            directory = args[-1] if isinstance(args[-1], int) and args[-1] >= 0 else None
            if directory is None:  # else below a directory that is open, and was named before
                events.append(["write", os.path.abspath(os.fsdecode(args[0]))])
        elif event.startswith(leaving):
            events.append([event, repr(args)])

    spec = importlib.util.spec_from_file_location("train_script", sys.argv[1])
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sys.addaudithook(watch)
    with contextlib.redirect_stdout(sys.stderr):
        code = script.main(sys.argv[2:])
    print(json.dumps({"code": code, "seconds": seconds, "imported": imported,
                      "after": sorted(sys.modules), "events": events}))
    """
)


def environment(home, **more):
    """No offline switch, no cache settings: whatever the run would do by default, it does."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "TRITON_"))}
    for name in ("TMPDIR", "PYTHONPATH"):
        kept.pop(name, None)
    return kept | {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"} | more


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """What a fresh process imported, wrote and connected to in a training run on local files."""
    place = tmp_path_factory.mktemp("watched")
    for name in ("home", "cwd", "tmp"):
        (place / name).mkdir()
    model = write_model(place / "model")
    rows = write_rows(place / "rows.jsonl", pairs(8))
    before = tree(place)
    argv = [
        *("--model", str(model), "--dataset", str(rows), "--eval-dataset", str(rows)),
        *("--output-dir", str(place / "out"), "--max-steps", "2", "--save-steps", "1"),
        *("--save-total-limit", "1", "--lora-dropout", "0.1", "--packing", "--max-length", "64"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(ROOT / "scripts" / "train.py"), *argv],
        cwd=place / "cwd",
        env=environment(place / "home", TMPDIR=str(place / "tmp"), PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0, done.stderr
    after = {k: v for k, v in tree(place).items() if not k.startswith("out/")}
    return found | {"out": place / "out", "changed": after.items() ^ before.items()}


@pytest.mark.parametrize("package", [*PEERS, *LAZY, "pandas", "wandb", "tensorboard"])
def test_importing_minisft_leaves_a_package_out(watched, package):
    assert package not in watched["imported"]


@pytest.mark.parametrize("package", [*PEERS, "bitsandbytes", "datasets", "pandas"])
def test_a_whole_run_leaves_a_package_out(watched, package):
    assert package not in watched["after"]


def test_importing_minisft_is_quick(watched):
    code = "import time, torch; t = time.time(); import minisft.run; print(time.time() - t)"
    seconds = [watched["seconds"]]
    while min(seconds) >= 1 and len(seconds) < 3:  # the best of three: the machine may be busy
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment(Path.home(), PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
            check=True,
        )
        seconds.append(float(done.stdout))
    assert min(seconds) < 1, seconds


def test_a_run_on_local_files_opens_no_connection_and_starts_no_process(watched):
    assert [e for e in watched["events"] if e[0] != "write"] == []


def test_a_run_writes_nowhere_but_its_output_directory(watched):
    out = watched["out"]
    written = {path for kind, path in watched["events"] if kind == "write"}
    assert {str(out / "metrics.jsonl"), str(out / ".lock")} <= written
    assert [p for p in written if not Path(p).is_relative_to(out) and p != os.devnull] == []
    assert watched["changed"] == set()


@pytest.mark.parametrize("first", ["kernels", "minisft.kernels"])
def test_minisft_and_a_package_named_kernels_live_together(first, tmp_path):
    """In both orders of import, each name means its own package."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(name): ...\n")
    second = {"kernels": "minisft.kernels", "minisft.kernels": "kernels"}[first]
    code = f"""
import {first}, {second}, minisft.kernels.nf4, minisft.run
assert kernels.get_kernel and kernels is not minisft.kernels
print(minisft.kernels.__file__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}"),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ROOT / "kernels" / "__init__.py")


def test_transformers_does_not_take_our_kernels_for_those_of_pypi():
    """It asks for the version of the distribution that holds `kernels`, which is minisft's."""
    available = pytest.importorskip("transformers.utils.import_utils").is_kernels_available
    assert not available(), "another version number of minisft, or PyPI's kernels away"
