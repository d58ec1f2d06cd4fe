"""The public functions: Triton on a GPU, the reference elsewhere, or as `impl` says."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.nf4.reference import NF4Weight, dequantize_reference


def dequantize(weight: NF4Weight, dtype: torch.dtype, *, impl: str = "auto") -> Tensor:
    """The matrix [O, I] in `dtype` (bfloat16, float16 or float32), bit for bit bitsandbytes'.

    impl: "triton", "reference", or "auto" (triton for CUDA tensors). Raises ValueError for another.
    """
    if _impl(weight, impl) == "reference":
        return dequantize_reference(weight, dtype)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    dequantize_into(weight, out, impl=impl)
    return out


def dequantize_into(weight: NF4Weight, out: Tensor, *, impl: str = "auto") -> None:
    """Decode into `out` [O, I], a view whose rows may be strided and whose columns are contiguous.

    Writes straight into the buffer (and column range) that a matrix product reads. Raises
    ValueError if out's shape or strides do not fit.
    """
    if tuple(out.shape) != weight.shape or (out.shape[1] > 1 and out.stride(1) != 1):
        raise ValueError(
            f"dequantize_into: out is {tuple(out.shape)} with strides {out.stride()}; expected "
            f"{weight.shape} with contiguous columns"
        )
    if _impl(weight, impl) == "reference":
        out.copy_(dequantize_reference(weight, out.dtype))
        return
    from kernels.nf4.kernel import launch_dequantize

    launch_dequantize(weight, out)


def _impl(weight: NF4Weight, impl: str) -> str:
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl is {impl!r}; expected auto, triton or reference")
    if impl == "auto":
        return "triton" if weight.packed.is_cuda else "reference"
    return impl
