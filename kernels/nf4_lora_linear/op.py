"""Public functions of the 4-bit linear layer with LoRA, and its registration as one torch op."""

import torch
from minisft.kernels.nf4 import NF4Weight, dequantize, dequantize_concat_columns_B
from minisft.kernels.nf4_lora_linear.reference import Adapter, backward_reference, forward_reference
from torch import Tensor

# Maximum number of rows for which the weight is decoded inside the product (see README.md).
FUSED_ROWS = 64


def forward(
    x_MI: Tensor,
    weight: NF4Weight,
    bias_O: Tensor | None,
    adapter: Adapter | None,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Return (y = x W^T + bias + scaling * (x A^T) B^T [M, O], u = x A^T [M, R] or None).

    x, bias, A, B: one dtype (bfloat16, float16, float32); columns of x contiguous. Not
    differentiable. impl: "fused" (decodes inside the product; at most 64 rows), "joined" (decodes,
    then one product kernel that includes LoRA), "decode" (decodes, then cuBLAS), "reference" or
    "auto". Raises ValueError if an explicitly requested impl does not apply.
    """
    impl = _choose(impl, x_MI, weight, adapter, weight.shape[0])
    if impl == "reference":
        return forward_reference(x_MI, weight, bias_O, adapter)
    if impl == "fused":
        from minisft.kernels.nf4_lora_linear.kernel import fused_forward

        return fused_forward(x_MI, weight, bias_O, adapter)
    if adapter is None:
        w_OI = dequantize(weight, x_MI.dtype)
        return torch.nn.functional.linear(x_MI, w_OI, bias_O), None
    if impl == "joined":
        from minisft.kernels.nf4_lora_linear import many_rows

        return many_rows.forward(x_MI, weight, bias_O, adapter)
    (O, I), (A_RI, B_OR, scaling), R = weight.shape, adapter, adapter.A_RI.shape[0]
    # with many outputs, copying x into [x, u] costs less than reading y to add the update
    if O >= 4 * I:
        x_ext = torch.empty((x_MI.shape[0], I + R), dtype=x_MI.dtype, device=x_MI.device)
        x_ext[:, :I] = x_MI
        torch.mm(x_MI, A_RI.T, out=x_ext[:, I:])
        w = torch.empty((O, I + R), dtype=x_MI.dtype, device=x_MI.device)
        dequantize_concat_columns_B(weight, (B_OR,), (O,), scaling, w, pdl=True)
        return torch.nn.functional.linear(x_ext, w, bias_O), x_ext[:, I:].contiguous()
    u_MR = x_MI @ A_RI.T
    y_MO = _scaled_product(u_MR, B_OR.T, scaling)
    w_OI = dequantize(weight, x_MI.dtype, pdl=True)
    # y holds the LoRA update first: the large product then adds to y in its epilogue
    y_MO.addmm_(x_MI, w_OI.T)
    return (y_MO if bias_O is None else y_MO.add_(bias_O)), u_MR


def backward(
    dy_MO: Tensor,
    x_MI: Tensor,
    u_MR: Tensor | None,
    weight: NF4Weight,
    adapter: Adapter | None,
    *,
    need_dx: bool = True,
    impl: str = "auto",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dx [M, I] or None, dA [R, I] or None, dB [O, R] or None) in the dtype of dy.

    dx is None without need_dx; dA and dB are None without adapter. u: as returned by `forward`.
    Columns of dy are contiguous; dtypes, layouts, impl and errors as in `forward`.
    """
    impl = _choose(impl, dy_MO, weight, adapter, weight.shape[1])
    if impl == "reference":
        return backward_reference(dy_MO, x_MI, u_MR, weight, adapter, need_dx)
    if impl == "fused" and need_dx:
        from minisft.kernels.nf4_lora_linear.kernel import fused_backward

        return fused_backward(dy_MO, x_MI, u_MR, weight, adapter)
    if adapter is None:
        return (dy_MO @ dequantize(weight, dy_MO.dtype) if need_dx else None), None, None
    assert u_MR is not None
    if impl == "joined" and need_dx:
        from minisft.kernels.nf4_lora_linear import many_rows

        return many_rows.backward(dy_MO, x_MI, u_MR, weight, adapter)
    A_RI, B_OR, scaling = adapter
    dx_MI, t_MR = None, dy_MO @ B_OR
    if need_dx:
        dx_MI = _scaled_product(t_MR, A_RI, scaling)
        dx_MI.addmm_(dy_MO, dequantize(weight, dy_MO.dtype, pdl=True))
    dA_RI, dB_OR = _scaled_product(t_MR.T, x_MI, scaling), _scaled_product(dy_MO.T, u_MR, scaling)
    return dx_MI, dA_RI, dB_OR


def _scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return scaling * a @ b, computed in one launch and rounded once, after scaling."""
    out = torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device)
    return out.addmm_(a, b, beta=0, alpha=scaling)


def _choose(impl: str, x: Tensor, weight: NF4Weight, adapter: Adapter | None, columns: int) -> str:
    """Return the name of the implementation to use for x and a result with `columns` columns."""
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
    from minisft.kernels.nf4_lora_linear.many_rows import is_fastest, supports

    rank = 0 if adapter is None else adapter.A_RI.shape[0]
    joined = supports(x, weight, rank)
    if impl == "joined" and not joined:
        raise ValueError(
            "nf4_lora_linear: the joined product takes an adapter of rank 1 to 256 and one or more "
            "rows that are multiples of 16 bytes, on a GPU in half precision and with 227 KiB of "
            f"shared memory; got x {tuple(x.shape)} {x.dtype}, a weight {weight.shape}, "
            f"{f'rank {rank}' if rank else 'no adapter'}"
        )
    return "joined" if joined and (impl == "joined" or is_fastest(x, columns, rank)) else "decode"


# --------------------------------------------------------------------------------- registration
# A torch op cannot take an NF4Weight: its fields are passed as separate tensors and numbers.

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
    y, u = forward(x, _unpack(parts), bias, None if A is None else Adapter(A, B, scaling))
    # the op's schema has no optional results: return an empty tensor instead of None
    return y, x.new_empty((x.shape[0], 0)) if u is None else u


@torch.library.register_fake("minisft::nf4_lora_linear")
def _forward_fake(x, bias, A, B, scaling, *parts):
    M, R = x.shape[0], 0 if A is None else A.shape[0]
    return x.new_empty((M, parts[6])), x.new_empty((M, R))


@torch.library.impl("minisft::nf4_lora_linear_backward", ("CPU", "CUDA"))
def _backward_impl(dy, x, u, A, B, scaling, need_dx, *parts):
    adapter, u = (None, None) if A is None else (Adapter(A, B, scaling), u)
    # autograd may pass an expanded dy, for example the gradient of sum()
    grads = backward(dy.contiguous(), x, u, _unpack(parts), adapter, need_dx=need_dx)
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
    dA, dB = (None, None) if A is None else (dA, dB)
    return dx if need_dx else None, dbias, dA, dB, None, *none


torch.library.register_autograd("minisft::nf4_lora_linear", _backward, setup_context=_setup_context)


def nf4_lora_linear(
    x_MI: Tensor,
    weight: NF4Weight,
    bias_O: Tensor | None = None,
    A_RI: Tensor | None = None,
    B_OR: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """Return x dequant(W)^T + bias + scaling * (x A^T) B^T, [M, O], differentiable except in W.

    Calls the op `minisft::nf4_lora_linear`, which is one node for torch.compile and which selective
    checkpointing policies can name. It saves x and u = x A^T, not the decoded matrix. dtypes as in
    `forward`. Raises ValueError if shapes or dtypes do not match.
    """
    O, I = weight.shape
    if x_MI.dim() != 2 or x_MI.shape[1] != I:
        raise ValueError(f"nf4_lora_linear: x is {tuple(x_MI.shape)}; expected [rows, {I}]")
    if (A_RI is None) != (B_OR is None):
        raise ValueError("nf4_lora_linear: A and B must be given together or not at all")
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
