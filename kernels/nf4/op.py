"""The public functions: Triton on a GPU, the reference elsewhere, or as `impl` says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from minisft.kernels.low_rank.op import as_one_stack, place_block_diagonal
from minisft.kernels.nf4.reference import NF4Weight, dequantize_reference
from torch import Tensor


def dequantize(
    weight: NF4Weight, dtype: torch.dtype, *, impl: str = "auto", pdl: bool = False
) -> Tensor:
    """The matrix [O, I] in `dtype` (bfloat16, float16 or float32), bit for bit bitsandbytes'.

    impl: "triton", "reference", or "auto" (triton for CUDA tensors). Raises ValueError for another.
    pdl: as for `dequantize_into`.
    """
    if _impl(weight, impl) == "reference":
        return dequantize_reference(weight, dtype)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    dequantize_into(weight, out, impl=impl, pdl=pdl)
    return out


def dequantize_into(
    weight: NF4Weight, out: Tensor, *, impl: str = "auto", pdl: bool = False
) -> None:
    """Decode into `out` [O, I], a view whose rows may be strided and whose columns are contiguous.

    Writes straight into the buffer (and column range) that a matrix product reads. pdl: nothing
    still under way on the GPU writes `weight`, as is true of frozen weights in a step, so that it
    may be read while the kernels before still run (faster on GPUs from compute capability 9 on,
    without effect elsewhere). Raises ValueError if out's shape or strides do not fit.
    """
    if tuple(out.shape) != weight.shape or (out.shape[1] > 1 and out.stride(1) != 1):
        raise ValueError(
            f"dequantize_into: out is {tuple(out.shape)} with strides {out.stride()}; expected "
            f"{weight.shape} with contiguous columns"
        )
    if _impl(weight, impl) == "reference":
        out.copy_(dequantize_reference(weight, out.dtype))
        return
    from minisft.kernels.nf4.kernel import launch_dequantize

    launch_dequantize(weight, out, pdl)


def dequantize_concat_rows_A(
    weight: NF4Weight, A_RI: Tensor, scale: float, out: Tensor, *, impl: str = "auto",
    pdl: bool = False,
) -> None:  # fmt: skip
    """out = [W; scale * A], [O + R, I], contiguous; A: [R, I] contiguous, in out's dtype.

    pdl: as for `dequantize_into`; of `weight` alone, A may be written just before.
    """
    O = weight.shape[0]
    if _impl(weight, impl) == "triton":
        from minisft.kernels.nf4.kernel import is_wide, launch_dequantize_with_lora

        if is_wide(weight):
            launch_dequantize_with_lora(weight, out, A_RI, scale, True, (O,), A_RI.shape[0], pdl)
            return
    dequantize_into(weight, out[:O], impl=impl, pdl=pdl)
    torch.mul(A_RI, scale, out=out[O:])


def dequantize_concat_columns_B(
    weight: NF4Weight, Bs: Sequence[Tensor | None], sizes: Sequence[int], scale: float, out: Tensor,
    *, impl: str = "auto", pdl: bool = False,
) -> None:  # fmt: skip
    """out = [W, scale * B], [O, I + R]: B block diagonal, of linears with `sizes` rows each.

    Bs: [size, R_j] each, contiguous, or None for a linear without one; R is the sum of the R_j. One
    launch where at most three B of one rank are as_one_stack in memory. pdl: as above.
    """
    I = weight.shape[1]
    if _impl(weight, impl) == "triton" and (first := as_one_stack(Bs)) is not None:
        from minisft.kernels.nf4.kernel import is_wide, launch_dequantize_with_lora

        if is_wide(weight):
            rank = first.shape[1]
            launch_dequantize_with_lora(weight, out, first, scale, False, tuple(sizes), rank, pdl)
            return
    dequantize_into(weight, out[:, :I], impl=impl, pdl=pdl)
    place_block_diagonal(Bs, sizes, scale, out[:, I:])


def _impl(weight: NF4Weight, impl: str) -> str:
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl is {impl!r}; expected auto, triton or reference")
    if impl == "auto":
        return "triton" if weight.packed.is_cuda else "reference"
    return impl
