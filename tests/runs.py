"""What the tests of whole runs share: a tiny Llama, rows for it, and the scripts, in process."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tiny_tokenizer import write_byte_level

from minisft.config.hf import parse_model_config

ROOT = Path(__file__).parents[1]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 384,  # a few rows more than the tokenizer has ids
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float32",
}
WORDS = ("brown fox", "lazy dog", "quick answer", "good day", "hello there", "very fine")


class Outcome(NamedTuple):
    """How a script ended: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def write_model(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A Llama with random weights (norms too: ones hide bugs) and a byte-level BPE tokenizer."""
    write_byte_level(directory)
    raw = CONFIG | changes
    (directory / "config.json").write_text(json.dumps(raw, indent=1))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in parse_model_config(raw).weight_shapes().items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = 1 + 0.1 * noise if "norm" in name else 0.1 * noise
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def pairs(count: int, first: int = 0) -> list[dict[str, str]]:
    """Prompts and completions of uneven length."""
    return [
        {
            "prompt": f"What is {i} + {i % 3}?",
            "completion": f" The answer is {i + i % 3}, {WORDS[i % 6]}." + " Thank you" * (i % 4),
        }
        for i in range(first, first + count)
    ]


def write_rows(path: Path, rows: list[Any]) -> Path:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def flags(**settings: Any) -> list[str]:
    """lora_r=4, packing=True, columns=["a=b"] -> --lora-r 4 --packing --columns a=b."""
    argv = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, list) else [value]
            argv += [f"--{flag}", *map(str, values)]
    return argv


@lru_cache
def script(name: str) -> Any:
    """scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"scripts/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where --help looks for the text under the fields
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on two threads, and far slower where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def call(name: str, argv: list[str]) -> Outcome:
    """main(argv) of a script. Whatever it raises is raised here."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), one_thread():
        code = script(name).main(argv)
    return Outcome(code, out.getvalue(), err.getvalue())


def train(**settings: Any) -> Outcome:
    """scripts/train.py with these flags; it must succeed."""
    outcome = call("train", flags(**settings))
    assert outcome.code == 0, outcome.err
    return outcome


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def step_lines(out: Path, *names: str) -> list[tuple]:
    """(step, *names) of each training line of metrics.jsonl."""
    return [tuple(m[n] for n in ("step", *names)) for m in metrics(out) if "loss" in m]


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def tree(directory: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file below a directory."""
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }
