"""Imports go down only, heavy packages stay out, and a run touches nothing but its output."""

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from runs import ROOT, pairs, tree, write_model, write_rows

# Where each module of minisft stands: it may import those on lower floors, and no others.
FLOORS = [
    ["config"],
    ["names", "loggers"],
    [
        *("safetensors_io", "targets", "nn", "formats", "chat", "templates", "tokens"),
        *("cli", "demo", "preempt"),
    ],
    [
        *("tokenizer", "reading", "packing", "parts", "quant_state", "attention", "policy"),
        "residual",
    ],
    ["masks"],
    ["weights", "lora", "adapter", "llama", "data", "block"],
    ["batches", "optim", "schedules", "generate", "sources", "preview", "offload"],
    ["loss", "fast", "modelfile"],
    ["step"],
    ["checkpoint", "model", "planning"],
    ["export", "outputs", "serving"],
    ["report"],
    ["evaluate", "loop", "memory", "merge"],
    ["rows", "resume"],
    ["describe"],
    ["run"],
    ["__init__"],
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
# Packages that take long to import, or that few runs need: who may import them, inside a function.
LAZY = {
    "tyro": ["cli"],
    "rich": ["report"],
    "huggingface_hub": ["weights"],
    "datasets": ["reading"],
    "pyarrow": ["reading"],
    "bitsandbytes": ["optim", "bench_kernels"],
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


def name_of(path):
    """minisft/demo/__init__.py -> demo, minisft/run.py -> run."""
    first = path.relative_to(ROOT / "minisft").parts[0]
    return first.removesuffix(".py")


def imports(path):
    """(dotted module, whether at the top of the file) of each import."""
    nodes = ast.parse(path.read_text(encoding="utf-8"))
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
            if node.module == "minisft":  # `from minisft import chat` names a module
                names = [f"minisft.{a.name}" for a in node.names if a.name in FLOOR]
        else:
            continue
        for name in names:
            yield name, id(node) not in inside


def minisft_sources():
    return [p for p in SOURCES if p.is_relative_to(ROOT / "minisft")]


def test_every_module_has_a_floor():
    assert {name_of(p) for p in minisft_sources()} == set(FLOOR), "say in FLOORS where it stands"


@pytest.mark.parametrize("path", minisft_sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    name = name_of(path)
    for module, _ in imports(path):
        top, _, rest = module.partition(".")
        below = rest.split(".")[0] or "__init__"
        if top == "minisft" and below != name:
            assert FLOOR[below] < FLOOR[name], f"{name} imports {below}, which is not below it"
        if top == "kernels":
            assert name == "nn", f"{name} imports {module}; minisft/nn.py is the only door"


def test_config_needs_the_standard_library_only():
    for module, _ in imports(ROOT / "minisft" / "config.py"):
        assert module.split(".")[0] in sys.stdlib_module_names, module


# An op that is made of others.
BUILT_ON = {
    "adamw": ["low_rank"],
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
        folder = ".".join(("kernels", *path.relative_to(ROOT / "kernels").parts[:-1]))
        for module, _ in imports(path):
            known = sys.stdlib_module_names | {"torch", "triton"}
            below = [f"kernels.{op}" for op in BUILT_ON.get(folder.removeprefix("kernels."), [])]
            allowed = module.startswith((folder, *below))
            assert module.split(".")[0] in known or allowed, f"{path}: {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_packages_are_imported_where_they_belong(path):
    for module, at_the_top in imports(path):
        package = module.split(".")[0]
        if package in sys.stdlib_module_names or package in ("minisft", "kernels", "triton"):
            assert package not in ("pickle", "shelve", "marshal"), f"{path}: {module}"
        elif path.parent.name == "scripts" and (path.parent / f"{package}.py").exists():
            pass  # a script beside it
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
    code = "import time, torch; t = time.time(); import minisft; print(time.time() - t)"
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


SHADOWED = textwrap.dedent(
    """
    import json, sys, traceback

    import torch

    found = []
    for directory in sys.argv[1:]:
        sys.path.insert(0, directory)
        try:
            import minisft
        except ImportError:
            found.append(traceback.format_exc())
        for name in [m for m in sys.modules if m.split(".")[0] in ("minisft", "kernels")]:
            del sys.modules[name]
        sys.path.remove(directory)
    import minisft

    print(json.dumps(found))
    """
)


def test_another_package_named_kernels_is_told_in_one_line(tmp_path):
    """One that has other names in it, and one that cannot be imported itself."""
    contents = ["def get_kernel(name): ...\n", "raise ImportError('needs a newer hub library')\n"]
    places = [tmp_path / str(i) for i in range(len(contents))]
    for place, content in zip(places, contents, strict=True):
        (place / "kernels").mkdir(parents=True)
        (place / "kernels" / "__init__.py").write_text(content)
    done = subprocess.run(
        [sys.executable, "-c", SHADOWED, *map(str, places)],
        env=environment(tmp_path, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 2
    for text in found:
        last = text.splitlines()[-1]
        assert last.startswith("ImportError: minisft needs its own package `kernels`"), text
        assert "PyPI's `kernels`" in last and "uninstall" in last
        assert "environment of its own" in last
        assert "During handling" not in text and "direct cause" not in text


def test_transformers_does_not_take_our_kernels_for_those_of_pypi():
    """It asks for the version of the distribution that holds `kernels`, which is minisft's."""
    available = pytest.importorskip("transformers.utils.import_utils").is_kernels_available
    assert not available(), "another version number of minisft, or PyPI's kernels away"
