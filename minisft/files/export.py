"""Write the result of a run (adapter or model) to files that other programs load."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml
from torch import Tensor

from minisft.config.lora import LoraConfig
from minisft.config.model import ModelConfig
from minisft.config.train import TrainConfig
from minisft.files.adapter import save_adapter
from minisft.files.disk import load_json, write_json, writing
from minisft.files.load import Base, base_4bit
from minisft.files.quant_state import OURS
from minisft.files.safetensors import save_file
from minisft.lora import Flat
from minisft.variants.pissa import exported_lora, exported_tensors


def trained_file(lora: LoraConfig | None) -> tuple[str, str]:
    """Return the (file name, key prefix) of the trained tensors in a checkpoint or a result."""
    return ("adapter_model.safetensors", "base_model.model.") if lora else ("model.safetensors", "")


def write_trained(directory: Path, trainable: Flat, base: Base, config: TrainConfig) -> None:
    """Write the trained tensors in float32: a PEFT adapter, or model.safetensors without LoRA."""
    if base.lora:
        save_adapter(
            directory, exported_tensors(trainable.views, base.initial_lora),
            exported_lora(base.lora), base.cfg, config.base_name, revision=config.revision,
            base_4bit=base_4bit(config, base),
        )  # fmt: skip
        return
    save_file(trainable.views, directory / "model.safetensors", {"format": "pt"})


def model_card(base: str, facts: dict[str, Any], base_4bit: str = "") -> str:
    """Return README.md of an adapter: YAML front matter for the hub, then the facts as tables.

    base: hub id or path of the base model. Scalars in `facts`, such as data_hash, form the table
    "Run"; each dict in `facts`, such as config or losses, becomes a separate table.
    base_4bit: the quantisation of the base (`quant_state.kinds`), "" if it is not in 4 bits.
    """
    front = {
        "base_model": base,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": [f"base_model:adapter:{base}", "lora", "sft", "minisft"],
    }
    scalars = {k: v for k, v in facts.items() if not isinstance(v, dict)}
    source = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    return jinja2.Template(source, trim_blocks=True, keep_trailing_newline=True).render(
        front=yaml.safe_dump(front, sort_keys=False),
        base=" ".join(base.split()),
        base_4bit=base_4bit,
        quantised_here=base_4bit == OURS,
        tables={"run": scalars} | {k: v for k, v in facts.items() if isinstance(v, dict)},
        cell=_cell,
    )


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def write_model_files(
    directory: Path,
    base_directory: Path,
    cfg: ModelConfig,
    dtype: torch.dtype,
    files: dict[str, bytes],
) -> None:
    """Write `files` and the config.json and generation_config.json of a transformers directory.

    base_directory: directory of the base model, from which the two configs are copied and updated.
    """
    write_files(directory, files)
    raw = load_json(base_directory / "config.json")
    raw["dtype"] = str(dtype).removeprefix("torch.")
    raw["tie_word_embeddings"] = cfg.tie_word_embeddings
    for name in ("torch_dtype", "quantization_config"):
        raw.pop(name, None)
    generation = base_directory / "generation_config.json"
    if generation.exists():
        write_json(directory / generation.name, load_json(generation))
    write_json(directory / "config.json", raw)


def save_shards(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    max_bytes: int = 5 * 10**9,
) -> None:
    """Write named tensors as model.safetensors, or as shards of at most max_bytes with an index.

    dtype: dtype to store; None: each tensor's dtype. A tensor larger than max_bytes is stored in a
    separate shard. `tensors` may be a generator: at most one shard is in host memory at a time.
    """
    parts: list[tuple[Path, list[str]]] = []
    count, total = 0, 0
    for shard in _shards(tensors, dtype, max_bytes):
        path = directory / f".part-{len(parts)}.safetensors"
        save_file(shard, path, {"format": "pt"})
        parts.append((path, list(shard)))
        count += sum(t.numel() for t in shard.values())
        total += sum(t.nbytes for t in shard.values())
    weight_map = {}
    for i, (path, names) in enumerate(parts):
        final = "model.safetensors"
        if len(parts) > 1:
            final = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        path.replace(directory / final)
        weight_map |= dict.fromkeys(names, final)
    if len(parts) > 1:
        meta = {"total_size": total, "total_parameters": count}
        index = {"metadata": meta, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / "model.safetensors.index.json", index)


def _shards(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, max_bytes: int
) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * (dtype or tensor.dtype).itemsize
        if shard and size + nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.detach().to("cpu", dtype or tensor.dtype, copy=True).contiguous()
        size += nbytes
    yield shard


def write_files(directory: Path, files: dict[str, bytes]) -> None:
    """Write `files` (relative path -> content) into a directory."""
    for name, data in files.items():
        path = directory / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def to_json_line(value: dict[str, Any]) -> str:
    """Return one line of JSON; NaN and infinite numbers become null, as JSON cannot hold them."""
    clean = {k: None if isinstance(v, float) and v - v != 0 else v for k, v in value.items()}
    return json.dumps(clean) + "\n"
