"""Public functions on flat buffers: gradient norm, and AdamW with gradient clipping."""

import torch
from minisft.kernels._impl import use_triton
from minisft.kernels.adamw.reference import AdamWStep, adamw_reference_, global_norm_reference
from torch import Tensor


def global_norm(grads_n: Tensor, *, impl: str = "auto") -> Tensor:
    """Return the L2 norm (float32 []) of a flat gradient, bit-identical in every run.

    impl: "triton", "reference", or "auto" (triton for CUDA tensors). Raises ValueError unless the
    gradient is contiguous float32 [n].
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
    settings: AdamWStep,
    *,
    norm: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Apply one step of AdamW in place to parameters p and moments m and v, given the gradient g.

    norm: float32 [], the norm of all gradients. The step uses g * min(1, max_norm / (norm + 1e-6)),
    or g if norm is None. Raises ValueError unless p, g, m and v are contiguous float32 [n].
    """
    for x in (p_n, g_n, m_n, v_n):
        if x.shape != p_n.shape or x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(
                f"adamw_: a tensor is {x.dtype} {tuple(x.shape)}; expected contiguous float32 "
                f"{tuple(p_n.shape)}, as p is"
            )
    if not use_triton(p_n, impl):
        adamw_reference_(p_n, g_n, m_n, v_n, settings, norm)
        return
    from minisft.kernels.adamw.kernel import launch_adamw_

    launch_adamw_(p_n, g_n, m_n, v_n, settings, norm)
