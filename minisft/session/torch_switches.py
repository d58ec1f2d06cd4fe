"""Switches of torch that hold for the length of a run and are restored after it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

from minisft.config.errors import UserError

# --attn-implementation -> (torch's name for it, the module that the package installs)
_PACKAGES = {
    "flash_attention_3": ("FA3", "flash_attn_interface"),
    "flash_attention_4": ("FA4", "flash_attn.cute.interface"),
}


@contextmanager
def flash_attention(implementation: str, device: torch.device) -> Iterator[None]:
    """Make torch's flash attention call an installed package; `auto` keeps torch's own.

    implementation: the value of --attn-implementation. Raises UserError if the package cannot be
    imported or the device is not a GPU.
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
