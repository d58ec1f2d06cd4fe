"""The device and dtype of a run, and how much memory is in use there."""

from __future__ import annotations

import math
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from minisft.config.errors import UserError


def peak_memory_gib(device: torch.device) -> float:
    """Most memory so far: allocated on the GPU, or resident of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with suppress(OSError):  # Linux: getrusage counts what the process that started this one held
        status = Path("/proc/self/status").read_text()
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):
            return int(found[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def memory_gib(device: torch.device) -> float:
    """Memory in use: allocated on the GPU, or resident of the process on CPU (nan: not told)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return math.nan
    return pages * resource.getpagesize() / 2**30


def resolve_device(name: str) -> torch.device:
    """--device as a torch.device; auto takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device is {name!r}; expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device is {name!r}; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(
                f"--device is {name!r}, but torch sees {count} CUDA devices; use --device cpu"
            )
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """--dtype as a torch.dtype; auto: bfloat16 or float16 by the GPU, float32 on CPU."""
    if name not in ("auto", "bfloat16", "float16", "float32"):
        raise UserError(f"--dtype is {name!r}; expected one of auto, bfloat16, float16, float32")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    return (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    )
