"""Public functions: rotate queries and keys (RoPE), and rotate their gradients back."""

from minisft.kernels._impl import use_triton
from minisft.kernels.rope.reference import Three, rope_backward_reference, rope_reference_
from torch import Tensor


def rope_(qk: Tensor, cos_TH: Tensor, sin_TH: Tensor, heads: int, *, impl: str = "auto") -> None:
    """Rotate the first `heads` heads of every row of qk in place by the token's angles.

    qk: [T, >= heads * H], heads of q followed by heads of k; further columns are not changed. cos,
    sin: [T, H], both halves equal. H: a power of two, at least 32. Source: arXiv:2104.09864, but
    with the pairs (i, i + H/2) that Llama uses.
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
    us: Three = (None, None, None),
    partials: Three = (None, None, None),
    impl: str = "auto",
) -> None:
    """Write the gradients dy of the q, k and v projections' outputs, and optionally LoRA's dB.

    grads: gradients of rotated q, rotated k and v, [T, N, H], [T, K, H], [T, K, H], last dimension
    contiguous. out: [T, (N + 2K) H], overwritten with dy. us: x A^T of each projection [T, R].
    partials: float32 [S, O, R], overwritten with dy^T u of each of S splits; [O, R] contiguous.
    """
    if not use_triton(out, impl):
        rope_backward_reference(grads, us, cos_TH, sin_TH, out, partials)
        return
    from minisft.kernels.rope.kernel import launch_rope_backward

    launch_rope_backward(grads, us, cos_TH, sin_TH, out, partials)
