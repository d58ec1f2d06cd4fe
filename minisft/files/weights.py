"""Checkpoints in: config.json and safetensors, one tensor at a time.

Local directories and hub ids, single files and shards with an index. Names, shapes and dtypes are
checked against config.json before a byte of weights is read. Linears may be in bitsandbytes' 4-bit
formats; the tensors tell, whatever config.json says.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisft.config.errors import UserError
from minisft.config.hf import parse_model_config
from minisft.config.model import ModelConfig
from minisft.files.disk import load_json
from minisft.files.quant_state import (
    OURS,
    QuantState,
    assemble,
    check_members,
    check_state_size,
    find_states,
    kinds,
    parse_state,
    unfilled,
)
from minisft.files.safetensors import TensorInfo, iter_tensors, read_header
from minisft.kernels.nf4 import NF4Weight, dequantize, quantize
from minisft.kernels.nf4.reference import BLOCK

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_HUB_FILES = [
    "*.json",
    "*.safetensors",
    "*.jinja",
    "additional_chat_templates/*",
]


def resolve_model(name: str, revision: str | None = None) -> Path:
    """The local directory of a model: the path itself, or a hub id downloaded into the hub's cache.

    A local directory never touches the network. UserError if it is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if revision:
            raise UserError(
                f"--revision {revision} has no effect on a local directory ({name}); leave it out"
            )
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        found = "is a file" if path.exists() else "does not exist"
        raise UserError(
            f"--model {name!r} {found}; expected a directory with config.json and safetensors, "
            "or a hub id such as meta-llama/Llama-3.2-1B"
        )
    from huggingface_hub import snapshot_download

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a page of retries: one line does
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as e:  # the hub's many errors: none is ours, all end in one line
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(
            f"--model {name!r} is no local directory, and the hub does not give it: {reason}"
        ) from e


def load_model_config(directory: Path) -> ModelConfig:
    """config.json of a checkpoint directory; its eos ids widened by generation_config.json's."""
    path = Path(directory) / "config.json"
    cfg = parse_model_config(load_json(path), str(path))
    generation = Path(directory) / "generation_config.json"
    if generation.exists():
        raw = load_json(generation)
        eos = raw.get("eos_token_id") if isinstance(raw, dict) else None
        eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
        more = [i for i in eos if isinstance(i, int) and i not in cfg.eos_token_ids]
        cfg = dataclasses.replace(cfg, eos_token_ids=(*cfg.eos_token_ids, *more))
    return cfg


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where every tensor of a checkpoint lies: our key -> (file, key in that file).

    cfg is config.json's, but for `tie_word_embeddings` where the files overrule it. four_bit: key
    of each matrix that is stored in 4 bits -> its quant state; its scales are in `places` too.
    """

    places: dict[str, tuple[Path, str]]
    cfg: ModelConfig
    four_bit: dict[str, QuantState] = dataclasses.field(default_factory=dict)


def open_checkpoint(directory: Path, cfg: ModelConfig) -> Checkpoint:
    """Find and check every tensor against config.json by the files' headers and quant states.

    Accepts keys without the `model.` prefix and stale `rotary_emb.inv_freq` buffers, as
    transformers does. A tied model that carries a head of its own is opened untied (the returned
    cfg says so).
    UserError names the first missing, unexpected or misshapen tensor and how many more there are.
    """
    directory = Path(directory)
    headers = {file: read_header(file).tensors for file in _weight_files(directory)}
    bare = not any(n.startswith("model.") for header in headers.values() for n in header)
    places: dict[str, tuple[Path, str]] = {}
    infos: dict[str, TensorInfo] = {}
    for file, header in headers.items():
        for name, info in header.items():
            key = f"model.{name}" if bare and not name.startswith("lm_head.") else name
            if key.endswith("rotary_emb.inv_freq"):
                continue
            if key in places:
                raise UserError(f"{file}: {name} is also in {places[key][0].name}")
            places[key], infos[key] = (file, name), info
    four_bit = _read_states(directory, places, infos)
    members = {weight: _member_keys(weight, state) for weight, state in four_bit.items()}
    within = {key for keys in members.values() for key in keys}
    for key, (file, name) in places.items():
        if key not in within and infos[key].dtype not in _FLOATS:
            raise UserError(
                f"{file}: {name} is stored as {infos[key].dtype}, and not in bitsandbytes' 4-bit "
                "format; expected float32, float16 or bfloat16. Use an unquantised checkpoint"
            )
    shapes = {key: infos[key].shape for key in places if key not in within}
    shapes |= {weight: state.shape for weight, state in four_bit.items()}
    cfg = _settle_tying(places, four_bit, cfg)
    _check_shapes(directory, shapes if not cfg.tie_word_embeddings else _untied(shapes), cfg)
    wanted = {n for name in cfg.weight_shapes() for n in members.get(name, [name])}
    return Checkpoint({k: v for k, v in places.items() if k in wanted}, cfg, four_bit)


def stream_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor | NF4Weight]]:
    """Yield (HF key, weight as stored, on CPU) one at a time, file by file.

    The caller converts and places each before asking for the next: no more than one weight waits
    in host memory, and scales that lie before the 4-bit matrix that they belong to.
    UserError names a file that is damaged.
    """
    owners = {
        key: weight
        for weight, state in checkpoint.four_bit.items()
        for key in _member_keys(weight, state)
    }
    waiting: dict[str, dict[str, Tensor]] = {weight: {} for weight in checkpoint.four_bit}
    for file in sorted({file for file, _ in checkpoint.places.values()}):
        keys = {name: key for key, (f, name) in checkpoint.places.items() if f == file}
        for name, tensor in iter_tensors(file, list(keys)):
            key = keys[name]
            if key not in owners:
                yield key, tensor
                continue
            weight = owners[key]
            state, found = checkpoint.four_bit[weight], waiting[weight]
            found[key] = tensor
            if len(found) == len(_member_keys(weight, state)):
                yield weight, assemble(weight, state, waiting.pop(weight), str(file))
            del tensor


def to_device(
    name: str, weight: Tensor | NF4Weight, device: torch.device, dtype: torch.dtype, four_bit: bool
) -> Tensor | NF4Weight:
    """A frozen weight as the run keeps it: on `device`, in `dtype` or in 4 bits.

    A matrix in 4 bits stays as it is or is decoded into `dtype`; another is quantised from the
    values stored, to NF4 with double quantisation, on `device`. UserError if it is not finite.
    """
    if isinstance(weight, NF4Weight):
        moved = NF4Weight(*(_copied(value, device) for value in weight))
        return moved if four_bit else dequantize(moved, dtype)
    if not four_bit:
        return weight.to(device, dtype, copy=True)
    with quantising(name):
        return quantize(weight.to(device))


@contextmanager
def quantising(name: str, file: Path | None = None) -> Iterator[None]:
    """Turns quantize's ValueError into a UserError that names the weight, and its file if given."""
    try:
        yield
    except ValueError as e:
        where = f"{file}: " if file else ""
        raise UserError(
            f"{where}{name} cannot be quantised: {e}. Give a model that is whole"
        ) from None


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The dtype of the embedding as it lies in its file: float32, float16 or bfloat16."""
    file, name = checkpoint.places["model.embed_tokens.weight"]
    return str(read_header(file).tensors[name].dtype).removeprefix("torch.")


def dequantized(weight: Tensor | NF4Weight) -> Tensor:
    """The weight as it is, or decoded to float32 where it is in 4 bits."""
    return dequantize(weight, torch.float32) if isinstance(weight, NF4Weight) else weight


def meta_weights(
    checkpoint: Checkpoint, dtype: torch.dtype, four_bit: set[str]
) -> Iterator[tuple[str, Tensor | NF4Weight]]:
    """Yield (HF key, weight as `to_device` gives it, on torch's meta device): sizes, no numbers."""
    for name, shape in checkpoint.cfg.weight_shapes().items():
        if name not in four_bit:
            yield name, torch.empty(shape, dtype=dtype, device="meta")
            continue
        ours = QuantState("nf4", BLOCK, (shape[0], shape[1]), 0.0)  # with double quantisation
        yield name, unfilled(checkpoint.four_bit.get(name, ours))


def _copied(value: Any, device: torch.device) -> Any:
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def four_bit_names(checkpoint: Checkpoint, load_in_4bit: bool) -> set[str]:
    """The weights that a run keeps in 4 bits: none, or every linear of the decoder layers.

    A checkpoint that is quantised has made the choice: what it holds in 16 bits stays so. A head
    in 4 bits is decoded.
    """
    if not load_in_4bit:
        return set()
    linears = {f"{path}.weight" for path in checkpoint.cfg.linear_paths()}
    return linears & checkpoint.four_bit.keys() if checkpoint.four_bit else linears


def kinds_of(checkpoint: Checkpoint, names: set[str]) -> str:
    """`quant_state.kinds` of the weights of `four_bit_names`."""
    if not checkpoint.four_bit:
        return OURS if names else ""
    return kinds(checkpoint.four_bit[name] for name in names)


def _member_keys(weight: str, state: QuantState) -> list[str]:
    return [weight, *(f"{weight}.{member}" for member in state.members())]


def _read_states(
    directory: Path, places: dict[str, tuple[Path, str]], infos: dict[str, TensorInfo]
) -> dict[str, QuantState]:
    """The quant state of every 4-bit matrix, taken out of `places` and `infos` and checked."""
    keys = find_states(places, str(directory))
    where = {key: places.pop(key) for key in keys.values()}
    for key in where:
        check_state_size(key, infos.pop(key), str(directory))
    texts: dict[str, bytes] = {}
    for file in sorted({file for file, _ in where.values()}):
        names = {name: key for key, (f, name) in where.items() if f == file}
        for name, tensor in iter_tensors(file, list(names)):
            texts[names[name]] = bytes(tensor.tolist())
    states = {w: parse_state(key, texts[key], str(directory)) for w, key in keys.items()}
    groups: dict[str, dict[str, TensorInfo]] = {weight: {} for weight in states}
    for key, info in infos.items():
        weight = key if key in states else key.rpartition(".")[0]
        if weight in states:
            groups[weight][key] = info
    for weight, state in states.items():
        check_members(weight, state, groups[weight], str(directory))
        if weight == "model.embed_tokens.weight":
            raise UserError(f"{directory}: {weight} is in 4 bits; only linears may be")
    return states


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.exists():
        if (directory / SINGLE).exists():
            return [directory / SINGLE]
        pickles = sorted(p.name for p in directory.glob("*.bin"))
        hint = (
            f"{pickles[0]} is a pickle, which is never read: convert it"
            if pickles
            else "download it"
        )
        raise UserError(f"{directory}: no {SINGLE} and no {INDEX}; {hint}")
    raw = load_json(index)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: no weight_map; expected tensor names mapped to shard files")
    files = []
    for name in sorted({str(v) for v in weight_map.values()}):
        path = directory / name
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"{index}: shard {name!r} is refused; expected a file name ending in .safetensors"
            )
        if not path.exists():
            raise UserError(f"{index}: shard {name} is missing from {directory}; download it again")
        files.append(path)
    return files


def _settle_tying(
    places: dict[str, tuple[Path, str]], four_bit: dict[str, QuantState], cfg: ModelConfig
) -> ModelConfig:
    """Decide whether the head is the embedding, as transformers v5 does on loading.

    Tied in config.json and only one of the two present: that one serves as both. Both present and
    different: not tied.
    """
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if not cfg.tie_word_embeddings or head not in places:
        return cfg
    if head in four_bit:
        raise UserError(f"{places[head][0]}: {head} is in 4 bits, but config.json ties it")
    if embedding not in places:
        places[embedding] = places.pop(head)
        return cfg
    pair = [
        dict(iter_tensors(file, [name]))[name] for file, name in (places[embedding], places[head])
    ]
    if torch.equal(*pair):
        return cfg
    return dataclasses.replace(cfg, tie_word_embeddings=False)


def _untied(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    shapes = dict(shapes)
    head = shapes.pop("lm_head.weight", None)
    if head is not None:
        shapes.setdefault("model.embed_tokens.weight", head)
    return shapes


def _check_shapes(directory: Path, shapes: dict[str, tuple[int, ...]], cfg: ModelConfig) -> None:
    expected = cfg.weight_shapes()
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    problems += [
        f"{name} is not a Llama weight under config.json" for name in shapes if name not in expected
    ]
    problems += [
        f"{name} is {shapes[name]} but config.json implies {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise UserError(
            f"{directory}: {problems[0]}{more}; config.json says hidden_size={cfg.hidden_size}, "
            f"intermediate_size={cfg.intermediate_size}, layers={cfg.num_hidden_layers}, heads="
            f"{cfg.num_attention_heads}/{cfg.num_key_value_heads}, head_dim={cfg.head_dim}, vocab="
            f"{cfg.vocab_size}, tied={cfg.tie_word_embeddings}. Is it another model's config.json?"
        )
