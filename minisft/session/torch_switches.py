"""Switches inside torch that hold for one run: deterministic algorithms, flash attention."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

from minisft.config.errors import UserError

# --attn-implementation -> (torch's name of it, the module that its package installs)
_PACKAGES = {
    "flash_attention_3": ("FA3", "flash_attn_interface"),
    "flash_attention_4": ("FA4", "flash_attn.cute.interface"),
}


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """With --deterministic, torch uses only algorithms that give the same bits in every process."""
    # Even setting it to False loads torch's compiler, which writes to /tmp.
    if not on:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    # cuBLAS reads this variable once, when the process first uses the GPU. A value that the user
    # has set stays.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def flash_attention(implementation: str, device: torch.device) -> Iterator[None]:
    """Replace torch's own flash attention by the named package's; `auto` keeps torch's own.

    Raises UserError if the package cannot be imported or the device is not a GPU.
    """
    if implementation == "auto":
        yield
        return
    name, module = _PACKAGES[implementation]
    what = f"--attn-implementation {implementation}"
    if device.type != "cuda":
        raise UserError(f"{what} needs a CUDA GPU, but the device is {device}; leave it out")
    try:
        importlib.import_module(module)
        activate_flash_attention_impl(name)
    except (ImportError, OSError, RuntimeError) as e:
        raise UserError(
            f"{what}: its package {module} cannot be used ({type(e).__name__}: {e}); install a "
            "build for this torch, or leave the flag out"
        ) from None
    try:
        yield
    finally:
        restore_flash_attention_impl()
