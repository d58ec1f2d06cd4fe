"""NEFTune: uniform noise on the input embeddings during training (arXiv:2310.05914).

T tokens  D hidden
"""

import torch
from torch import Tensor


def embedding_noise(
    bits_TD: Tensor, lengths: tuple[int, ...], alpha: float, dtype: torch.dtype
) -> Tensor:
    """Return noise for the embeddings, [T, D] in dtype, uniform in +-alpha / sqrt(L * D).

    bits_TD: int64, 24 random bits per entry. lengths: tokens per document, their sum is T; L is the
    length of the token's own document.
    """
    T, D = bits_TD.shape
    # L is per document, not per padded row or packed row: the noise of a token must not depend on
    # which documents share its micro-batch.
    lengths_N = torch.tensor(lengths, device=bits_TD.device)
    # output_size saves a device sync: without it the sum of the lengths is read back.
    length_T = lengths_N.repeat_interleave(lengths_N, output_size=T)
    bound_T1 = alpha / (length_T * D).float().sqrt().unsqueeze(1)
    uniform_TD = bits_TD.float() / 2**24
    return ((2 * uniform_TD - 1) * bound_T1).to(dtype)
