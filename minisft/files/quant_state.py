"""4-bit matrices in safetensors files, in bitsandbytes' layout: checked, read and written.

A matrix P.weight [O, I] of n = O * I weights in b = ceil(n / blocksize) blocks is several tensors:

P.weight                                 uint8 [ceil(n / 2), 1], or the same bytes as another dtype
P.weight.absmax                          float32 [b]; uint8 [b] with double quantisation
P.weight.quant_map                       float32 [16]
P.weight.nested_absmax                   float32 [ceil(b / 256)], with double quantisation only
P.weight.nested_quant_map                float32 [256], with double quantisation only
P.weight.quant_state.bitsandbytes__nf4   JSON as uint8 (or __fp4)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from minisft.config.errors import UserError
from minisft.files.safetensors import TensorInfo
from minisft.kernels.nf4 import NF4Weight
from minisft.kernels.nf4.reference import CODES, NESTED_BLOCK, scales

OURS = "nf4 with double quantisation"  # `kinds` of what a run quantises itself
_STATE = re.compile(r"(.+\.weight)\.quant_state\.(.+)")
_MEMBER = re.compile(r"(.+\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map)")
_PREFIX = "bitsandbytes__"
_STORAGES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = ("bfloat16", "float16", "float32")
_MAX_JSON_BYTES = 65536
_DAMAGED = "The file is damaged: copy or download it again"


class QuantState(NamedTuple):
    """What the JSON of one 4-bit matrix says."""

    quant_type: str  # "nf4" or "fp4"
    blocksize: int
    shape: tuple[int, int]
    nested_offset: float | None  # None: single quantisation

    def members(self) -> dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]:
        """Tensor beside the packed weights -> (its dtypes, its shape)."""
        blocks = math.ceil(self.shape[0] * self.shape[1] / self.blocksize)
        f32, u8 = (torch.float32,), (torch.uint8,)
        if self.nested_offset is None:
            return {"absmax": (f32, (blocks,)), "quant_map": (f32, (16,))}
        return {
            "absmax": (u8, (blocks,)),
            "quant_map": (f32, (16,)),
            "nested_absmax": (f32, (math.ceil(blocks / NESTED_BLOCK),)),
            "nested_quant_map": (f32, (256,)),
        }


def kinds(matrices: Iterable[NF4Weight | QuantState]) -> str:
    """What they are: "nf4 with double quantisation", several joined by " and ", "" for none."""
    found = {
        f"{m.quant_type} with {'single' if m.nested_offset is None else 'double'} quantisation"
        for m in matrices
    }
    return " and ".join(sorted(found))


def find_states(names: Iterable[str], source: str) -> dict[str, str]:
    """Key of each 4-bit matrix -> key of its quant state.

    UserError for a second state of one matrix, a kind that is not nf4 or fp4, and a scale or code
    that belongs to no matrix.
    """
    names = list(names)
    states: dict[str, str] = {}
    for name in names:
        if match := _STATE.fullmatch(name):
            weight, kind = match.groups()
            if kind.removeprefix(_PREFIX) not in CODES or not kind.startswith(_PREFIX):
                known = " and ".join(_PREFIX + code for code in CODES)
                raise UserError(
                    f"{source}: {name} is a quantisation that is not known; expected {known}. "
                    "Use the unquantised checkpoint"
                )
            if weight in states:
                raise UserError(f"{source}: {weight} has two quant states, {name} is one of them")
            states[weight] = name
    for name in names:
        if (match := _MEMBER.fullmatch(name)) and match[1] not in states:
            raise UserError(
                f"{source}: {name} belongs to a 4-bit matrix whose quant state "
                f"({match[1]}.quant_state.{_PREFIX}nf4) is missing. {_DAMAGED}"
            )
    return states


def check_state_size(name: str, info: TensorInfo, source: str) -> None:
    """UserError if the quant state cannot be JSON text; checked before it is read."""
    if info.dtype != torch.uint8 or len(info.shape) != 1 or info.shape[0] > _MAX_JSON_BYTES:
        raise UserError(
            f"{source}: {name} is {info.dtype} {list(info.shape)}; expected uint8 JSON text of at "
            f"most {_MAX_JSON_BYTES} bytes. {_DAMAGED}"
        )


def parse_state(name: str, text: bytes, source: str) -> QuantState:
    """The JSON of the quant state called `name`; UserError names it and what is wrong."""

    def wrong(key: str, expected: str) -> UserError:
        found = repr(raw[key])[:80] if key in raw else "missing"
        return UserError(f"{source}: {name} says {key}={found}; expected {expected}. {_DAMAGED}")

    try:
        raw = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{source}: {name} is not JSON ({e}). {_DAMAGED}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{source}: {name} is not a JSON object. {_DAMAGED}")
    kind = name.rpartition(_PREFIX)[2]
    if raw.get("quant_type") != kind:
        raise wrong("quant_type", f"{kind!r}, as in its name")
    blocksize, shape, offset = raw.get("blocksize"), raw.get("shape"), None
    if type(blocksize) is not int or blocksize not in _BLOCKSIZES:
        raise wrong("blocksize", f"one of {', '.join(map(str, _BLOCKSIZES))}")
    if not (
        isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
    ):
        raise wrong("shape", "[out, in]")
    if raw.get("dtype") not in _DTYPES:
        raise wrong("dtype", " or ".join(_DTYPES))
    if any(key.startswith("nested_") for key in raw):
        if raw.get("nested_blocksize") != NESTED_BLOCK:
            raise wrong("nested_blocksize", str(NESTED_BLOCK))
        if raw.get("nested_dtype") != "float32":
            raise wrong("nested_dtype", "'float32'")
        offset = raw.get("nested_offset")
        if (
            isinstance(offset, bool)
            or not isinstance(offset, int | float)
            or not abs(offset) <= torch.finfo(torch.float32).max  # NaN is not
        ):
            raise wrong("nested_offset", "a finite number")
    return QuantState(kind, blocksize, (shape[0], shape[1]), offset)


def check_members(
    weight: str, state: QuantState, infos: Mapping[str, TensorInfo], source: str
) -> None:
    """Hold the headers of one matrix's tensors against its quant state.

    infos: key -> TensorInfo, of the packed weights and of every "WEIGHT.member" in the files.
    UserError names the first tensor that is missing, surplus, or of another dtype or shape.
    """
    expected = {f"{weight}.{member}": spec for member, spec in state.members().items()}
    for key, (dtypes, shape) in expected.items():
        if key not in infos:
            raise UserError(f"{source}: {key} is missing, but its quant state asks for it")
        info = infos[key]
        if info.dtype not in dtypes or tuple(info.shape) != shape:
            raise UserError(
                f"{source}: {key} is {info.dtype} {list(info.shape)}; its quant state implies "
                f"{dtypes[0]} {list(shape)}. {_DAMAGED}"
            )
    for key in infos:
        if _MEMBER.fullmatch(key) and key not in expected:
            raise UserError(
                f"{source}: {key} has no meaning, for its quant state says nothing of double "
                f"quantisation. {_DAMAGED}"
            )
    if weight not in infos:
        raise UserError(f"{source}: {weight} is missing, but its quant state is there. {_DAMAGED}")
    info = infos[weight]
    num_bytes, want = info.stop - info.start, math.ceil(state.shape[0] * state.shape[1] / 2)
    column = len(info.shape) == 1 or (len(info.shape) == 2 and info.shape[1] == 1)
    if info.dtype not in _STORAGES or not column or num_bytes != want:
        raise UserError(
            f"{source}: {weight} is {info.dtype} {list(info.shape)}, {num_bytes} bytes; its quant "
            f"state, shape {list(state.shape)}, implies one column of {want} bytes. {_DAMAGED}"
        )


def assemble(weight: str, state: QuantState, tensors: dict[str, Tensor], source: str) -> NF4Weight:
    """One matrix from its tensors by key, on their device; the values of its scales are checked."""
    packed = tensors[weight].contiguous().view(-1).view(torch.uint8)
    parts = {member: tensors[f"{weight}.{member}"] for member in state.members()}
    for member, tensor in parts.items():
        if not tensor.is_floating_point():
            continue
        if not tensor.isfinite().all():
            raise UserError(
                f"{source}: {weight}.{member} holds a value that is not finite. {_DAMAGED}"
            )
    code = torch.tensor(CODES[state.quant_type], dtype=torch.float32)
    if (parts["quant_map"] - code).abs().max() > 1e-6:
        raise UserError(
            f"{source}: {weight}.quant_map is not the code of {state.quant_type}. {_DAMAGED}"
        )
    matrix = _matrix(state, packed, parts)
    if not scales(matrix).isfinite().all():
        raise UserError(
            f"{source}: {weight}.absmax decodes to scales that are not finite. {_DAMAGED}"
        )
    return matrix


def unfilled(state: QuantState) -> NF4Weight:
    """A matrix of that state on torch's meta device: every tensor's size, and no numbers."""
    packed = torch.empty(
        math.ceil(state.shape[0] * state.shape[1] / 2), dtype=torch.uint8, device="meta"
    )
    parts = {
        member: torch.empty(shape, dtype=dtypes[0], device="meta")
        for member, (dtypes, shape) in state.members().items()
    }
    return _matrix(state, packed, parts)


def _matrix(state: QuantState, packed: Tensor, parts: dict[str, Tensor]) -> NF4Weight:
    offset = state.nested_offset
    return NF4Weight(
        packed,
        parts["absmax"],
        parts["quant_map"],
        parts.get("nested_absmax"),
        parts.get("nested_quant_map"),
        None if offset is None else torch.tensor(offset, dtype=torch.float32),
        state.shape,
        state.blocksize,
        state.quant_type,
    )


def to_tensors(name: str, weight: NF4Weight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Key -> tensor of one matrix P.weight, for a safetensors file. dtype: that of the model."""
    raw = {
        "quant_type": weight.quant_type,
        "blocksize": weight.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = {
        name: weight.packed.unsqueeze(1),
        f"{name}.absmax": weight.absmax,
        f"{name}.quant_map": weight.code,
    }
    if weight.nested_absmax is not None:
        assert weight.nested_code is not None and weight.nested_offset is not None
        tensors[f"{name}.nested_absmax"] = weight.nested_absmax
        tensors[f"{name}.nested_quant_map"] = weight.nested_code
        raw |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": weight.nested_offset.item(),
        }
    text = json.dumps(raw).encode("utf-8")
    state = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return {**tensors, f"{name}.quant_state.{_PREFIX}{weight.quant_type}": state}
