"""The public functions: Triton on a GPU, the reference elsewhere, or as `impl` says."""

from __future__ import annotations

import torch
from minisft.kernels._impl import use_triton
from minisft.kernels.adamw.reference import adamw_reference_, global_norm_reference
from torch import Tensor


def global_norm(grads_n: Tensor, *, impl: str = "auto") -> Tensor:
    """L2 norm of a flat float32 gradient, [] float32, the same bits in every run.

    impl: "triton", "reference", or "auto" (triton for CUDA tensors). Raises ValueError where the
    gradient is not contiguous float32 [n].
    """
    if grads_n.dim() != 1 or grads_n.dtype != torch.float32 or not grads_n.is_contiguous():
        raise ValueError(
            f"global_norm: the gradient is {grads_n.dtype} {tuple(grads_n.shape)} with strides "
            f"{grads_n.stride()}; expected contiguous float32 [n]"
        )
    if not use_triton(grads_n, impl):
        return global_norm_reference(grads_n)
    from minisft.kernels.adamw.kernel import launch_global_norm

    return launch_global_norm(grads_n)


def adamw_(
    p_n: Tensor,
    g_n: Tensor,
    m_n: Tensor,
    v_n: Tensor,
    *,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    norm: Tensor | None = None,
    max_norm: float = 0.0,
    impl: str = "auto",
) -> None:
    """One step of AdamW in place: parameters p and the moments m and v; all float32 [n].

    step counts from 1. norm: [] float32 of the whole gradient, which is then read as scaled by
    max_norm / (norm + 1e-6), at most 1; g itself stays as it is. None: no clipping. Raises
    ValueError where the four differ in length or are not contiguous float32.
    """
    for x in (p_n, g_n, m_n, v_n):
        if x.shape != p_n.shape or x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(
                f"adamw_: a tensor is {x.dtype} {tuple(x.shape)}; expected contiguous float32 "
                f"{tuple(p_n.shape)}, as p is"
            )
    numbers = (step, learning_rate, beta1, beta2, eps, weight_decay, norm, max_norm)
    if not use_triton(p_n, impl):
        adamw_reference_(p_n, g_n, m_n, v_n, *numbers)
        return
    from minisft.kernels.adamw.kernel import launch_adamw_

    launch_adamw_(p_n, g_n, m_n, v_n, *numbers)
