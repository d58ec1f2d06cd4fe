"""Check, read and write 4-bit matrices in safetensors files, in the layout of bitsandbytes.

Tensors that store a matrix P.weight [O, I] of n = O * I weights in b = ceil(n / blocksize) blocks:

P.weight                                 uint8 [ceil(n / 2), 1], or the same bytes as another dtype
P.weight.absmax                          float32 [b]; uint8 [b] with double quantisation
P.weight.quant_map                       float32 [16]
P.weight.nested_absmax                   float32 [ceil(b / 256)], with double quantisation only
P.weight.nested_quant_map                float32 [256], with double quantisation only
P.weight.quant_state.bitsandbytes__nf4   JSON as uint8 (or __fp4)

Error messages of this module name the tensor; the caller adds the file name (`disk.naming`).
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minisft.config.errors import UserError
from minisft.files.safetensors import TensorInfo
from minisft.kernels.nf4 import NF4Weight
from minisft.kernels.nf4.reference import CODES, NESTED_BLOCK, scales

OURS = "nf4 with double quantisation"  # `kinds` of a base that a run quantises itself
_MEMBERS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_MEMBER = re.compile(rf"(.+\.weight)\.({'|'.join(_MEMBERS)})")
_STATE = re.compile(r"(.+\.weight)\.quant_state\.(.+)")
_PREFIX = "bitsandbytes__"
_STORAGES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = ("bfloat16", "float16", "float32")
_MAX_JSON_BYTES = 65536


class QuantState(NamedTuple):
    """The parsed quant state (JSON metadata) of one 4-bit matrix."""

    quant_type: str  # "nf4" or "fp4"
    blocksize: int
    shape: tuple[int, int]
    nested_offset: float | None  # None: single quantisation

    def members(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return member name -> (dtype, shape) of the tensors stored with the packed weights."""
        blocks = math.ceil(self.shape[0] * self.shape[1] / self.blocksize)
        single = {"absmax": (torch.float32, (blocks,)), "quant_map": (torch.float32, (16,))}
        if self.nested_offset is None:
            return single
        return single | {
            "absmax": (torch.uint8, (blocks,)),
            "nested_absmax": (torch.float32, (math.ceil(blocks / NESTED_BLOCK),)),
            "nested_quant_map": (torch.float32, (256,)),
        }

    def keys(self, weight: str) -> list[str]:
        """Return the keys of all tensors of the matrix named `weight`, the packed weights first."""
        return [weight, *(f"{weight}.{member}" for member in self.members())]


def kinds(matrices: Iterable[NF4Weight | QuantState]) -> str:
    """Describe the 4-bit kinds of matrices, e.g. "nf4 with double quantisation"; "" if none."""
    found = {
        f"{m.quant_type} with {'single' if m.nested_offset is None else 'double'} quantisation"
        for m in matrices
    }
    return " and ".join(sorted(found))


def find_states(infos: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Return key of the matrix -> key of its quant state, for every 4-bit matrix.

    infos: key -> TensorInfo of every tensor in the checkpoint.
    Raises UserError for a matrix with two states, a kind other than nf4 and fp4, a state whose
    dtype or shape is invalid, and a scale or code whose matrix has no state.
    """
    states: dict[str, str] = {}
    known = [_PREFIX + code for code in CODES]
    for name, info in infos.items():
        if not (match := _STATE.fullmatch(name)):
            continue
        weight, kind = match.groups()
        if kind not in known:
            expected = f"expected {' and '.join(known)}. Use the unquantised checkpoint"
            raise UserError(f"{name} is a quantisation that is not known; {expected}")
        if weight in states:
            raise UserError(f"{weight} has two quant states, {name} is one of them")
        if info.dtype != torch.uint8 or len(info.shape) != 1 or info.shape[0] > _MAX_JSON_BYTES:
            expected = f"uint8 JSON text of at most {_MAX_JSON_BYTES} bytes"
            raise _damaged(f"{name} is {info.dtype} {list(info.shape)}; expected {expected}")
        states[weight] = name
    for name in infos:
        if (match := _MEMBER.fullmatch(name)) and match[1] not in states:
            state = f"quant state ({match[1]}.quant_state.{known[0]})"
            raise _damaged(f"{name} belongs to a 4-bit matrix whose {state} is missing")
    return states


def parse_state(name: str, text: bytes) -> QuantState:
    """Parse the JSON of the quant state `name`. Raises UserError naming the invalid field."""
    try:
        raw = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise _damaged(f"{name} is not JSON ({e})") from None
    if not isinstance(raw, dict):
        raise _damaged(f"{name} is not a JSON object")
    kind, blocksize, shape = name.rpartition(_PREFIX)[2], raw.get("blocksize"), raw.get("shape")
    sizes = ", ".join(map(str, _BLOCKSIZES))
    is_shape = type(shape) is list and [type(n) for n in shape] == [int, int] and min(shape) > 0
    checks = [
        ("quant_type", raw.get("quant_type") == kind, f"{kind!r}, as in its name"),
        ("blocksize", type(blocksize) is int and blocksize in _BLOCKSIZES, f"one of {sizes}"),
        ("shape", is_shape, "[out, in]"),
        ("dtype", raw.get("dtype") in _DTYPES, " or ".join(_DTYPES)),
    ]
    offset: Any = raw.get("nested_offset")
    if any(key.startswith("nested_") for key in raw):
        # The comparison requires a value that is finite in float32, and is False for NaN.
        finite = type(offset) in (int, float) and abs(offset) <= torch.finfo(torch.float32).max
        checks += [
            ("nested_blocksize", raw.get("nested_blocksize") == NESTED_BLOCK, str(NESTED_BLOCK)),
            ("nested_dtype", raw.get("nested_dtype") == "float32", "'float32'"),
            ("nested_offset", finite, "a finite number"),
        ]
    for key, ok, expected in checks:
        if not ok:
            found = repr(raw[key])[:80] if key in raw else "missing"
            raise _damaged(f"{name} says {key}={found}; expected {expected}")
    return QuantState(kind, raw["blocksize"], (raw["shape"][0], raw["shape"][1]), offset)


def check_members(weight: str, state: QuantState, infos: Mapping[str, TensorInfo]) -> None:
    """Check the dtypes and shapes of one matrix's tensors against its quant state.

    infos: key -> TensorInfo of every tensor in the checkpoint.
    Raises UserError for the first tensor that is missing, unexpected, or of another dtype or shape.
    """
    members = state.members()
    for member in _MEMBERS:
        key, wanted = f"{weight}.{member}", members.get(member)
        if wanted and key not in infos:
            raise UserError(f"{key} is missing, but its quant state asks for it")
        if wanted and wanted != (info := infos[key])[:2]:
            implied = f"its quant state implies {wanted[0]} {list(wanted[1])}"
            raise _damaged(f"{key} is {info.dtype} {list(info.shape)}; {implied}")
        if not wanted and key in infos:
            reason = "its quant state says nothing of double quantisation"
            raise _damaged(f"{key} has no meaning, for {reason}")
    if weight not in infos:
        raise _damaged(f"{weight} is missing, but its quant state is there")
    info = infos[weight]
    num_bytes, want = info.stop - info.start, math.ceil(state.shape[0] * state.shape[1] / 2)
    column = len(info.shape) == 1 or (len(info.shape) == 2 and info.shape[1] == 1)
    if info.dtype not in _STORAGES or not column or num_bytes != want:
        found = f"{info.dtype} {list(info.shape)}, {num_bytes} bytes"
        implied = f"its quant state, shape {list(state.shape)}, implies one column of {want} bytes"
        raise _damaged(f"{weight} is {found}; {implied}")


def assemble(weight: str, state: QuantState, tensors: Mapping[str, Tensor]) -> NF4Weight:
    """Build one matrix from its tensors (by key, all on one device), and check their values.

    Raises UserError for a non-finite value, or a quant_map that does not match the quant type.
    """
    packed = tensors[weight].contiguous().view(-1).view(torch.uint8)
    parts = {member: tensors[f"{weight}.{member}"] for member in state.members()}
    for member, tensor in parts.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise _damaged(f"{weight}.{member} holds a value that is not finite")
    code = torch.tensor(CODES[state.quant_type], dtype=torch.float32)
    if (parts["quant_map"] - code).abs().max() > 1e-6:
        raise _damaged(f"{weight}.quant_map is not the code of {state.quant_type}")
    matrix = _matrix(state, packed, parts)
    # nested_code * nested_absmax + nested_offset can overflow although its parts are finite.
    if not scales(matrix).isfinite().all():
        raise _damaged(f"{weight}.absmax decodes to scales that are not finite")
    return matrix


def unfilled(state: QuantState) -> NF4Weight:
    """Return a matrix with the layout of `state` on torch's meta device: no values."""
    num_bytes = math.ceil(state.shape[0] * state.shape[1] / 2)
    packed = torch.empty(num_bytes, dtype=torch.uint8, device="meta")
    parts = {
        member: torch.empty(shape, dtype=dtype, device="meta")
        for member, (dtype, shape) in state.members().items()
    }
    return _matrix(state, packed, parts)


def _matrix(state: QuantState, packed: Tensor, parts: dict[str, Tensor]) -> NF4Weight:
    offset = state.nested_offset
    return NF4Weight(
        packed, parts["absmax"], parts["quant_map"],
        parts.get("nested_absmax"), parts.get("nested_quant_map"),
        None if offset is None else torch.tensor(offset, dtype=torch.float32),
        state.shape, state.blocksize, state.quant_type,
    )  # fmt: skip


def to_tensors(name: str, weight: NF4Weight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors that store one matrix, by key. dtype: the model's, for its JSON."""
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
        raw |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        raw["nested_offset"] = weight.nested_offset.item()
    text = json.dumps(raw).encode("utf-8")
    state = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return {**tensors, f"{name}.quant_state.{_PREFIX}{weight.quant_type}": state}


def _damaged(what: str) -> UserError:
    return UserError(f"{what}. The file is damaged: copy or download it again")
