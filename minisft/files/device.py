"""Resolve --device and --dtype, and measure the memory in use."""

import math
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from minisft.config.errors import UserError


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far in GiB: allocated on the GPU, or the process's RSS on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # On Linux, getrusage's peak includes memory of the parent process, so read VmHWM instead.
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):
            return int(found[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, others KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def memory_gib(device: torch.device) -> float:
    """Return the memory in use in GiB: allocated on the GPU, or RSS on CPU (nan if unknown)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return math.nan
    return pages * resource.getpagesize() / 2**30


def resolve_device(name: str) -> torch.device:
    """Return --device as a torch.device; auto selects a GPU if there is one.

    Raises UserError for a device other than CPU or CUDA, and for a GPU that torch does not see.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    refusal = UserError(f"--device is {name!r}; expected auto, cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise refusal from None
    if device.type not in ("cpu", "cuda"):
        raise refusal
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        problem = f"but torch sees {count} CUDA devices; use --device cpu"
        raise UserError(f"--device is {name!r}, {problem}")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return --dtype as a torch.dtype; auto: float32 on CPU, bfloat16 or float16 on a GPU."""
    if name not in ("auto", "bfloat16", "float16", "float32"):
        raise UserError(f"--dtype is {name!r}; expected one of auto, bfloat16, float16, float32")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    # GPUs below compute capability 8.0 only emulate bfloat16, so use float16 on them.
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16
