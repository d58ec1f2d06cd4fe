"""One decoder block with a hand-written backward pass; `Saved` lists all that is saved for it.

Norm outputs are not saved: frozen weights need no gradient, and for the gradient of LoRA's A a norm
output is cheap to recompute. LoRA is folded into the large matmuls:
forward [x, xA^T] @ [W, sB]^T, backward [dy, dyB] @ [W; sA], with s = lora_alpha / r.

Rank columns are the last R columns of a matrix, reserved for x A^T or dy B. Tensors whose names
have no shape suffix (h, dx, qkv, gate_up) have rank columns and the shape [T, width + R]; R is the
total rank of the fused linear that reads or wrote the tensor. A suffix (x_TD) is the exact shape.

T tokens  D hidden  F ffn  N query heads  K key/value heads  H head_dim  R rank  S splits of tokens
I input features of a fused linear  O output features of a fused linear
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minisft.config.model import ModelConfig
from minisft.explicit.attention import Attended, attend, attend_backward
from minisft.kernels import low_rank, nf4
from minisft.kernels.rms_norm import add_rms_norm, normalise, rms_norm_backward
from minisft.kernels.rope import rope_, rope_backward
from minisft.kernels.swiglu import swiglu, swiglu_backward_
from minisft.nn import Documents


class FusedLinear(NamedTuple):
    """Linears with the same input, fused: their rows are concatenated into one weight [O, I]."""

    weight: Tensor | nf4.NF4Weight
    sizes: tuple[int, ...]  # rows of each linear
    A: Tensor | None  # [R, I]: the A of every adapted linear, rows concatenated
    B: tuple[Tensor | None, ...]  # of each linear [O_j, R_j]
    dA: Tensor | None  # float32 [S, R, I]: sums over the tokens of each split
    dB: tuple[Tensor | None, ...]  # float32 [S, O_j, R_j]

    @property
    def rank(self) -> int:
        """Return R, the sum of the ranks of the linears; 0 if no linear has an adapter."""
        return 0 if self.A is None else self.A.shape[0]


class ExplicitLayer(NamedTuple):
    """The weights, adapters and gradient buffers of one decoder layer."""

    norm1: Tensor  # [D]: before attention
    qkv: FusedLinear
    o: FusedLinear
    norm2: Tensor  # [D]: before the MLP
    gate_up: FusedLinear
    down: FusedLinear
    # float32 [S, n]: dA and dB per split of tokens, in the order of grads; all layers share memory
    partials: Tensor
    grads: Tensor  # float32 [n]: the layer's slice of the flat gradient


class LayerContext(NamedTuple):
    """Inputs of a layer except weights and activations. Only mlp_chunks differs between layers."""

    cfg: ModelConfig
    scaling: float  # lora_alpha / r
    cos: Tensor  # [T, H]
    sin: Tensor
    documents: Documents
    # 1-D, compute dtype: the decoded weight of the current matmul. All layers share this buffer,
    # since each weight is decoded right before its matmul and can be overwritten afterwards.
    scratch: Tensor
    mlp_chunks: int = 1  # the MLP processes the tokens in this many chunks; 1 if gate_up is saved


class AlwaysSaved(NamedTuple):
    """Small tensors saved for the backward pass under every policy: a few numbers per token."""

    rstd1: Tensor  # float32 [T]: 1 / rms of the layer's input
    rstd2: Tensor  # float32 [T]: 1 / rms of mid
    u_qkv: Tensor | None  # x A^T, [T, R]
    u_o: Tensor | None
    u_gate_up: Tensor | None
    u_down: Tensor | None


class Saved(NamedTuple):
    """Activations saved for a layer's backward pass; None for those that the policy recomputes."""

    x_TD: Tensor | None  # the layer's input
    qkv: Tensor | None  # q and k after RoPE, then v: [T, (N + 2K) H + R]
    attended: Attended | None
    mid_TD: Tensor | None  # x + attention's output
    gate_up: Tensor | None  # [T, 2F + R]
    small: AlwaysSaved


def write_weight(weight: Tensor | nf4.NF4Weight, out_OI: Tensor, pdl: bool = False) -> None:
    """Write the weight into `out` in out's dtype; decodes 4-bit weights. Rows may be strided.

    pdl: allow the decoding kernel to start before its predecessor ends (`dequantize_into`). Valid
    if no running kernel writes the weight, as is the case for frozen weights during a step.
    """
    if isinstance(weight, nf4.NF4Weight):
        nf4.dequantize_into(weight, out_OI, pdl=pdl)
    else:
        out_OI.copy_(weight)


def scratch_numel(shape: tuple[int, int], rank: int) -> int:
    """Return how many scratch elements hold a decoded weight [O, I] together with LoRA's A or B."""
    O, I = shape
    return max((O + rank) * I, O * low_rank.row_stride(I + rank))


def concat_columns_B(linear: FusedLinear, scaling: float, scratch: Tensor) -> Tensor:
    """Write [W, scaling * B] into scratch: [O, I + R]. B of several linears is block diagonal."""
    O, I = linear.weight.shape
    stride = low_rank.row_stride(I + linear.rank)
    w = scratch[: O * stride].view(O, stride)[:, : I + linear.rank]
    if isinstance(linear.weight, nf4.NF4Weight) and linear.rank:
        nf4.dequantize_concat_columns_B(linear.weight, linear.B, linear.sizes, scaling, w, pdl=True)
        return w
    write_weight(linear.weight, w[:, :I], pdl=True)
    low_rank.place_block_diagonal(linear.B, linear.sizes, scaling, w[:, I:])
    return w


def concat_rows_A(linear: FusedLinear, scaling: float, scratch: Tensor) -> Tensor:
    """Write [W; scaling * A] into scratch and return it, [O + R, I]."""
    O, I = linear.weight.shape
    w = scratch[: (O + linear.rank) * I].view(O + linear.rank, I)
    if isinstance(linear.weight, nf4.NF4Weight) and linear.A is not None:
        nf4.dequantize_concat_rows_A(linear.weight, linear.A, scaling, w, pdl=True)
        return w
    write_weight(linear.weight, w[:O], pdl=True)
    if linear.A is not None:
        torch.mul(linear.A, scaling, out=w[O:])
    return w


def product(
    x: Tensor, u: Tensor | None, linear: FusedLinear, ctx: LayerContext
) -> tuple[Tensor, Tensor]:
    """Return (y = x W^T + LoRA update [T, O + R], its rank columns unwritten; u = x A^T [T, R]).

    x: [T, I + R]; its rank columns are overwritten with u. u: x A^T if forward saved it, or None.
    """
    O, I = linear.weight.shape
    # Write u into the last R columns of x: [x, u] is then one operand of the matmul, and the LoRA
    # update needs no extra pass over y. `make_mlp` later reads u from these columns.
    rank_columns = x[:, I:]
    if u is None and linear.A is not None:
        torch.mm(x[:, :I], linear.A.T, out=rank_columns)
    elif u is not None:
        rank_columns.copy_(u)
    y = low_rank.empty_rows(x.shape[0], O + linear.rank, x)
    torch.mm(x, concat_columns_B(linear, ctx.scaling, ctx.scratch).T, out=y[:, :O])
    return y, rank_columns if u is None else u


def split_update(
    y: Tensor, linear: FusedLinear, ctx: LayerContext
) -> tuple[Tensor, low_rank.LowRank | None, Tensor | None]:
    """Split y = x [W; A]^T of one linear into (x W^T [T, O], its LoRA update, u = x A^T [T, R])."""
    # One matmul computes x W^T and u and reads x once; `product` reads x twice. This is faster here
    # because the norm that follows reads y anyway and can add the update u B^T.
    (B,) = linear.B
    if B is None:
        return y, None, None
    O = linear.weight.shape[0]
    # Copy u: a view would keep all of y in memory until the backward pass.
    u = y[:, O:].contiguous()
    return y[:, :O], low_rank.LowRank(u, B.T, ctx.scaling), u


def fill_t(dy: Tensor, linear: FusedLinear) -> None:
    """Write t = dy B of each linear into the rank columns of dy [T, O + R]."""
    if linear.rank:
        O = sum(linear.sizes)
        low_rank.narrow_products(dy, linear.B, linear.sizes, dy[:, O : O + linear.rank])


def by_linear(u: Tensor | None, linear: FusedLinear) -> list[Tensor | None]:
    """Split u [T, R] into the columns of each linear; None for a linear without an adapter."""
    if u is None:
        return [None] * len(linear.B)
    columns = u.split([0 if B is None else B.shape[1] for B in linear.B], dim=1)
    return [None if B is None else part for B, part in zip(linear.B, columns, strict=True)]


def _heads(qkv: Tensor, cfg: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of qkv: q [T, N, H], k [T, K, H] and v [T, K, H]."""
    N, K, H = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    q, k, v = qkv[:, : (N + 2 * K) * H].split((N * H, K * H, K * H), dim=1)
    return q.unflatten(1, (N, H)), k.unflatten(1, (K, H)), v.unflatten(1, (K, H))


def make_qkv(
    h: Tensor, u: Tensor | None, layer: ExplicitLayer, ctx: LayerContext
) -> tuple[Tensor, Tensor]:
    """Compute qkv: q and k after RoPE, then v, [T, (N + 2K) H + R]. Return (qkv, u = x A^T)."""
    qkv, u = product(h, u, layer.qkv, ctx)
    rope_(qkv, ctx.cos, ctx.sin, ctx.cfg.num_attention_heads + ctx.cfg.num_key_value_heads)
    return qkv, u


def make_mid(
    x_TD: Tensor, attended: Attended, layer: ExplicitLayer, ctx: LayerContext
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (mid = x + o_proj's output, norm2 of mid [T, D + R], its 1 / rms, u = x A^T of o)."""
    y = low_rank.empty_rows(x_TD.shape[0], x_TD.shape[1] + layer.o.rank, x_TD)
    torch.mm(attended.out_TNH.flatten(1), concat_rows_A(layer.o, 1.0, ctx.scratch).T, out=y)
    y, update, u = split_update(y, layer.o, ctx)
    mid, h, rstd = add_rms_norm(
        x_TD, y, layer.norm2, ctx.cfg.rms_norm_eps, delta=update, rank_columns=layer.gate_up.rank
    )
    return mid, h, rstd, u


def forward(
    x_TD: Tensor,
    h: Tensor,
    rstd: Tensor,
    layer: ExplicitLayer,
    next_norm: Tensor,
    next_rank: int,
    ctx: LayerContext,
) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """Run one layer; return (its output, the next norm's output, 1 / rms, activations to save).

    h, rstd: norm1 of x, [T, D + R], and its 1 / rms. next_norm: weight of the norm that follows
    this layer; next_rank: number of rank columns in that norm's output.
    """
    qkv, u_qkv = make_qkv(h, None, layer, ctx)
    # Copy u, which is a view of h: saving the view would keep h in memory.
    u_qkv = u_qkv.contiguous()
    attended = attend(*_heads(qkv, ctx.cfg), ctx.documents)
    mid, h, rstd2, u_o = make_mid(x_TD, attended, layer, ctx)
    y, update, gate_up, u_gate_up, u_down = make_mlp(h, layer, ctx)
    del h
    # One kernel computes this layer's residual sum and the next norm, so the sum is read once.
    x_next, h_next, rstd_next = add_rms_norm(
        mid, y, next_norm, ctx.cfg.rms_norm_eps, delta=update, rank_columns=next_rank
    )
    small = AlwaysSaved(rstd, rstd2, u_qkv, u_o, u_gate_up, u_down)
    return x_next, h_next, rstd_next, Saved(x_TD, qkv, attended, mid, gate_up, small)


def make_mlp(
    h: Tensor, layer: ExplicitLayer, ctx: LayerContext
) -> tuple[Tensor, low_rank.LowRank | None, Tensor | None, Tensor, Tensor | None]:
    """Run the MLP; return (down's output y, its LoRA update, gate_up, u of gate_up, u of down).

    h: [T, D + R]; its rank columns are overwritten with u of gate_up. gate_up: None if chunked.
    """
    T, D, F = h.shape[0], ctx.cfg.hidden_size, ctx.cfg.intermediate_size
    y = low_rank.empty_rows(T, D + layer.down.rank, h)
    gate_up = None
    for rows in mlp_rows(T, ctx):
        del gate_up  # of the previous chunk
        gate_up, _ = product(h[rows], None, layer.gate_up, ctx)
        torch.mm(swiglu(gate_up, F), concat_rows_A(layer.down, 1.0, ctx.scratch).T, out=y[rows])
    if ctx.mlp_chunks > 1:
        gate_up = None
    # `product` wrote u of each chunk into the rank columns of h.
    u = h[:, D:].contiguous()
    y, update, u_down = split_update(y, layer.down, ctx)
    return y, update, gate_up, u, u_down


def mlp_rows(T: int, ctx: LayerContext) -> list[slice]:
    """Return the rows of each MLP chunk, multiples of 64; fewer than mlp_chunks if T is small."""
    size = -(-T // ctx.mlp_chunks)
    size = -(-size // 64) * 64
    return [slice(start, min(start + size, T)) for start in range(0, T, size)]


def recompute(saved: Saved, layer: ExplicitLayer, ctx: LayerContext) -> tuple[Saved, Tensor | None]:
    """Recompute all unsaved activations except gate_up; also return h if mid was recomputed.

    h: the MLP's input. Runs forward's kernels on equal inputs, so all policies give equal bits.
    """
    x, qkv, attended, mid, gate_up, small = saved
    assert x is not None
    if qkv is None:
        h = normalise(x, layer.norm1, small.rstd1, rank_columns=layer.qkv.rank)
        qkv, _ = make_qkv(h, small.u_qkv, layer, ctx)
    if attended is None:
        attended = attend(*_heads(qkv, ctx.cfg), ctx.documents)
    h = None
    if mid is None:
        mid, h, _, _ = make_mid(x, attended, layer, ctx)
    # down_proj is never recomputed, because backward does not read its output.
    return Saved(x, qkv, attended, mid, gate_up, small), h


def backward(
    dx: Tensor,
    slot: list[Saved],
    layer: ExplicitLayer,
    previous_rank: int | None,
    ctx: LayerContext,
) -> Tensor | None:
    """Return the gradient of the layer's input [T, D + previous_rank]; add dA and dB to grads.

    dx: gradient of the layer's output [T, D + R] with down's rank columns, which are overwritten.
    slot: a list whose only element is the layer's Saved; emptied by this function. previous_rank:
    rank of down in the previous layer. None for the first layer: the result is then None.
    """
    # Emptying the list removes the caller's reference to gate_up, so that gate_up is freed before
    # attention's backward pass allocates memory.
    saved, h = recompute(slot.pop(), layer, ctx)
    dmid = _mlp_backward(dx, saved, h, layer, ctx)
    del h
    saved = saved._replace(gate_up=None)
    dx_previous = _attention_backward(dmid, saved, layer, previous_rank, ctx)
    # The splits are added in a fixed order, so that gradients are bit-identical in every run.
    low_rank.reduce_partials(layer.partials, layer.grads, ctx.scaling)
    return dx_previous


def _mlp_backward(
    dx: Tensor, saved: Saved, h: Tensor | None, layer: ExplicitLayer, ctx: LayerContext
) -> Tensor:
    """Return the gradient of mid, [T, D + R of o]; write dA and dB of gate_up and down."""
    D, T, rstd2 = ctx.cfg.hidden_size, dx.shape[0], saved.small.rstd2
    mid, small, down, linear = saved.mid_TD, saved.small, layer.down, layer.gate_up
    assert mid is not None
    chunks = mlp_rows(T, ctx)
    share = layer.partials.shape[0] // (1 if len(chunks) == 1 else ctx.mlp_chunks)
    # Each chunk writes its own part of the S splits. If there are fewer chunks than mlp_chunks, no
    # chunk writes the last splits, which still contain the sums of another layer.
    layer.partials[len(chunks) * share :].zero_()
    fill_t(dx, down)
    dy_TD, t = dx[:, :D], dx[:, D:] if down.rank else None
    _add_dB(small.u_down, dy_TD, down)
    if saved.gate_up is None and h is None:
        h = normalise(mid, layer.norm2, rstd2, rank_columns=linear.rank)
    lefts = (*by_linear(small.u_gate_up, linear), t)
    sums = (*linear.dB, down.dA)
    dh_TD, t_TR = dx.new_empty((T, D)), dx.new_empty((T, linear.rank))
    for i, rows in enumerate(chunks):
        gate_up = saved.gate_up
        if gate_up is None:
            assert h is not None
            u = None if small.u_gate_up is None else small.u_gate_up[rows]
            gate_up, _ = product(h[rows], u, linear, ctx)
        da = dx[rows] @ concat_rows_A(down, ctx.scaling, ctx.scratch)
        splits = slice(i * share, (i + 1) * share)
        # Overwrite gate_up with its gradient: a second [T, 2F] would raise the memory peak. The
        # same kernel sums dB of gate and up and dA of down, with their inputs in registers.
        swiglu_backward_(
            gate_up,
            da,
            lefts=tuple(None if x is None else x[rows] for x in lefts),  # pyright: ignore
            partials=tuple(None if x is None else x[splits] for x in sums),  # pyright: ignore
        )
        del da
        fill_t(gate_up, linear)
        torch.mm(gate_up, concat_rows_A(linear, ctx.scaling, ctx.scratch), out=dh_TD[rows])
        t_TR[rows] = gate_up[:, sum(linear.sizes) :]
        del gate_up
    if linear.dA is not None:
        # Scaling mid by 1 / rms and norm2 in the kernel avoids recomputing gate_up's input.
        low_rank.outer_sum(t_TR, mid, linear.dA, row_scale_T=rstd2, column_scale_N=layer.norm2)
    return rms_norm_backward(
        dh_TD, mid, layer.norm2, rstd2, dresidual_TD=dy_TD, rank_columns=layer.o.rank
    )


def _attention_backward(
    dmid: Tensor, saved: Saved, layer: ExplicitLayer, previous_rank: int | None, ctx: LayerContext
) -> Tensor | None:
    """Return the gradient of the layer's input (see `backward`); write dA and dB of qkv and o.

    dmid: gradient of mid [T, D + R] with o's rank columns, which are overwritten.
    """
    D, o, linear, small = ctx.cfg.hidden_size, layer.o, layer.qkv, saved.small
    x, qkv, attended = saved.x_TD, saved.qkv, saved.attended
    assert x is not None and qkv is not None and attended is not None
    fill_t(dmid, o)
    dmid_TD = dmid[:, :D]
    do = (dmid @ concat_rows_A(o, ctx.scaling, ctx.scratch)).view_as(attended.out_TNH)
    if o.dA is not None:
        low_rank.outer_sum(dmid[:, D:], attended.out_TNH.flatten(1), o.dA)
    _add_dB(small.u_o, dmid_TD, o)
    grads = attend_backward(do, _heads(qkv, ctx.cfg), attended, ctx.documents)
    del do
    width = sum(linear.sizes)
    us = tuple(by_linear(small.u_qkv, linear))
    # Overwrite q, k and v, which are not read again, with their gradients: the rank columns of qkv
    # then follow the gradients, and both are one operand of the matmul for dh.
    rope_backward(grads, ctx.cos, ctx.sin, qkv[:, :width], us=us, partials=linear.dB)  # pyright: ignore
    del grads
    fill_t(qkv, linear)
    if linear.dA is not None:
        t_TR = qkv[:, width:]
        low_rank.outer_sum(t_TR, x, linear.dA, row_scale_T=small.rstd1, column_scale_N=layer.norm1)
    if previous_rank is None:
        return None
    dh_TD = qkv @ concat_rows_A(linear, ctx.scaling, ctx.scratch)
    return rms_norm_backward(
        dh_TD, x, layer.norm1, small.rstd1, dresidual_TD=dmid_TD, rank_columns=previous_rank
    )


def _add_dB(u: Tensor | None, dy_TO: Tensor, linear: FusedLinear) -> None:
    """Write dB = dy^T u, one sum per split of tokens, for a FusedLinear with one linear."""
    if u is not None and linear.dB[0] is not None:
        low_rank.outer_sum(u, dy_TO, linear.dB[0].transpose(1, 2))
