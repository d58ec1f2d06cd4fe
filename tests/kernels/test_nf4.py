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

from kernels.nf4 import NF4Weight, dequantize, dequantize_into, quantize  # noqa: E402
from kernels.nf4.cases import DTYPES, SHAPES, make_weight  # noqa: E402
from kernels.nf4.reference import FP4_CODE, NF4_CODE, dynamic_map, scales  # noqa: E402

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
