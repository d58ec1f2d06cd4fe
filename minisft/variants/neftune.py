"""NEFTune: uniform noise on the input embeddings during training (arXiv:2310.05914).

T tokens  D hidden
"""

import torch
from torch import Tensor


def embedding_noise(
    bits_TD: Tensor, lengths: tuple[int, ...], alpha: float, dtype: torch.dtype
) -> Tensor:
    """Return noise for the embeddings, [T, D] in dtype, uniform in +-alpha / sqrt(L * D).

    bits_TD: int64, 24 random bits per entry. lengths: tokens per document, with sum T. L: the
    length of the document that contains the token.
    """
    T, D = bits_TD.shape
    # L is the length of the document and not of a padded or packed row, so that the noise of a
    # token does not depend on which documents share its micro-batch.
    lengths_N = torch.tensor(lengths, device=bits_TD.device)
    # Without output_size, torch would wait for the device to read the sum of the lengths.
    length_T = lengths_N.repeat_interleave(lengths_N, output_size=T)
    bound_T1 = alpha / (length_T * D).float().sqrt().unsqueeze(1)
    uniform_TD = bits_TD.float() / 2**24
    return ((2 * uniform_TD - 1) * bound_T1).to(dtype)
