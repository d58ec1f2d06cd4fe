"""Fuzzing the readers of bytes that come from elsewhere: nothing but UserError may come out.

    python tests/faults/fuzz.py                       every reader for ten minutes
    python tests/faults/fuzz.py jsonl config 3600     these readers for an hour each

Needs atheris (`pip install atheris`; extra `fuzz`). Half of the inputs are raw bytes, half edits of
a sound input: a value anywhere in its JSON becomes an odd one. An input that raises anything else,
takes more than 20 s or 2 GB is written to tests/faults/findings/READER-..., where the test suite
finds it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FINDINGS = HERE / "findings"
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**30, -(2**63), 0.5, -0.0,
    1e-320, 1e308, float("nan"), float("inf"), -float("inf"), "", "x", "0", "nan", "all-linear",
    "re:(", "q_proj", "a" * 5000, "\x00", "\ud800", "../x", [], [[]], [None], [0], [1, 2, 3],
    ["q_proj"], [""] * 300, {}, {"a": {}}, {"": None}, [[[[[[]]]]]], "float32", "llama", b"",
]  # fmt: skip


@lru_cache(maxsize=1)
def scratch() -> Path:
    """A directory in memory where there is one, with a sound adapter and its base's config."""
    from runs import CONFIG

    from minisft.config.hf import parse_model_config
    from minisft.config.lora import LoraConfig
    from minisft.files.adapter import save_adapter
    from minisft.lora import allocate, init_lora_, trainable_shapes

    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    place = Path(tempfile.mkdtemp(prefix="minisft-fuzz-", dir=memory))
    import torch

    cfg, lora = parse_model_config(CONFIG), LoraConfig(r=2)
    flat = allocate(trainable_shapes(lora, cfg), torch.device("cpu"))
    init_lora_(flat, 0)
    save_adapter(place / "adapter", flat.views, lora, cfg, "base")
    return place


# -------------------------------------------------------------------------- readers and their seeds


def read_config(data: bytes) -> None:
    from minisft.files.weights import load_model_config

    (scratch() / "config.json").write_bytes(data)
    cfg = load_model_config(scratch())
    cfg.weight_shapes()


def read_quant_state(data: bytes) -> None:
    from minisft.files.quant_state import parse_state

    parse_state("w.quant_state.bitsandbytes__nf4", data).members()


def read_adapter(data: bytes) -> None:
    from runs import CONFIG

    from minisft.config.hf import parse_model_config
    from minisft.files.adapter import load_adapter

    (scratch() / "adapter" / "adapter_config.json").write_bytes(data)
    load_adapter(scratch() / "adapter", parse_model_config(CONFIG))


def read_template(data: bytes) -> None:
    from minisft.text import chat, sandbox

    text = data.decode("utf-8", errors="replace")
    sandbox.MAX_SECONDS = 2.0
    chat.render(text, CHAT, special_tokens={"bos_token": "<s>"}, tools=[{"name": "f"}])


def read_jsonl(data: bytes) -> None:
    from tokenised import tokenize_rows

    from minisft.data.readers import read_rows

    path = scratch() / "rows.jsonl"
    path.write_bytes(data)
    rows = read_rows(str(path), columns={})
    tokenize_rows(rows, tokenizer(), format=None, max_length=32, source="rows")


def read_safetensors(data: bytes) -> None:
    from minisft.files.safetensors import iter_tensors

    path = scratch() / "x.safetensors"
    path.write_bytes(data)
    for _, tensor in iter_tensors(path):
        assert tensor.numel() >= 0


def read_yaml(data: bytes) -> None:
    from minisft.config.flags import parse_flags
    from minisft.config.train import TrainConfig

    path = scratch() / "run.yaml"
    path.write_bytes(data)
    parse_flags(TrainConfig, ["--config", str(path)], prog="train.py", default=TrainConfig())


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    from tiny_tokenizer import write_byte_level

    from minisft.text.tokenizer import load_tokenizer

    return load_tokenizer(write_byte_level(scratch() / "tokenizer"))


def seeds() -> dict[str, list[Any]]:
    """Sound inputs of each reader: JSON values, or bytes."""
    from runs import CONFIG, pairs
    from tiny_tokenizer import TEMPLATE

    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 5e5,
    }  # fmt: skip
    yarn = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "mscale": 1.0, "truncate": True}
    four_bit = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    nested = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64],
        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1,
    }  # fmt: skip
    tensor = {
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "__metadata__": {"k": "v"},
    }
    text = json.dumps(tensor).encode()
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]
    return {
        "config": [
            CONFIG, CONFIG | {"rope_parameters": scaling}, CONFIG | {"rope_scaling": yarn},
            CONFIG | {"quantization_config": four_bit, "eos_token_id": [1, 2], "head_dim": 8},
        ],
        "quant_state": [nested, {k: v for k, v in nested.items() if "nested" not in k}],
        "adapter": [json.loads((scratch() / "adapter" / "adapter_config.json").read_text())],
        "template": [
            TEMPLATE.encode(),
            b"{% for m in messages %}{{ m['role'] ~ m.content | trim | tojson }}{% endfor %}",
            b"{% macro f(x, n=2) %}{{ x * n }}{% endmacro %}{{ f('a') }}{{ [1,2] | join(',') }}",
            b"{% set ns = namespace(a=0) %}{% for i in range(9) %}{% set ns.a = ns.a + i %}"
            b"{% endfor %}{{ '%05d' % ns.a }}{{ strftime_now('%Y') }}{{ dict(a=1) | items }}",
            b"{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='role') | list }}"
            b"{{ 'a-b'.split('-') | last | upper | replace('B', 'c') | indent(2) | default('x') }}",
        ],
        "jsonl": [
            *([row] for row in pairs(2)), [{"text": "hello"}], [{"messages": CHAT}],
            [{"messages": CHAT, "tools": [tool], "chat_template_kwargs": {"x": 1}}],
            [{"conversations": turns}], [{"instruction": "a", "input": "b", "output": "c"}],
            [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}],
            [{"prompt": CHAT[:1], "completion": CHAT[1:]}],
            [{"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1]}, {"text": "x"}],
        ],
        "safetensors": [len(text).to_bytes(8, "little") + text + bytes(16)],
        "yaml": [
            {"lora_r": 4, "learning_rate": "2e-4", "packing": True, "target_modules": ["q_proj"]},
            {"columns": {"prompt": "q"}, "revision": None, "warmup_steps": 0.1},
        ],
    }  # fmt: skip


READERS: dict[str, Callable[[bytes], None]] = {
    "config": read_config, "quant_state": read_quant_state, "adapter": read_adapter,
    "template": read_template, "jsonl": read_jsonl, "safetensors": read_safetensors,
    "yaml": read_yaml,
}  # fmt: skip


def check(reader: str, data: bytes) -> None:
    """Read the bytes; anything but success or UserError is raised."""
    from minisft.config.errors import UserError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(UserError):
            READERS[reader](data)


# ----------------------------------------------------------------------------- edits of sound input


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    found = [path]
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def edited(value: Any, choices: bytes) -> bytes:
    """JSON with a few values replaced, removed or doubled, as the bytes choose."""
    value = copy.deepcopy(value)
    for where, what in zip(choices[0::2], choices[1::2], strict=False):
        path = places(value)[where % len(places(value))]
        if not path:
            value = copy.deepcopy(ODD[what % len(ODD)])
            continue
        inner: Any = value
        for key in path[:-1]:
            inner = inner[key]
        if what == 255:
            del inner[path[-1]]
        elif what == 254 and isinstance(inner, dict):
            inner[f"{path[-1]}_"] = copy.deepcopy(inner[path[-1]])
        else:
            inner[path[-1]] = copy.deepcopy(ODD[what % len(ODD)])
    return json.dumps(value, default=str, ensure_ascii=len(choices) % 2 == 0).encode(
        "utf-8", "replace"
    )


def case(reader: str, data: bytes, sound: list[Any]) -> bytes:
    """What a fuzzer's bytes mean: raw input, or an edit of a sound one."""
    is_json = isinstance(sound[0], (dict, list)) or reader == "safetensors"
    if not data or data[0] % 2 or not is_json:
        return data[1:]
    value = sound[data[1] % len(sound)] if len(data) > 1 else sound[0]
    if reader == "safetensors":
        length = int.from_bytes(value[:8], "little")
        header = edited(json.loads(value[8 : 8 + length]), data[2:12])
        return len(header).to_bytes(8, "little") + header + bytes(16)
    if reader == "jsonl":
        return b"\n".join(edited(row, data[2 + i : 8 + i]) for i, row in enumerate(value))
    return edited(value, data[2:8])


# --------------------------------------------------------------------------------------------- runs


def fuzz(reader: str, seconds: int) -> None:
    """Fuzz one reader in this process; ends it."""
    import atheris

    with atheris.instrument_imports(include=["minisft", "json", "yaml", "jinja2"]):
        pass
    sound = seeds()[reader]
    corpus = scratch() / "corpus"
    corpus.mkdir()
    for i, value in enumerate(sound):
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        (corpus / f"raw-{i}").write_bytes(b"\x01" + raw)
        (corpus / f"edit-{i}").write_bytes(bytes([0, i, 3, 4]))

    def one(data: bytes) -> None:
        made = case(reader, data, sound)
        try:
            check(reader, made)
        except BaseException as e:
            FINDINGS.mkdir(exist_ok=True)
            (
                FINDINGS / f"{reader}-{type(e).__name__}-{hashlib.sha256(made).hexdigest()[:8]}"
            ).write_bytes(made)
            raise

    options = [
        f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=2048", "-max_len=4096",
        "-print_final_stats=1", "-verbosity=0", f"-artifact_prefix={scratch()}/",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


def main(words: list[str]) -> int:
    """Fuzz the readers named, one process each; the number of those that found something."""
    seconds = next((int(w) for w in words if w.isdigit()), 600)
    failed = 0
    for reader in [w for w in words if not w.isdigit()] or list(READERS):
        done = subprocess.run(
            [sys.executable, __file__, "--one", reader, str(seconds)],
            capture_output=True,
            text=True,
        )
        runs = [
            line.split()[-1] for line in done.stderr.splitlines() if "number_of_executed" in line
        ]
        count = runs[0] if runs else "?"
        print(f"{reader:12} {seconds} s, {count} inputs, exit code {done.returncode}", flush=True)
        if done.returncode:
            failed += 1
            print(done.stderr[-3000:])
    return failed


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        fuzz(sys.argv[2], int(sys.argv[3]))
    else:
        sys.exit(min(1, main(sys.argv[1:])))
