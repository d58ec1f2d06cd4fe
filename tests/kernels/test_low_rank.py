"""Sums over tokens of outer products, against float64 and in a fixed order."""

import numpy as np
import pytest
import torch
from fused import DEVICE, DTYPES, close, poisoned, rand, wide
from minisft.kernels import _triton
from minisft.kernels.low_rank import narrow_products, outer_sum, reduce_partials
from minisft.kernels.low_rank.op import as_one_stack


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "T, R, N, splits",
    [(130, 3, 70, 2), (64, 16, 64, 8), (1, 1, 1, 1), (200, 40, 33, 3), (130, 256, 70, 2)],
)
@pytest.mark.parametrize("scaled", [False, True])
def test_outer_sum(T, R, N, splits, dtype, scaled):
    left, x = wide(rand(T, R, dtype=dtype)), wide(rand(T, N, dtype=dtype, seed=1))
    row = rand(T, seed=2).abs() if scaled else None
    column = rand(N, dtype=dtype, seed=3) if scaled else None
    truth = left.double().T @ (x.double() if row is None else x.double() * row.double()[:, None])
    truth = truth if column is None else truth * column.double()
    found = []
    for impl in ("triton", "reference"):
        partials = poisoned(splits, R, N)
        outer_sum(left, x, partials, row_scale_T=row, column_scale_N=column, impl=impl)
        grads = torch.ones(R * N, device=x.device)
        reduce_partials(partials.flatten(1), grads, 2.0, impl=impl)
        found.append((grads - 1) / 2)
    close(*found, truth.flatten())


def test_a_transposed_view_of_the_partials_is_filled():
    left, x = rand(70, 4), rand(70, 6, seed=1)
    partials = poisoned(2, 6, 4)
    outer_sum(left, x, partials.transpose(1, 2), impl="triton")
    close(partials.sum(0), x.T @ left, x.double().T @ left.double())


def test_the_same_bits_every_time():
    left, x = rand(300, 8), rand(300, 40, seed=1)
    runs = []
    for _ in range(2):
        partials = poisoned(4, 8, 40)
        outer_sum(left, x, partials, impl="triton")
        runs.append(partials)
    assert torch.equal(*runs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "T, sizes, R",
    [
        (1, (64,), 1),
        (130, (70,), 16),
        (33, (128, 200), 3),
        (100, (64, 32, 32), 16),
        (40, (30,), 64),
    ],
)
def test_narrow_products(T, sizes, R, dtype):
    N = sum(sizes)
    x, stacked = wide(rand(T, N + 7, dtype=dtype)), rand(N, R, dtype=dtype, seed=1)
    rights = stacked.split(sizes)
    pairs = zip(x[:, :N].split(sizes, 1), rights, strict=True)
    truth = torch.cat([a.double() @ b.double() for a, b in pairs], 1)
    found = []
    for impl in ("triton", "reference"):
        out = poisoned(T, len(sizes) * R + 9, dtype=dtype)
        narrow_products(x, rights, sizes, out[:, 5 : 5 + len(sizes) * R], impl=impl)
        assert out[:, :5].isnan().all() and out[:, 5 + len(sizes) * R :].isnan().all()
        found.append(out[:, 5 : 5 + len(sizes) * R])
    close(*found, truth)


def test_narrow_products_of_a_matrix_that_is_missing_or_elsewhere():
    x, B = rand(50, 96), rand(32, 4, seed=2)
    for rights in ((B, None, B), (B, B.clone(), rand(32, 2, seed=3)), (None, None, B)):
        there = [b for b in rights if b is not None]
        out = poisoned(50, sum(b.shape[1] for b in there))
        narrow_products(x, rights, (32, 32, 32), out, impl="triton")
        parts = x.double().split(32, 1)
        expected = [p @ b.double() for p, b in zip(parts, rights, strict=True) if b is not None]
        assert torch.allclose(out.double(), torch.cat(expected, 1), atol=1e-4)


def test_one_stack_lies_in_one_storage():
    """Next to each other in memory is not enough: a view of both would leave its storage."""
    both = np.zeros((64, 4), dtype=np.float32)
    x, y = torch.from_numpy(both[:32]), torch.from_numpy(both[32:])
    assert y.data_ptr() == x.data_ptr() + x.nbytes and as_one_stack((x, y)) is None
    whole = torch.from_numpy(both)
    joined = as_one_stack(whole.split((31, 1, 32)))
    assert joined is not None and joined.data_ptr() == whole.data_ptr() and joined.shape == (64, 4)
    assert as_one_stack((whole[:8], whole[9:])) is None and as_one_stack(whole.split(16)) is None


def test_narrow_products_of_a_large_rank_and_of_one_matrix():
    x, B = rand(20, 64), rand(64, 65, seed=1)
    for rights, sizes in (((B,), (64,)), (B.split(32), (32, 32))):
        out = poisoned(20, 65 * len(sizes))
        narrow_products(x, rights, sizes, out)
        pairs = zip(x.double().split(sizes, 1), rights, strict=True)
        expected = torch.cat([a @ b.double() for a, b in pairs], 1)
        assert torch.allclose(out.double(), expected, atol=1e-4)


def test_what_does_not_fit_is_refused():
    rights = (rand(4, 2), rand(4, 2))
    for columns, sizes, width in ((7, (4, 4), 4), (8, (3, 5), 4), (8, (4, 4), 3)):
        with pytest.raises(ValueError, match="narrow_products: x"):
            narrow_products(rand(5, columns), rights, sizes, poisoned(5, width))
    with pytest.raises(ValueError, match="outer_sum: left"):
        outer_sum(rand(4, 2), rand(5, 3), poisoned(1, 2, 3))
    with pytest.raises(ValueError, match="impl is 'fast'"):
        outer_sum(rand(4, 2), rand(4, 3), poisoned(1, 2, 3), impl="fast")


@pytest.mark.parametrize(
    "kib, rank, expected",
    [(227, 256, 3), (163, 256, 3), (99, 16, 2), (99, 64, 2), (99, 128, 1), (64, 16, 1)],
)
def test_fewer_pipeline_stages_with_little_shared_memory(kib, rank, expected, monkeypatch):
    """What fits was read from the kernels as compiled for 8.0, 8.9, 9.0 and 12.0."""
    monkeypatch.setattr(_triton, "shared_memory", lambda device: kib << 10)
    assert _triton.stages(torch.device(DEVICE), rank) == expected
