"""Specification of the SwiGLU kernels in plain torch.

minisft's model is defined by nn.swiglu, which rounds silu(gate) before the product and equals
transformers bit for bit. These functions compute in float32 and round once, as the kernels do.

T tokens  F ffn  R rank  S splits of the tokens
"""

import torch
from minisft.kernels.low_rank.reference import outer_sum_reference
from torch import Tensor

Three = tuple[Tensor | None, Tensor | None, Tensor | None]


def swiglu_reference(gate_up: Tensor, F: int) -> Tensor:
    """Return silu(gate) * up, computed in float32 and rounded once to the dtype of gate_up."""
    g, u = gate_up[:, :F].float(), gate_up[:, F : 2 * F].float()
    return (g * torch.sigmoid(g) * u).to(gate_up.dtype)


def swiglu_backward_reference_(
    gate_up: Tensor, da_TF: Tensor, lefts: Three, partials: Three
) -> None:
    """Overwrite gate and up with their gradients; write dB (gate, up) and dA (down) to partials."""
    F = da_TF.shape[1]
    gate, up = gate_up[:, :F], gate_up[:, F : 2 * F]
    g, u, da = gate.float(), up.float(), da_TF.float()
    sigmoid = torch.sigmoid(g)
    silu = g * sigmoid
    dg = da * u * (sigmoid + silu * (1 - sigmoid))
    if lefts[2] is not None and partials[2] is not None:
        a = (silu * u).to(gate_up.dtype)
        outer_sum_reference(lefts[2], a, None, None, partials[2])
    gate.copy_(dg)
    up.copy_(da * silu)
    for x, left, partial in zip((gate, up), lefts[:2], partials[:2], strict=True):
        if left is not None and partial is not None:
            outer_sum_reference(left, x, None, None, partial.transpose(1, 2))
