"""Read model checkpoints (config.json and safetensors), one tensor at a time.

Supports local directories and hub ids, single files and shards with an index. Names, shapes and
dtypes are checked against config.json before any weights are read. Linears may be in bitsandbytes'
4-bit formats; these are detected from the tensors in the files, not from config.json.
"""

import dataclasses
import logging
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from minisft.config.errors import UserError
from minisft.config.hf import parse_model_config
from minisft.config.model import ModelConfig
from minisft.files import quant_state
from minisft.files.disk import load_json, load_json_object, naming
from minisft.files.quant_state import OURS, QuantState
from minisft.files.safetensors import TensorInfo, iter_tensors, read_header
from minisft.kernels.nf4 import NF4Weight, dequantize, quantize
from minisft.kernels.nf4.reference import BLOCK

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
Places = dict[str, tuple[Path, str]]  # key in minisft -> (file, key in that file)
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "additional_chat_templates/*"]


def resolve_model(name: str, revision: str | None = None) -> Path:
    """Return the local directory of a model; a hub id is downloaded into the hub's cache.

    A local directory needs no network. Raises UserError if `name` is not a directory or hub id.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if revision:
            reason = f"has no effect on a local directory ({name}); leave it out"
            raise UserError(f"--revision {revision} {reason}")
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        found = "is a file" if path.exists() else "does not exist"
        raise UserError(
            f"--model {name!r} {found}; expected a directory with config.json and safetensors, "
            "or a hub id such as meta-llama/Llama-3.2-1B"
        )
    from huggingface_hub import snapshot_download

    # Otherwise a failed download logs a page of retries before our one-line error.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as e:  # the hub raises many types: network, login, no such model
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        problem = "is not a local directory, and the hub does not give it"
        raise UserError(f"--model {name!r} {problem}: {reason}") from e


def load_model_config(directory: Path) -> ModelConfig:
    """Parse config.json of a checkpoint directory, and add EOS ids from generation_config.json."""
    path = Path(directory) / "config.json"
    cfg = parse_model_config(load_json(path), str(path))
    generation = Path(directory) / "generation_config.json"
    if generation.exists():
        raw = load_json(generation)
        eos = raw.get("eos_token_id") if isinstance(raw, dict) else None
        eos = eos if isinstance(eos, list) else [eos]  # [None] if there is none
        more = [i for i in eos if isinstance(i, int) and i not in cfg.eos_token_ids]
        cfg = dataclasses.replace(cfg, eos_token_ids=(*cfg.eos_token_ids, *more))
    return cfg


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The file of each tensor of a model checkpoint, with the model config and 4-bit quant states.

    cfg: from config.json; tie_word_embeddings is False if the files hold two different tensors.
    four_bit: key -> quant state of each matrix in 4 bits; `places` also holds its scales.
    """

    places: Places
    cfg: ModelConfig
    four_bit: dict[str, QuantState] = dataclasses.field(default_factory=dict)


def open_checkpoint(directory: Path, cfg: ModelConfig) -> Checkpoint:
    """Locate every tensor; check headers and quant states of the files against config.json.

    Accepts keys without the `model.` prefix and stale `rotary_emb.inv_freq` buffers, as
    transformers does. A tied model that stores a different head is opened as untied.
    Raises UserError for the first missing, unexpected or misshapen tensor.
    """
    directory = Path(directory)
    places, infos = _find_tensors(directory)
    with naming(directory):
        four_bit = _read_states(places, infos)
    members = {key for weight, state in four_bit.items() for key in state.keys(weight)}
    for key, (file, name) in places.items():
        stored = infos[key].dtype
        if key not in members and stored not in (torch.float32, torch.float16, torch.bfloat16):
            expected = "expected float32, float16, bfloat16 or bitsandbytes' 4 bits"
            remedy = "Use an unquantised checkpoint"
            raise UserError(f"{file}: {name} is stored as {stored}; {expected}. {remedy}")
    cfg = _settle_tying_(places, infos, four_bit, cfg)
    shapes = {key: infos[key].shape for key in places if key not in members}
    shapes |= {weight: state.shape for weight, state in four_bit.items()}
    _check_shapes(directory, shapes, cfg)
    return Checkpoint(places, cfg, four_bit)


def stream_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor | NF4Weight]]:
    """Yield (HF key, weight as stored, on CPU) one at a time, file by file.

    Host memory holds one weight at a time, if the caller keeps no reference, plus any scales that
    are stored before their 4-bit matrix. Raises UserError naming a damaged file.
    """
    four_bit = checkpoint.four_bit
    owners = {key: weight for weight, state in four_bit.items() for key in state.keys(weight)}
    waiting: dict[str, dict[str, Tensor]] = {weight: {} for weight in four_bit}
    for key, tensor in _read(checkpoint.places):
        if key not in owners:
            yield key, tensor
            continue
        weight = owners[key]
        waiting[weight][key] = tensor
        if len(waiting[weight]) == len(four_bit[weight].keys(weight)):
            with naming(checkpoint.places[weight][0]):
                matrix = quant_state.assemble(weight, four_bit[weight], waiting.pop(weight))
            yield weight, matrix
            del matrix  # not kept alive while the next one is read
        del tensor


def to_device(
    name: str, weight: Tensor | NF4Weight, device: torch.device, dtype: torch.dtype, four_bit: bool
) -> Tensor | NF4Weight:
    """Return a copy of a weight on `device`, in 4 bits if four_bit, else in `dtype`.

    A weight stored in 4 bits keeps its codes, or is decoded to `dtype`. Any other weight is
    quantised on `device` to NF4 with double quantisation, directly from its stored values: rounding
    to `dtype` first would change the codes. Raises UserError if a value to quantise is not finite.
    """
    if isinstance(weight, NF4Weight):
        tensors = {k: v for k, v in weight._asdict().items() if isinstance(v, Tensor)}
        moved = weight._replace(**{k: v.to(device, copy=True) for k, v in tensors.items()})
        return moved if four_bit else dequantize(moved, dtype)
    if not four_bit:
        return weight.to(device, dtype, copy=True)
    with quantising(name):
        return quantize(weight.to(device))


@contextmanager
def quantising(name: str, file: Path | None = None) -> Iterator[None]:
    """Turn a ValueError of `quantize` into a UserError that names the weight, and any `file`."""
    try:
        yield
    except ValueError as e:
        where = f"{file}: {name}" if file else name
        remedy = "Copy or download the model again"
        raise UserError(f"{where} cannot be quantised: {e}. {remedy}") from None


def dequantized(weight: Tensor | NF4Weight) -> Tensor:
    """Return `weight` decoded to float32 if it is in 4 bits, otherwise unchanged."""
    return dequantize(weight, torch.float32) if isinstance(weight, NF4Weight) else weight


def meta_weights(
    checkpoint: Checkpoint, dtype: torch.dtype, four_bit: set[str]
) -> Iterator[tuple[str, Tensor | NF4Weight]]:
    """Yield (HF key, weight) like `to_device`, but on torch's meta device: no values."""
    for name, shape in checkpoint.cfg.weight_shapes().items():
        if name not in four_bit:
            yield name, torch.empty(shape, dtype=dtype, device="meta")
            continue
        ours = QuantState("nf4", BLOCK, (shape[0], shape[1]), 0.0)  # with double quantisation
        yield name, quant_state.unfilled(checkpoint.four_bit.get(name, ours))


def four_bit_names(checkpoint: Checkpoint, load_in_4bit: bool) -> set[str]:
    """Return the names of the weights that a run holds in 4 bits; empty without load_in_4bit.

    Otherwise every linear of the decoder layers. In a 4-bit checkpoint, only the linears stored in
    4 bits: the others are in 16 bits on purpose. A head in 4 bits is decoded.
    """
    if not load_in_4bit:
        return set()
    linears = {f"{path}.weight" for path in checkpoint.cfg.linear_paths()}
    return linears & checkpoint.four_bit.keys() if checkpoint.four_bit else linears


def kinds_of(checkpoint: Checkpoint, names: set[str]) -> str:
    """Return `quant_state.kinds` of the weights in `names`, a result of `four_bit_names`."""
    if not checkpoint.four_bit:
        return OURS if names else ""
    return quant_state.kinds(checkpoint.four_bit[name] for name in names)


def _find_tensors(directory: Path) -> tuple[Places, dict[str, TensorInfo]]:
    """Return places and header entries of all tensors, by key, without stale RoPE buffers."""
    headers = {file: read_header(file).tensors for file in _weight_files(directory)}
    bare = not any(n.startswith("model.") for header in headers.values() for n in header)
    places: Places = {}
    infos: dict[str, TensorInfo] = {}
    for file, header in headers.items():
        for name, info in header.items():
            key = f"model.{name}" if bare and not name.startswith("lm_head.") else name
            if key.endswith("rotary_emb.inv_freq"):
                continue
            if key in places:
                raise UserError(f"{file}: {name} is also in {places[key][0].name}")
            places[key], infos[key] = (file, name), info
    return places, infos


def _read(places: Places) -> Iterator[tuple[str, Tensor]]:
    for file in sorted({file for file, _ in places.values()}):
        keys = {name: key for key, (f, name) in places.items() if f == file}
        for name, tensor in iter_tensors(file, list(keys)):
            yield keys[name], tensor


def _read_states(places: Places, infos: dict[str, TensorInfo]) -> dict[str, QuantState]:
    """Read and check the quant state of every 4-bit matrix; remove the states from `places`."""
    keys = quant_state.find_states(infos)
    texts = {k: bytes(t.tolist()) for k, t in _read({k: places.pop(k) for k in keys.values()})}
    states = {weight: quant_state.parse_state(key, texts[key]) for weight, key in keys.items()}
    for weight, state in states.items():
        quant_state.check_members(weight, state, infos)
        if weight == _EMBEDDING:
            raise UserError(f"{weight} is in 4 bits; only linears may be")
    return states


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.exists():
        if (directory / SINGLE).exists():
            return [directory / SINGLE]
        pickles = sorted(p.name for p in directory.glob("*.bin"))
        hint = f"{pickles[0]} is a pickle, which is never read: convert it" if pickles else ""
        raise UserError(f"{directory}: no {SINGLE} and no {INDEX}; {hint or 'download it'}")
    weight_map = load_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: no weight_map; expected tensor names mapped to shard files")
    files = []
    for name in sorted({str(v) for v in weight_map.values()}):
        path = directory / name
        # The index may be malicious: a shard must not name a file outside the directory.
        if Path(name).name != name or not name.endswith(".safetensors"):
            expected = "a file name ending in .safetensors"
            raise UserError(f"{index}: shard {name!r} is refused; expected {expected}")
        if not path.exists():
            raise UserError(f"{index}: shard {name} is missing from {directory}; download it again")
        files.append(path)
    return files


def _settle_tying_(
    places: Places, infos: dict[str, TensorInfo], four_bit: Container[str], cfg: ModelConfig
) -> ModelConfig:
    """Return cfg with tie_word_embeddings corrected to what is stored, as transformers v5 does.

    If cfg is tied and only one of embedding and head is stored, it serves as both. If both are
    stored and differ, the model is untied; if they are equal, the head is removed from `places`.
    """
    if not cfg.tie_word_embeddings or _HEAD not in places:
        return cfg
    if _HEAD in four_bit:
        raise UserError(f"{places[_HEAD][0]}: {_HEAD} is in 4 bits, but config.json ties it")
    if _EMBEDDING not in places:
        places[_EMBEDDING], infos[_EMBEDDING] = places.pop(_HEAD), infos.pop(_HEAD)
        return cfg
    embedding, head = (dict(_read({key: places[key]}))[key] for key in (_EMBEDDING, _HEAD))
    if not torch.equal(embedding, head):
        return dataclasses.replace(cfg, tie_word_embeddings=False)
    del places[_HEAD]
    return cfg


def _check_shapes(directory: Path, shapes: dict[str, tuple[int, ...]], cfg: ModelConfig) -> None:
    expected = cfg.weight_shapes()
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    surplus = [name for name in shapes if name not in expected]
    problems += [f"{name} is not a Llama weight under config.json" for name in surplus]
    for name, shape in expected.items():
        if name in shapes and shapes[name] != shape:
            problems.append(f"{name} is {shapes[name]} but config.json implies {shape}")
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise UserError(
            f"{directory}: {problems[0]}{more}; config.json says hidden_size={cfg.hidden_size}, "
            f"intermediate_size={cfg.intermediate_size}, layers={cfg.num_hidden_layers}, heads="
            f"{cfg.num_attention_heads}/{cfg.num_key_value_heads}, head_dim={cfg.head_dim}, vocab="
            f"{cfg.vocab_size}, tied={cfg.tie_word_embeddings}. Is it another model's config.json?"
        )
