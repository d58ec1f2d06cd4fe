"""Public functions: decode a 4-bit weight, optionally with a LoRA factor concatenated to it."""

from collections.abc import Sequence

import torch
from minisft.kernels._impl import use_triton
from minisft.kernels.low_rank import as_one_stack, place_block_diagonal
from minisft.kernels.nf4.reference import NF4Weight, dequantize_reference
from torch import Tensor


def dequantize(
    weight: NF4Weight, dtype: torch.dtype, *, impl: str = "auto", pdl: bool = False
) -> Tensor:
    """Return the decoded matrix [O, I] (bfloat16, float16 or float32), bit-equal to bitsandbytes.

    impl: "triton", "reference", or "auto" (triton for CUDA tensors); ValueError for any other.
    pdl: as in `dequantize_into`.
    """
    if not use_triton(weight.packed, impl):
        return dequantize_reference(weight, dtype)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    dequantize_into(weight, out, impl=impl, pdl=pdl)
    return out


def dequantize_into(
    weight: NF4Weight, out: Tensor, *, impl: str = "auto", pdl: bool = False
) -> None:
    """Decode `weight` into `out` [O, I].

    out: contiguous columns; rows may be strided. pdl: use programmatic dependent launch (compute
    capability 9 and later; no effect elsewhere). `weight` is then read before the preceding kernel
    has ended, so no running kernel may write it; frozen weights satisfy this. Raises ValueError if
    the shape or strides of `out` do not match.
    """
    if tuple(out.shape) != weight.shape or (out.shape[1] > 1 and out.stride(1) != 1):
        raise ValueError(
            f"dequantize_into: out is {tuple(out.shape)} with strides {out.stride()}; expected "
            f"{weight.shape} with contiguous columns"
        )
    if not use_triton(weight.packed, impl):
        out.copy_(dequantize_reference(weight, out.dtype))
        return
    from minisft.kernels.nf4.kernel import launch_dequantize

    launch_dequantize(weight, out, pdl)


def dequantize_concat_rows_A(
    weight: NF4Weight, A_RI: Tensor, scale: float, out: Tensor, *, impl: str = "auto",
    pdl: bool = False,
) -> None:  # fmt: skip
    """Write out = [W; scale * A], [O + R, I]; out and A [R, I] contiguous, of one dtype.

    pdl: as in `dequantize_into`; a running kernel may write A, but not `weight`.
    """
    O = weight.shape[0]
    if use_triton(weight.packed, impl):
        from minisft.kernels.nf4.kernel import launch_dequantize_concat, reads_words

        if reads_words(weight):
            launch_dequantize_concat(weight, out, A_RI, scale, (O,), rows=True, pdl=pdl)
            return
    dequantize_into(weight, out[:O], impl=impl, pdl=pdl)
    torch.mul(A_RI, scale, out=out[O:])


def dequantize_concat_columns_B(
    weight: NF4Weight, Bs: Sequence[Tensor | None], sizes: Sequence[int], scale: float, out: Tensor,
    *, impl: str = "auto", pdl: bool = False,
) -> None:  # fmt: skip
    """Write the decoded W and scale * block_diag(Bs) side by side into out [O, I + R].

    Linear j has sizes[j] rows; Bs[j] is its contiguous B [sizes[j], R_j], or None if it has no
    adapter; R is the sum of the R_j. One to three Bs of equal rank, adjacent in memory, need one
    kernel launch. pdl: see `dequantize_into`.
    """
    I = weight.shape[1]
    if use_triton(weight.packed, impl) and (stack := as_one_stack(Bs)) is not None:
        from minisft.kernels.nf4.kernel import launch_dequantize_concat, reads_words

        if reads_words(weight):
            launch_dequantize_concat(weight, out, stack, scale, sizes, rows=False, pdl=pdl)
            return
    dequantize_into(weight, out[:, :I], impl=impl, pdl=pdl)
    place_block_diagonal(Bs, sizes, scale, out[:, I:])
