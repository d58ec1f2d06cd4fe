"""Trained token rows against a copy of the whole embedding with those rows replaced."""

import pytest
import torch

from minisft.variants.token_rows import replace_embeddings, replace_head_rows

IDS = torch.tensor([7, 0, 19])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lookup_equals_that_in_the_replaced_matrix(dtype):
    """Values and gradients, for tokens that occur twice, once and never."""
    generator = torch.Generator().manual_seed(0)
    matrix_VD = torch.randn(20, 6, generator=generator).to(dtype)
    rows_ND = torch.randn(3, 6, generator=generator).requires_grad_()
    tokens_T = torch.tensor([7, 3, 19, 7, 11])
    dy_TD = torch.randn(5, 6, generator=generator).to(dtype)
    whole_VD = replace_head_rows(matrix_VD, IDS, rows_ND)
    assert torch.equal(whole_VD[IDS], rows_ND.to(dtype)) and torch.equal(whole_VD[1], matrix_VD[1])
    found_TD = replace_embeddings(matrix_VD[tokens_T], tokens_T, IDS, rows_ND)
    assert found_TD.dtype == dtype and torch.equal(found_TD, whole_VD[tokens_T])
    (want,) = torch.autograd.grad(whole_VD[tokens_T], rows_ND, dy_TD)
    (got,) = torch.autograd.grad(found_TD, rows_ND, dy_TD)
    assert torch.allclose(got, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert not got[1].any() and got[0].any() and got[2].any()
