"""Attention with its backward pass by hand: what is kept is named, and each backend is measured.

T tokens (documents side by side)  N query heads  K key/value heads  H head_dim
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

from minisft.config.errors import UserError
from minisft.nn import Documents, packed_attention

aten = torch.ops.aten


class Attended(NamedTuple):
    """The output of attention and what its backward pass needs beside q, k and v."""

    out_TNH: Tensor
    lse: Tensor | None  # log-sum-exp of the scores, float32
    state: tuple = ()  # the backend's own small tensors and numbers


class Layout(NamedTuple):
    """How the documents of a micro-batch lie, in a shape that a captured graph can keep.

    Documents beyond the real ones are empty: cu_seqlens repeats its last entry. dense: every
    document has this many tokens (0: they differ). longest: an upper bound of their lengths.
    """

    cu_seqlens: Tensor  # int32 [documents + 1]
    longest: int
    dense: int = 0


_PACKAGES = {
    "flash_attention_3": ("FA3", "flash_attn_interface"),
    "flash_attention_4": ("FA4", "flash_attn.cute.interface"),
}


@contextmanager
def flash_attention(implementation: str, device: torch.device) -> Iterator[None]:
    """Inside, torch's flash attention is that package's: `auto` is torch's own.

    UserError where the package cannot be imported, or the device is not a GPU.
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


def backend_of(q_TNH: Tensor, layout: Layout) -> str:
    """cudnn for documents of one length on a GPU, flash for others, sdpa on a CPU or in float32."""
    if not q_TNH.is_cuda or q_TNH.dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    return "cudnn" if layout.dense else "flash"


def attend(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: Layout) -> Attended:
    """Causal attention inside each document, [T, N, H]."""
    backend = backend_of(q_TNH, layout)
    if backend == "cudnn":
        q, k, v = (_dense(x, layout.dense) for x in (q_TNH, k_TKH, v_TKH))
        out, lse, cu_q, cu_k, max_q, max_k, seed, offset, _ = (
            aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False)
        )
        return Attended(_flat(out), lse, (cu_q, cu_k, max_q, max_k, seed, offset))
    if backend == "flash":
        cu, longest = layout.cu_seqlens, layout.longest
        out, lse, seed, offset, _ = aten._flash_attention_forward(
            q_TNH, k_TKH, v_TKH, cu, cu, longest, longest, 0.0, True, False
        )
        return Attended(out, lse, (seed, offset))
    with torch.no_grad():
        return Attended(packed_attention(q_TNH, k_TKH, v_TKH, _documents(layout)), None)


def attend_backward(
    do_TNH: Tensor,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    attended: Attended,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from the same backend's forward pass."""
    backend = backend_of(q_TNH, layout)
    if backend == "cudnn":
        do, q, k, v, out = (
            _dense(x, layout.dense) for x in (do_TNH, q_TNH, k_TKH, v_TKH, attended.out_TNH)
        )
        cu_q, cu_k, max_q, max_k, seed, offset = attended.state
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            do, q, k, v, out, attended.lse, seed, offset, None, cu_q, cu_k, max_q, max_k, 0.0, True
        )
        dq, dk, dv = (_flat(g) for g in grads)
        return dq, dk, dv
    if backend == "flash":
        cu, longest = layout.cu_seqlens, layout.longest
        seed, offset = attended.state
        return aten._flash_attention_backward(
            do_TNH, q_TNH, k_TKH, v_TKH, attended.out_TNH, attended.lse, cu, cu, longest, longest,
            0.0, True, seed, offset,
        )  # fmt: skip
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q_TNH, k_TKH, v_TKH))
        out = packed_attention(q, k, v, _documents(layout))
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), do_TNH)
        return dq, dk, dv


def _dense(x_TNH: Tensor, length: int) -> Tensor:
    """[T, N, H] as [batch, N, length, H], without a copy."""
    return x_TNH.unflatten(0, (-1, length)).transpose(1, 2)


def _flat(x_BNSH: Tensor) -> Tensor:
    """[batch, N, length, H] as [T, N, H]; a copy only where the layout is another."""
    return x_BNSH.transpose(1, 2).flatten(0, 1)


def _documents(layout: Layout) -> Documents:
    lengths = tuple(n for n in layout.cu_seqlens.diff().tolist() if n)
    return Documents(layout.cu_seqlens, lengths)
