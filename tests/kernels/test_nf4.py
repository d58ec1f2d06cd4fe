"""4-bit weights equal to bitsandbytes' bit for bit; the kernel runs in Triton's interpreter here.

The interpreter rounds bfloat16 its own way: that dtype is checked on a GPU alone.
"""

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import bitsandbytes.functional as bnb  # noqa: E402
import numpy as np  # noqa: E402
from minisft.kernels.nf4 import (  # noqa: E402
    NF4Weight,
    dequantize,
    dequantize_concat_columns_B,
    dequantize_concat_rows_A,
    dequantize_into,
    quantize,
    reference,
    side_by_side,
)
from minisft.kernels.nf4.cases import DTYPES, SHAPES, make_weight  # noqa: E402
from minisft.kernels.nf4.reference import FP4_CODE, NF4_CODE, dynamic_map, scales  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
KERNEL_DTYPES = DTYPES if GPU else (torch.float32, torch.float16)
# bitsandbytes' CPU decode is wrong where in_features is not a multiple of 64.
BNB_SHAPES = [s for s in SHAPES if s[1] % 64 == 0]
both_codes = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
both_scales = pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])


def from_bitsandbytes(packed, state):
    nested = state.state2 if state.nested else None
    return NF4Weight(
        packed.flatten(),
        state.absmax,
        state.code.float(),
        nested.absmax if nested else None,
        nested.code if nested else None,
        state.offset if nested else None,
        tuple(state.shape),
        state.blocksize,
        state.quant_type,
    )


def test_constants_are_bitsandbytes():
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())
    for quant_type, code in (("nf4", NF4_CODE), ("fp4", FP4_CODE)):
        weight = make_weight((64, 64))
        _, state = bnb.quantize_4bit(weight, quant_type=quant_type, blocksize=64)
        assert torch.equal(torch.tensor(code, dtype=torch.float32), state.code.cpu().float())


@pytest.mark.gpu if GPU else lambda f: f
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", BNB_SHAPES, ids=str)
@both_codes
@both_scales
def test_decodes_what_bitsandbytes_wrote(double_quant, quant_type, shape, dtype):
    packed, state = bnb.quantize_4bit(
        make_weight(shape, DEVICE),
        quant_type=quant_type,
        compress_statistics=double_quant,
        blocksize=64,
    )
    state.dtype = dtype
    expected = bnb.dequantize_4bit(packed, state)
    weight = from_bitsandbytes(packed, state)
    assert torch.equal(dequantize(weight, dtype, impl="reference"), expected)
    if dtype in KERNEL_DTYPES:
        assert torch.equal(dequantize(weight, dtype, impl="triton"), expected)


@pytest.mark.parametrize("blocksize", [32, 64, 128])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s not in BNB_SHAPES], ids=str)
@both_codes
@both_scales
def test_decodes_any_shape_that_bitsandbytes_wrote(double_quant, quant_type, shape, blocksize):
    """Where its CPU decode is wrong: against the format's definition, weight by weight."""
    packed, state = bnb.quantize_4bit(
        make_weight(shape),
        quant_type=quant_type,
        compress_statistics=double_quant,
        blocksize=blocksize,
    )
    weight = from_bitsandbytes(packed, state)
    bytes_, scale = packed.flatten().numpy(), state.absmax.numpy()
    if double_quant:
        nested = state.state2.absmax.numpy()[np.arange(len(scale)) // 256]
        scale = state.state2.code.numpy()[scale] * nested + state.offset.numpy()
    code, expected = state.code.numpy().astype(np.float32), []
    for e in range(shape[0] * shape[1]):
        nibble = bytes_[e // 2] & 15 if e % 2 else bytes_[e // 2] >> 4
        expected.append(code[nibble] * scale[e // blocksize])
    expected = torch.from_numpy(np.array(expected, dtype=np.float32)).view(shape)
    for dtype in DTYPES:
        assert torch.equal(dequantize(weight, dtype, impl="reference"), expected.to(dtype))


@pytest.mark.parametrize("blocksize", [32, 64, 256])
@both_codes
def test_pieces_join_without_a_seam(quant_type, blocksize, monkeypatch):
    """A matrix of many pieces, the last one short, is that of one piece, and bitsandbytes'."""
    source = make_weight((96, 128))
    whole = quantize(source, quant_type=quant_type, blocksize=blocksize)
    monkeypatch.setattr(reference, "_PIECE", 2560)
    parts = quantize(source, quant_type=quant_type, blocksize=blocksize)
    assert all(torch.equal(a, b) for a, b in zip(whole[:6], parts[:6], strict=True))
    odd = quantize(make_weight((33, 155)), quant_type=quant_type, blocksize=blocksize)
    monkeypatch.undo()
    same = quantize(make_weight((33, 155)), quant_type=quant_type, blocksize=blocksize)
    assert all(torch.equal(a, b) for a, b in zip(odd[:6], same[:6], strict=True))


@pytest.mark.parametrize("shape", BNB_SHAPES, ids=str)
@both_codes
def test_quantises_as_bitsandbytes_on_the_cpu(quant_type, shape):
    """Codes give equal weights; scales are equal; 8-bit scales to the CPU's coarser rounding."""
    source = make_weight(shape)
    packed, state = bnb.quantize_4bit(source, quant_type=quant_type, compress_statistics=False)
    ours = quantize(source, quant_type=quant_type, double_quant=False)
    assert torch.equal(ours.absmax, state.absmax)
    theirs = dequantize(from_bitsandbytes(packed, state), torch.float32)
    assert torch.equal(dequantize(ours, torch.float32), theirs)
    _, state = bnb.quantize_4bit(source, quant_type=quant_type, compress_statistics=True)
    ours = quantize(source, quant_type=quant_type, double_quant=True)
    assert torch.equal(ours.nested_offset, state.offset)
    assert torch.equal(ours.nested_absmax, state.state2.absmax)
    # bitsandbytes rounds through a table of 65,536 bins on the CPU; here it is the nearest code.
    exact = quantize(source, quant_type=quant_type, double_quant=False).absmax
    error = (scales(ours) - exact).abs()
    assert (error <= (scales(from_bitsandbytes(packed, state)) - exact).abs() + 1e-9).all()
    assert (ours.absmax != state.absmax).float().mean() <= 0.02


@pytest.mark.gpu if GPU else lambda f: f
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@both_scales
def test_kernel_writes_its_columns_and_nothing_else(double_quant, shape, dtype):
    weight = quantize(make_weight(shape, DEVICE), double_quant=double_quant)
    buffer = torch.full((shape[0], shape[1] + 5), float("nan"), dtype=dtype, device=DEVICE)
    dequantize_into(weight, buffer[:, 2 : 2 + shape[1]], impl="triton")
    expected = dequantize(weight, dtype, impl="reference")
    assert torch.equal(buffer[:, 2 : 2 + shape[1]], expected)
    assert buffer[:, :2].isnan().all() and buffer[:, 2 + shape[1] :].isnan().all()


@both_codes
@both_scales
def test_error_is_that_of_four_bits(double_quant, quant_type):
    source = torch.randn(256, 256, generator=torch.Generator().manual_seed(3))
    weight = quantize(source, quant_type=quant_type, double_quant=double_quant)
    error = (dequantize(weight, torch.float32) - source).norm() / source.norm()
    assert error < (0.1 if quant_type == "nf4" else 0.14)
    assert weight.nbytes() < source.numel() * (0.52 if double_quant else 0.57)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="nf3"):
        quantize(torch.ones(8, 8), quant_type="nf3")
    with pytest.raises(ValueError, match=r"\(8,\)"):
        quantize(torch.ones(8))
    with pytest.raises(ValueError, match="not finite"):
        quantize(torch.full((8, 8), float("inf")))
    weight = quantize(torch.ones(8, 8))
    with pytest.raises(ValueError, match=r"\(8, 9\)"):
        dequantize_into(weight, torch.empty(8, 9))
    with pytest.raises(ValueError, match="cuda_core"):
        dequantize(weight, torch.float32, impl="cuda_core")


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("sizes", [(64, 32, 32), (100, 28), (128,), (7, 5)])
def test_lora_is_written_beside_and_below_the_matrix(sizes, impl, dtype):
    O, I, R = sum(sizes), 64, 3
    weight = quantize(make_weight((O, I), DEVICE))
    plain = dequantize(weight, dtype, impl=impl)
    B = torch.randn(O, R, device=DEVICE).to(dtype)
    A = torch.randn(len(sizes) * R, I, device=DEVICE).to(dtype)
    out = torch.full((O, I + len(sizes) * R), float("nan"), dtype=dtype, device=DEVICE)
    dequantize_concat_columns_B(weight, B.split(sizes), sizes, 0.5, out, impl=impl)
    beside = torch.block_diag(*B.split(sizes)) * 0.5
    assert torch.equal(out, torch.cat((plain, beside), 1))
    out = torch.full((O + A.shape[0], I), float("nan"), dtype=dtype, device=DEVICE)
    dequantize_concat_rows_A(weight, A, 0.5, out, impl=impl)
    assert torch.equal(out, torch.cat((plain, A * 0.5)))


def test_b_that_is_missing_or_elsewhere_is_written_too():
    weight, B = quantize(make_weight((128, 64), DEVICE)), torch.randn(64, 2, device=DEVICE)
    for Bs in ((B, None), (None, B), (B, B.clone())):
        rank = sum(b.shape[1] for b in Bs if b is not None)
        out = torch.full((128, 64 + rank), float("nan"), device=DEVICE)
        dequantize_concat_columns_B(weight, Bs, (64, 64), 1.0, out, impl="triton")
        parts = [b if b is not None else torch.zeros(64, 0, device=DEVICE) for b in Bs]
        assert torch.equal(out[:, 64:], torch.block_diag(*parts))


def test_matrices_side_by_side_decode_as_they_do_alone():
    weights = [quantize(make_weight((n, 64), DEVICE, seed=n)) for n in (256, 512, 256)]
    joined, views = side_by_side(weights)
    alone = [dequantize(w, torch.float32) for w in weights]
    for impl in ("triton", "reference"):
        assert torch.equal(dequantize(joined, torch.float32, impl=impl), torch.cat(alone))
        for view, expected in zip(views, alone, strict=True):
            assert torch.equal(dequantize(view, torch.float32, impl=impl), expected)
    assert side_by_side([quantize(make_weight((128, 64))), weights[0]]) is None  # out of step


def test_an_early_decode_waits_for_what_it_overwrites_and_for_a():
    """One buffer, written and read in turn; A and B change just before they are written there."""
    O, I, R, turns = (2048, 2048, 8, 60) if GPU else (64, 64, 4, 6)
    weights = [quantize(make_weight((O, I), DEVICE, seed=n)) for n in range(2)]
    plain = [dequantize(w, torch.float32) for w in weights]
    A, B = torch.randn(R, I, device=DEVICE), torch.randn(O, R, device=DEVICE)
    below, beside = torch.empty(O + R, I, device=DEVICE), torch.empty(O, I + 2 * R, device=DEVICE)
    found = []
    for turn in range(turns):
        other, weight = weights[1 - turn % 2], weights[turn % 2]
        out = below[:O] if turn % 3 < 2 else beside[:, :I]
        dequantize_into(other, out, impl="triton", pdl=True)  # overwritten at once
        if turn % 3 == 0:
            dequantize_into(weight, out, impl="triton", pdl=True)
            found.append((turn, out.sum(1), None))
        elif turn % 3 == 1:
            A.mul_(-1.01)
            dequantize_concat_rows_A(weight, A, 1.0, below, impl="triton", pdl=True)
            found.append((turn, out.sum(1), (A.clone(), below[O:].clone())))
        else:
            B.mul_(-1.01)
            dequantize_concat_columns_B(
                weight, B.split(O // 2), (O // 2, O // 2), 1.0, beside, impl="triton", pdl=True
            )
            blocks = torch.block_diag(*B.split(O // 2))
            found.append((turn, out.sum(1), (blocks, beside[:, I:].clone())))
    for turn, read, lora in found:
        assert torch.equal(read, plain[turn % 2].sum(1)), turn
        assert lora is None or torch.equal(*lora), turn
