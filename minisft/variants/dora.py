"""DoRA: a trained magnitude for every output row of an adapted linear (arXiv:2402.09353).

y = x V^T * ratio + b, where V = W + scaling * B A and ratio = magnitude / |V|, |V| the L2 norm of
each row of V. V itself is formed for its row norms only.

T tokens  I/O linear in/out  R LoRA rank
"""

import torch
from torch import Tensor

from minisft.kernels.nf4 import NF4Weight, dequantize


def magnitude_ratio(
    weight: Tensor | NF4Weight,
    A_RI: Tensor,
    B_OR: Tensor,
    magnitude_O: Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return magnitude / |W + scaling * B A| per output row, [O] in dtype.

    weight: [O, I]; 4 bits are decoded to dtype. A, B and magnitude are the float32 masters. The
    gradient flows to the magnitude only.
    """
    # The row norms count as constants, as in PEFT and in section 4.3 of the paper: autograd then
    # has no [O, I] matrix to save.
    with torch.no_grad():
        W_OI = dequantize(weight, dtype) if isinstance(weight, NF4Weight) else weight
        length_O = (W_OI.float() + scaling * (B_OR @ A_RI)).norm(dim=1)
    return (magnitude_O / length_O).to(dtype)


def rescale(
    y_TO: Tensor, update_TO: Tensor, ratio_O: Tensor, dropped_y_TO: Tensor | None
) -> Tensor:
    """Return the output before the bias, [T, O], from W x, the LoRA update and the ratio.

    dropped_y_TO: W times the input after dropout; None without dropout, where it is y itself.
    """
    if dropped_y_TO is None:
        return (y_TO + update_TO) * ratio_O
    # PEFT's rule: the pretrained output keeps its full input, and only the change that training
    # makes to it, (ratio - 1) W x, sees dropout.
    return y_TO + (ratio_O - 1) * dropped_y_TO + ratio_O * update_TO
