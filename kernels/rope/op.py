"""The public functions: Triton on a GPU, the reference elsewhere, or as `impl` says."""

from __future__ import annotations

from minisft.kernels._impl import use_triton
from minisft.kernels.rope.reference import rope_backward_reference, rope_reference_
from torch import Tensor

_Three = tuple[Tensor | None, Tensor | None, Tensor | None]


def rope_(qk: Tensor, cos_TH: Tensor, sin_TH: Tensor, heads: int, *, impl: str = "auto") -> None:
    """In place: turn the first `heads` heads of every row by the token's angles.

    qk: [T, >= heads * H], the heads of q, then of k; further columns are left alone. cos and sin:
    [T, H], both halves alike. H is a power of two, at least 32. Source: arXiv:2104.09864, in the
    order of halves that Llama's weights have.
    """
    if not use_triton(qk, impl):
        rope_reference_(qk, cos_TH, sin_TH, heads)
        return
    from minisft.kernels.rope.kernel import launch_rope

    launch_rope(qk, cos_TH, sin_TH, heads)


def rope_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    cos_TH: Tensor,
    sin_TH: Tensor,
    out: Tensor,
    *,
    us: _Three = (None, None, None),
    partials: _Three = (None, None, None),
    impl: str = "auto",
) -> None:
    """Gradients of the projections' outputs from those of the turned q, k and v.

    grads: [T, N, H], [T, K, H], [T, K, H], last dimension contiguous. out: [T, (N + 2K) H],
    written. us: x A^T of each projection [T, R]; partials: float32 [S, O, R], overwritten with
    dB = dy^T u in S ordered splits of the tokens, [O, R] contiguous.
    """
    if not use_triton(out, impl):
        rope_backward_reference(grads, us, cos_TH, sin_TH, out, partials)
        return
    from minisft.kernels.rope.kernel import launch_rope_backward

    launch_rope_backward(grads, us, cos_TH, sin_TH, out, partials)
