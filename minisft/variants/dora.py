"""DoRA: a trained magnitude for every output row of an adapted linear (arXiv:2402.09353).

y = x V^T * ratio + b, where V = W + scaling * B A, ratio = magnitude / |V|, and |V| is the L2 norm
of each row of V. V is computed for its row norms only; x V^T is computed from W, A and B.

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

    weight: [O, I]; a 4-bit weight is decoded to dtype. A, B and magnitude: the trained float32
    tensors, of which only the magnitude gets a gradient.
    """
    # As in PEFT and section 4.3 of the paper, the row norms are constants in the backward pass, so
    # that autograd saves no [O, I] matrix.
    with torch.no_grad():
        W_OI = dequantize(weight, dtype) if isinstance(weight, NF4Weight) else weight
        length_O = (W_OI.float() + scaling * (B_OR @ A_RI)).norm(dim=1)
    return (magnitude_O / length_O).to(dtype)


def rescale(
    y_TO: Tensor, update_TO: Tensor, ratio_O: Tensor, dropped_y_TO: Tensor | None
) -> Tensor:
    """Return the DoRA output before the bias, [T, O], from y = x W^T, LoRA update and ratio.

    dropped_y_TO: x W^T computed from x after dropout; None without dropout.
    """
    if dropped_y_TO is None:
        return (y_TO + update_TO) * ratio_O
    # As in PEFT, dropout applies to the change of the pretrained output, (ratio - 1) * x W^T, but
    # not to the pretrained output x W^T.
    return y_TO + (ratio_O - 1) * dropped_y_TO + ratio_O * update_TO
