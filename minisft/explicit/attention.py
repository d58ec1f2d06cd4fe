"""Attention with a separate backward function, which takes all saved tensors as arguments.

T concatenated tokens of all documents  N query heads  K key/value heads  H head_dim
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minisft.nn import Documents, packed_attention

aten = torch.ops.aten


class Attended(NamedTuple):
    """Attention output and what else its backward pass reads, except q, k and v."""

    out_TNH: Tensor
    lse: Tensor | None  # float32: log-sum-exp of the scores; None from sdpa
    state: tuple = ()  # the backend's random state, and cuDNN's sequence offsets


def backend_of(q_TNH: Tensor, documents: Documents) -> str:
    """Return the attention backend: "cudnn", "flash" or "sdpa".

    Half precision on a GPU: cudnn if all documents are equally long, else flash. Otherwise sdpa.
    """
    if not q_TNH.is_cuda or q_TNH.dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    # cuDNN is 1.5 to 1.8 times as fast as flash on documents of one length (H200). For documents of
    # different lengths it builds a plan in each call (10 ms on the host) that no graph can capture.
    return "cudnn" if documents.uniform else "flash"


def attend(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, documents: Documents) -> Attended:
    """Compute causal attention inside each document; return out [T, N, H] and backward's inputs.

    Rows of q, k and v may be strided. Flash attention requires that each row starts at a multiple
    of 16 bytes, and does not check it (`empty_rows` aligns rows).
    """
    backend = backend_of(q_TNH, documents)
    if backend == "cudnn":
        q, k, v = (_batched(x, documents.uniform) for x in (q_TNH, k_TKH, v_TKH))
        # arguments after v: attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask
        out, lse, cu_q, cu_k, max_q, max_k, seed, offset, _ = (
            aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False)
        )
        return Attended(_flat(out), lse, (cu_q, cu_k, max_q, max_k, seed, offset))
    if backend == "flash":
        cu, longest = documents.cu_seqlens, documents.longest
        out, lse, seed, offset, _ = aten._flash_attention_forward(
            q_TNH, k_TKH, v_TKH, cu, cu, longest, longest, 0.0, True, False
        )
        return Attended(out, lse, (seed, offset))
    with torch.no_grad():
        return Attended(packed_attention(q_TNH, k_TKH, v_TKH, documents), None)


def attend_backward(
    do_TNH: Tensor, qkv: tuple[Tensor, Tensor, Tensor], attended: Attended, documents: Documents
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; uses the backend that `attend` chose."""
    backend = backend_of(qkv[0], documents)
    if backend == "cudnn":
        do, q, k, v, out = (
            _batched(x, documents.uniform) for x in (do_TNH, *qkv, attended.out_TNH)
        )
        cu_q, cu_k, max_q, max_k, seed, offset = attended.state
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            do, q, k, v, out, attended.lse, seed, offset, None, cu_q, cu_k, max_q, max_k, 0.0, True
        )
        dq, dk, dv = (_flat(g) for g in grads)
        return dq, dk, dv
    if backend == "flash":
        cu, longest = documents.cu_seqlens, documents.longest
        seed, offset = attended.state
        return aten._flash_attention_backward(
            do_TNH, *qkv, attended.out_TNH, attended.lse, cu, cu, longest, longest,
            0.0, True, seed, offset,
        )  # fmt: skip
    # sdpa is the slow path: run forward again and let autograd differentiate it.
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in qkv)
        out = packed_attention(q, k, v, documents)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), do_TNH)
        return dq, dk, dv


def _batched(x_TNH: Tensor, length: int) -> Tensor:
    """View [T, N, H] as [batch, N, length, H]."""
    return x_TNH.unflatten(0, (-1, length)).transpose(1, 2)


def _flat(x_BNSH: Tensor) -> Tensor:
    """Reshape [batch, N, length, H] to [T, N, H]; copies if the memory layout forbids a view."""
    return x_BNSH.transpose(1, 2).flatten(0, 1)
