"""Global settings of torch, changed for one run: deterministic algorithms, flash attention."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

from minisft.config.errors import UserError

# --attn-implementation -> (torch's name of the implementation, module of its package)
_PACKAGES = {
    "flash_attention_3": ("FA3", "flash_attn_interface"),
    "flash_attention_4": ("FA4", "flash_attn.cute.interface"),
}


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """If on, restrict torch to algorithms that give the same bits in every process."""
    # Return early: even use_deterministic_algorithms(False) loads the compiler, which uses /tmp.
    if not on:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    # cuBLAS reads this variable once, at the first use of the GPU. Respect the user's value.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def flash_attention(implementation: str, device: torch.device) -> Iterator[None]:
    """Replace torch's flash attention by another implementation; `auto` changes nothing.

    Raises UserError if its package cannot be imported or the device is not a CUDA GPU.
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
