"""The public functions, and their registration: compile, checkpointing and autograd see one op."""

from __future__ import annotations

import torch
from minisft.kernels.nf4 import NF4Weight, dequantize, dequantize_concat_columns_B
from minisft.kernels.nf4_lora_linear.reference import backward_reference, forward_reference
from torch import Tensor

FUSED_ROWS = 64  # up to here the weight is decoded inside the product (measured: README.md)


def forward(
    x_MI: Tensor,
    weight: NF4Weight,
    bias_O: Tensor | None,
    A_RI: Tensor | None,
    B_OR: Tensor | None,
    scaling: float,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """(y = x W^T + bias + scaling * (x A^T) B^T [M, O], u = x A^T [M, R] or None).

    x, bias, A, B: one dtype (bfloat16, float16, float32), x's columns contiguous, A and B
    contiguous; A and B both or neither. Neither autograd nor the decoded matrix is left behind.
    impl: "fused" (at most 64 rows), "joined" (decode, then one product of our own with LoRA in it),
    "decode" (decode, then cuBLAS), "reference", or "auto".
    """
    impl = _impl(impl, x_MI, weight, A_RI, weight.shape[0])
    if impl == "reference":
        return forward_reference(x_MI, weight, bias_O, A_RI, B_OR, scaling)
    if impl == "fused":
        from minisft.kernels.nf4_lora_linear.kernel import fused_forward

        return fused_forward(x_MI, weight, bias_O, A_RI, B_OR, scaling)
    if A_RI is None or B_OR is None:
        w_OI = dequantize(weight, x_MI.dtype)
        return torch.nn.functional.linear(x_MI, w_OI, bias_O), None
    if impl == "joined":
        from minisft.kernels.nf4_lora_linear import many_rows

        return many_rows.forward(x_MI, weight, bias_O, A_RI, B_OR, scaling)
    O, I = weight.shape
    if O >= 4 * I:  # many outputs: [x, u] times [W, scaling * B] writes y once
        R = A_RI.shape[0]
        x_ext = torch.empty((x_MI.shape[0], I + R), dtype=x_MI.dtype, device=x_MI.device)
        x_ext[:, :I] = x_MI
        torch.mm(x_MI, A_RI.T, out=x_ext[:, I:])
        w = torch.empty((O, I + R), dtype=x_MI.dtype, device=x_MI.device)
        dequantize_concat_columns_B(weight, (B_OR,), (O,), scaling, w, pdl=True)
        return torch.nn.functional.linear(x_ext, w, bias_O), x_ext[:, I:].contiguous()
    u_MR = x_MI @ A_RI.T
    y_MO = _scaled(u_MR, B_OR.T, scaling)
    w_OI = dequantize(weight, x_MI.dtype, pdl=True)
    y_MO.addmm_(x_MI, w_OI.T)  # the product adds itself to what is there
    return (y_MO if bias_O is None else y_MO.add_(bias_O)), u_MR


def backward(
    dy_MO: Tensor,
    x_MI: Tensor,
    u_MR: Tensor | None,
    weight: NF4Weight,
    A_RI: Tensor | None,
    B_OR: Tensor | None,
    scaling: float,
    *,
    need_dx: bool = True,
    impl: str = "auto",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx [M, I], dA [R, I], dB [O, R]), each None where there is none; in dy's dtype. No dW.

    u: what `forward` returned. dtypes, layouts and impl as there; dy's columns contiguous.
    """
    impl = _impl(impl, dy_MO, weight, A_RI, weight.shape[1])
    if impl == "reference":
        return backward_reference(dy_MO, x_MI, u_MR, weight, A_RI, B_OR, scaling, need_dx)
    if impl == "fused" and need_dx:
        from minisft.kernels.nf4_lora_linear.kernel import fused_backward

        return fused_backward(dy_MO, x_MI, u_MR, weight, A_RI, B_OR, scaling)
    if impl == "joined" and A_RI is not None and B_OR is not None and u_MR is not None and need_dx:
        from minisft.kernels.nf4_lora_linear import many_rows

        return many_rows.backward(dy_MO, x_MI, u_MR, weight, A_RI, B_OR, scaling)
    dx_MI = t_MR = None
    if B_OR is not None and A_RI is not None:
        t_MR = dy_MO @ B_OR
        if need_dx:
            dx_MI = _scaled(t_MR, A_RI, scaling)
            dx_MI.addmm_(dy_MO, dequantize(weight, dy_MO.dtype, pdl=True))
    elif need_dx:
        dx_MI = dy_MO @ dequantize(weight, dy_MO.dtype)
    if t_MR is None or u_MR is None:
        return dx_MI, None, None
    return dx_MI, _scaled(t_MR.T, x_MI, scaling), _scaled(dy_MO.T, u_MR, scaling)


def _scaled(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """scaling * a b, scaled before the one rounding, in the launch of the product."""
    out = torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device)
    return out.addmm_(a, b, beta=0, alpha=scaling)


def _impl(impl: str, x: Tensor, weight: NF4Weight, A: Tensor | None, columns: int) -> str:
    """The way to go, for a result of that many columns."""
    if impl not in ("auto", "fused", "joined", "decode", "reference"):
        raise ValueError(f"impl is {impl!r}; expected auto, fused, joined, decode or reference")
    fused = weight.shape[1] % 64 == 0 and weight.blocksize == 64 and 0 < x.shape[0] <= FUSED_ROWS
    if impl == "fused" and not fused:
        raise ValueError(
            f"nf4_lora_linear: the fused product takes 1 to {FUSED_ROWS} rows and whole blocks of "
            f"64 inputs; got {x.shape[0]} rows, a weight {weight.shape}, blocks of "
            f"{weight.blocksize}"
        )
    if impl in ("fused", "decode", "reference"):
        return impl
    if impl == "auto" and not x.is_cuda:
        return "reference"
    if impl == "auto" and fused:
        return "fused"
    from minisft.kernels.nf4_lora_linear.many_rows import suits, takes

    rank = 0 if A is None else A.shape[0]
    joined = takes(x, weight, rank)
    if impl == "joined" and not joined:
        raise ValueError(
            "nf4_lora_linear: the joined product takes an adapter of rank 1 to 256 and one row or "
            "more of whole 16 bytes, on a GPU in half precision and with 227 KiB of shared memory; "
            f"got x {tuple(x.shape)} {x.dtype}, a weight {weight.shape}, "
            f"{'no adapter' if A is None else f'rank {A.shape[0]}'}"
        )
    return "joined" if joined and (impl == "joined" or suits(x, columns, rank)) else "decode"


# --------------------------------------------------------------------------------- registration
# An op takes tensors and numbers: a 4-bit weight travels as its six tensors and four numbers.

_WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor code, Tensor? nested_absmax, Tensor? nested_code, "
    "Tensor? nested_offset, int out_features, int in_features, int blocksize, str quant_type"
)
torch.library.define(
    "minisft::nf4_lora_linear",
    f"(Tensor x, Tensor? bias, Tensor? A, Tensor? B, float scaling, {_WEIGHT}) -> (Tensor, Tensor)",
)
torch.library.define(
    "minisft::nf4_lora_linear_backward",
    "(Tensor dy, Tensor x, Tensor u, Tensor? A, Tensor? B, float scaling, bool need_dx, "
    f"{_WEIGHT}) -> (Tensor, Tensor, Tensor)",
)


def _unpack(parts) -> NF4Weight:
    packed, absmax, code, nested_absmax, nested_code, nested_offset, O, I, blocksize, kind = parts
    return NF4Weight(
        packed, absmax, code, nested_absmax, nested_code, nested_offset, (O, I), blocksize, kind
    )


def _pack(weight: NF4Weight) -> tuple:
    return (*weight[:6], *weight.shape, weight.blocksize, weight.quant_type)


@torch.library.impl("minisft::nf4_lora_linear", ("CPU", "CUDA"))
def _forward_impl(x, bias, A, B, scaling, *parts):
    y, u = forward(x, _unpack(parts), bias, A, B, scaling)
    return y, x.new_empty((x.shape[0], 0)) if u is None else u


@torch.library.register_fake("minisft::nf4_lora_linear")
def _forward_fake(x, bias, A, B, scaling, *parts):
    return x.new_empty((x.shape[0], parts[6])), x.new_empty(
        (x.shape[0], 0 if A is None else A.shape[0])
    )


@torch.library.impl("minisft::nf4_lora_linear_backward", ("CPU", "CUDA"))
def _backward_impl(dy, x, u, A, B, scaling, need_dx, *parts):
    grads = backward(
        dy.contiguous(), x, None if A is None else u, _unpack(parts), A, B, scaling,
        need_dx=need_dx,
    )  # fmt: skip
    return tuple(dy.new_empty(0) if g is None else g for g in grads)


@torch.library.register_fake("minisft::nf4_lora_linear_backward")
def _backward_fake(dy, x, u, A, B, scaling, need_dx, *parts):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_dx else dy.new_empty(0),
        dy.new_empty(0) if A is None else torch.empty_like(A),
        dy.new_empty(0) if B is None else torch.empty_like(B),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, bias, A, B, scaling, *parts = inputs
    ctx.save_for_backward(x, output[1], A, B, *parts[:6])
    ctx.numbers = (scaling, bias is not None, parts[6:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, du):
    x, u, A, B, *tensors = ctx.saved_tensors
    scaling, has_bias, numbers = ctx.numbers
    none = (None,) * 10
    if dy is None:
        return None, None, None, None, None, *none
    need_dx = ctx.needs_input_grad[0]
    dx, dA, dB = torch.ops.minisft.nf4_lora_linear_backward(
        dy, x, u, A, B, scaling, need_dx, *tensors, *numbers
    )
    dbias = dy.sum(0) if has_bias and ctx.needs_input_grad[1] else None
    adapted = A is not None
    return (
        dx if need_dx else None,
        dbias,
        dA if adapted else None,
        dB if adapted else None,
        None,
        *none,
    )


torch.library.register_autograd("minisft::nf4_lora_linear", _backward, setup_context=_setup_context)


def nf4_lora_linear(
    x_MI: Tensor,
    weight: NF4Weight,
    bias_O: Tensor | None = None,
    A_RI: Tensor | None = None,
    B_OR: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """x dequant(W)^T + bias + scaling * (x A^T) B^T, [M, O], differentiable in x, bias, A and B.

    The op `minisft::nf4_lora_linear`: torch.compile takes it whole, activation checkpointing can
    name it, and what it keeps is x and u = x A^T, never a decoded matrix. dtypes as `forward`.
    Raises ValueError where shapes or dtypes do not fit.
    """
    O, I = weight.shape
    if x_MI.dim() != 2 or x_MI.shape[1] != I:
        raise ValueError(f"nf4_lora_linear: x is {tuple(x_MI.shape)}; expected [rows, {I}]")
    if (A_RI is None) != (B_OR is None):
        raise ValueError("nf4_lora_linear: A and B come together or not at all")
    if A_RI is not None and B_OR is not None:
        R = A_RI.shape[0]
        if A_RI.shape != (R, I) or B_OR.shape != (O, R):
            raise ValueError(
                f"nf4_lora_linear: A is {tuple(A_RI.shape)} and B {tuple(B_OR.shape)}; expected "
                f"[rank, {I}] and [{O}, rank]"
            )
        if A_RI.dtype != x_MI.dtype or B_OR.dtype != x_MI.dtype:
            raise ValueError(
                f"nf4_lora_linear: x is {x_MI.dtype}, A {A_RI.dtype}, B {B_OR.dtype}; expected one"
            )
        A_RI, B_OR = A_RI.contiguous(), B_OR.contiguous()
    y_MO, _ = torch.ops.minisft.nf4_lora_linear(
        x_MI.contiguous(), bias_O, A_RI, B_OR, scaling, *_pack(weight)
    )
    return y_MO
