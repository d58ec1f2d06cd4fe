"""Choose between an op's Triton kernel and its plain-torch reference."""

from torch import Tensor


def use_triton(x: Tensor, impl: str) -> bool:
    """Return True if `impl` ("auto", "triton" or "reference") selects Triton for this tensor.

    "auto" selects Triton for CUDA tensors. Raises ValueError for any other value of `impl`.
    """
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl is {impl!r}; expected auto, triton or reference")
    return x.is_cuda if impl == "auto" else impl == "triton"
