"""Public functions: SwiGLU of concatenated gate and up, and its backward pass in place."""

from minisft.kernels._impl import use_triton
from minisft.kernels.low_rank import empty_rows
from minisft.kernels.swiglu.reference import Three, swiglu_backward_reference_, swiglu_reference
from torch import Tensor


def swiglu(gate_up: Tensor, F: int, *, extra: int = 0, impl: str = "auto") -> Tensor:
    """Return silu(gate) * up, [T, F + extra], in the dtype of gate_up.

    gate_up: [T, >= 2F], gate in the first F columns, up in the next; columns contiguous. The last
    `extra` columns of the result are uninitialised. Source: arXiv:2002.05202.
    """
    T = gate_up.shape[0]
    out = empty_rows(T, F + extra, gate_up)
    if not use_triton(gate_up, impl):
        out[:, :F] = swiglu_reference(gate_up, F)
        return out
    from minisft.kernels.swiglu.kernel import launch_swiglu

    launch_swiglu(gate_up, F, out)
    return out


def swiglu_backward_(
    gate_up: Tensor,
    da_TF: Tensor,
    *,
    lefts: Three = (None, None, None),
    partials: Three = (None, None, None),
    impl: str = "auto",
) -> None:
    """Overwrite gate and up with their gradients, given da [T, F], the gradient of silu(gate) * up.

    lefts: u = x A^T of gate and of up, t = dy B of down, each [T, R] or None. partials, one per
    left: overwritten with dB of gate and up, float32 [S, F, R], and dA of down, float32 [S, R, F],
    over S splits of the tokens. The sums use values that are already in registers, which saves
    loading them again. Raises ValueError if a left has no partial or a partial has no left.
    """
    for left, partial in zip(lefts, partials, strict=True):
        if (left is None) != (partial is None):
            raise ValueError("swiglu_backward_: every left needs its partial, and only those")
    if not use_triton(gate_up, impl):
        swiglu_backward_reference_(gate_up, da_TF, lefts, partials)
        return
    from minisft.kernels.swiglu.kernel import launch_swiglu_backward

    launch_swiglu_backward(gate_up, da_TF, lefts, partials)
