"""One decoder block by hand: forward and backward as two functions; all that is kept is seen.

A frozen weight needs no gradient, so its input is never kept for it; LoRA's A needs the input,
which is cheap to make again. LoRA rides along in the large products: with B beside the decoded
weight, [x, x A^T] times it is the whole output, and with A below it, [dy, dy B] times it the whole
gradient of the input.

T tokens  D hidden  F ffn  N query heads  K key/value heads  H head_dim  R rank  S splits of tokens
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minisft.config.model import ModelConfig
from minisft.explicit.attention import Attended, Layout, attend, attend_backward
from minisft.kernels.low_rank import (
    LowRank,
    empty_rows,
    narrow_products,
    outer_sum,
    place_block_diagonal,
    reduce_partials,
    row_stride,
)
from minisft.kernels.nf4 import (
    NF4Weight,
    dequantize_into,
    dequantize_with_A_below,
    dequantize_with_B_beside,
)
from minisft.kernels.rms_norm import add_rms_norm, normalise, rms_norm_backward
from minisft.kernels.rope import rope_, rope_backward
from minisft.kernels.swiglu import swiglu as swiglu_kernel
from minisft.kernels.swiglu import swiglu_backward_


class FusedLinear(NamedTuple):
    """Linears that read one input, their rows side by side as one weight [O, I]."""

    weight: Tensor | NF4Weight
    sizes: tuple[int, ...]  # rows of each linear
    A: Tensor | None  # [R, I]: the A of every adapted linear, one below the other
    B: tuple[Tensor | None, ...]  # of each linear [O_j, R_j]
    dA: Tensor | None  # float32 [S, R, I]: where the sums over tokens go
    dB: tuple[Tensor | None, ...]  # float32 [S, O_j, R_j]

    @property
    def rank(self) -> int:
        """R, of all linears together; 0 where none is adapted."""
        return 0 if self.A is None else self.A.shape[0]


class ExplicitLayer(NamedTuple):
    """A decoder layer as the hand-written pass takes it."""

    norm1: Tensor
    qkv: FusedLinear
    o: FusedLinear
    norm2: Tensor
    gate_up: FusedLinear
    down: FusedLinear
    partials: Tensor  # float32 [S, n]: all dA and dB of the layer, in the order of the flat buffer
    grads: Tensor  # float32 [n]: the layer's slice of the flat gradient


class LayerContext(NamedTuple):
    """What all layers share in one micro-batch."""

    cfg: ModelConfig
    scaling: float
    cos: Tensor
    sin: Tensor
    layout: Layout
    scratch: Tensor  # 1-D: decoded weights, one group at a time
    mlp_chunks: int = 1  # parts that tokens go through the MLP in, where gate_up is not kept


class AlwaysSaved(NamedTuple):
    """Kept under every policy: a few numbers a token."""

    rstd1: Tensor  # 1 / rms of the layer's input, float32 [T]
    rstd2: Tensor
    u_qkv: Tensor | None  # x A^T, [T, R]
    u_o: Tensor | None
    u_gate_up: Tensor | None
    u_down: Tensor | None


class Saved(NamedTuple):
    """What a layer's backward pass needs; None where it is to be computed again."""

    x_TD: Tensor | None
    qkv: Tensor | None  # q and k turned, and v: [T, (N + 2K) H + R]
    attended: Attended | None
    mid_TD: Tensor | None
    gate_up: Tensor | None  # [T, 2F + R]; the last R columns are room for dy B
    small: AlwaysSaved


# ------------------------------------------------------------------------------------- products


def place_weight(weight: Tensor | NF4Weight, out_OI: Tensor, early: bool = False) -> None:
    """The weight in the compute dtype, decoded or copied into `out`, whose rows may be strided.

    early: nothing under way writes it, as in a step (`dequantize_into`).
    """
    if isinstance(weight, NF4Weight):
        dequantize_into(weight, out_OI, early=early)
    else:
        out_OI.copy_(weight)


def concat_columns_B(group: FusedLinear, scaling: float, scratch: Tensor) -> Tensor:
    """[W, scaling * B], [O, I + R]; B of linears side by side is block diagonal."""
    O, I = group.weight.shape
    stride = row_stride(I + group.rank)
    w = scratch[: O * stride].view(O, stride)[:, : I + group.rank]
    if isinstance(group.weight, NF4Weight) and group.rank:
        dequantize_with_B_beside(group.weight, group.B, group.sizes, scaling, w, early=True)
        return w
    place_weight(group.weight, w[:, :I], early=True)
    place_block_diagonal(group.B, group.sizes, scaling, w[:, I:])
    return w


def concat_rows_A(group: FusedLinear, scaling: float, scratch: Tensor) -> Tensor:
    """[W; scaling * A], [O + R, I]."""
    O, I = group.weight.shape
    w = scratch[: (O + group.rank) * I].view(O + group.rank, I)
    if isinstance(group.weight, NF4Weight) and group.A is not None:
        dequantize_with_A_below(group.weight, group.A, scaling, w, early=True)
        return w
    place_weight(group.weight, w[:O], early=True)
    if group.A is not None:
        torch.mul(group.A, scaling, out=w[O:])
    return w


def product(
    x_ext: Tensor, u: Tensor | None, group: FusedLinear, at: LayerContext
) -> tuple[Tensor, Tensor]:
    """x W^T and its LoRA update, [T, O + R] with R columns of room, and u = x A^T.

    x_ext: [T, I + R], whose last R columns are filled here, with u where it is known already.
    """
    O, I = group.weight.shape
    room = x_ext[:, I:]
    if u is None and group.A is not None:
        torch.mm(x_ext[:, :I], group.A.T, out=room)
    elif u is not None:
        room.copy_(u)
    y = empty_rows(x_ext.shape[0], O + group.rank, x_ext)
    torch.mm(x_ext, concat_columns_B(group, at.scaling, at.scratch).T, out=y[:, :O])
    return y, room if u is None else u


def product_and_update(
    x_TI: Tensor, group: FusedLinear, at: LayerContext
) -> tuple[Tensor, LowRank | None, Tensor | None]:
    """x W^T [T, O]; its LoRA update, for the kernel that reads the product next; u = x A^T.

    A lies below the weight here, so that u comes with the product and x is read once.
    """
    O = group.weight.shape[0]
    y = empty_rows(x_TI.shape[0], O + group.rank, x_TI)
    torch.mm(x_TI, concat_rows_A(group, 1.0, at.scratch).T, out=y)
    (B,) = group.B
    if B is None:
        return y, None, None
    u = y[:, O:].contiguous()
    return y[:, :O], LowRank(u, B.T, at.scaling), u


def product_backward(dy_ext: Tensor, group: FusedLinear, at: LayerContext) -> Tensor:
    """Gradient of the input: [dy, dy B] [W; scaling * A]. dy_ext: filled_with_t's."""
    return dy_ext @ concat_rows_A(group, at.scaling, at.scratch)


def fill_t(dy_ext: Tensor, group: FusedLinear) -> None:
    """t = dy B of each linear into the last R columns of dy_ext [T, O + R]."""
    if group.rank:
        width = sum(group.sizes)
        room = dy_ext[:, width : width + group.rank]
        narrow_products(dy_ext, group.B, group.sizes, room)


def by_linear(u: Tensor | None, group: FusedLinear) -> list[Tensor | None]:
    """The columns of u [T, R] that belong to each linear of the group."""
    out: list[Tensor | None] = []
    column = 0
    for B in group.B:
        if B is None or u is None:
            out.append(None)
            continue
        out.append(u[:, column : column + B.shape[1]])
        column += B.shape[1]
    return out


def _heads(qkv: Tensor, cfg: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    N, K, H = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    q, k, v = qkv[:, : (N + 2 * K) * H].split((N * H, K * H, K * H), dim=1)
    return q.unflatten(1, (N, H)), k.unflatten(1, (K, H)), v.unflatten(1, (K, H))


# -------------------------------------------------------------------------------------- forward


def make_qkv(
    h_ext: Tensor, u: Tensor | None, layer: ExplicitLayer, at: LayerContext
) -> tuple[Tensor, Tensor]:
    """q and k turned, and v; u of the three."""
    qkv, u = product(h_ext, u, layer.qkv, at)
    rope_(qkv, at.cos, at.sin, at.cfg.num_attention_heads + at.cfg.num_key_value_heads)
    return qkv, u


def make_mid(
    x_TD: Tensor, attended: Attended, layer: ExplicitLayer, at: LayerContext
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(x + attention's output, its norm with room for u, 1 / rms, u of o_proj)."""
    y, update, u = product_and_update(attended.out_TNH.flatten(1), layer.o, at)
    mid, h_ext, rstd = add_rms_norm(
        x_TD, y, layer.norm2, at.cfg.rms_norm_eps, delta=update, rank_columns=layer.gate_up.rank
    )
    return mid, h_ext, rstd, u


def forward(
    x_TD: Tensor,
    h_ext: Tensor,
    rstd: Tensor,
    layer: ExplicitLayer,
    next_norm: Tensor,
    next_extra: int,
    at: LayerContext,
) -> tuple[Tensor, Tensor, Tensor, Saved]:
    """(x of the next layer, its norm with room for u, 1 / rms, what the backward pass could want).

    h_ext, rstd: the same of this layer's input.
    """
    cfg = at.cfg
    qkv, u_qkv = make_qkv(h_ext, None, layer, at)
    u_qkv = u_qkv.contiguous()
    attended = attend(*_heads(qkv, cfg), at.layout)
    mid, h_ext, rstd2, u_o = make_mid(x_TD, attended, layer, at)
    y, update, gate_up, u_gate_up, u_down = make_mlp(h_ext, layer, at)
    del h_ext
    x_next, h_next, rstd_next = add_rms_norm(
        mid, y, next_norm, cfg.rms_norm_eps, delta=update, rank_columns=next_extra
    )
    small = AlwaysSaved(rstd, rstd2, u_qkv, u_o, u_gate_up, u_down)
    return x_next, h_next, rstd_next, Saved(x_TD, qkv, attended, mid, gate_up, small)


def make_mlp(
    h_ext: Tensor, layer: ExplicitLayer, at: LayerContext
) -> tuple[Tensor, LowRank | None, Tensor | None, Tensor, Tensor | None]:
    """(y of down_proj, its LoRA update, [gate, up] unless in chunks, u of both, u of down_proj)."""
    F, down = at.cfg.intermediate_size, layer.down
    if at.mlp_chunks == 1:
        gate_up, u = product(h_ext, None, layer.gate_up, at)
        y, update, u_down = product_and_update(swiglu_kernel(gate_up, F), down, at)
        return y, update, gate_up, u.contiguous(), u_down
    T, (D, _) = h_ext.shape[0], down.weight.shape
    y_ext = empty_rows(T, D + down.rank, h_ext)
    for rows in mlp_rows(T, at):
        a = swiglu_kernel(product(h_ext[rows], None, layer.gate_up, at)[0], F)
        torch.mm(a, concat_rows_A(down, 1.0, at.scratch).T, out=y_ext[rows])
    u = h_ext[:, D:].contiguous()  # `product` left it there
    (B,) = down.B
    if B is None:
        return y_ext, None, None, u, None
    u_down = y_ext[:, D:].contiguous()
    return y_ext[:, :D], LowRank(u_down, B.T, at.scaling), None, u, u_down


def mlp_rows(T: int, at: LayerContext) -> list[slice]:
    """The rows of each chunk of the MLP: as many as some of the ordered splits have together."""
    size = -(-T // at.mlp_chunks)
    size = -(-size // 64) * 64
    return [slice(start, min(start + size, T)) for start in range(0, T, size)]


def complete(saved: Saved, layer: ExplicitLayer, at: LayerContext) -> tuple[Saved, Tensor | None]:
    """Compute again what was not kept, but for gate and up; and the MLP's input if it came along.

    down_proj never is: nothing needs its output.
    """
    x, qkv, attended, mid, gate_up, small = saved
    assert x is not None
    if qkv is None:
        h_ext = normalise(x, layer.norm1, small.rstd1, rank_columns=layer.qkv.rank)
        qkv, _ = make_qkv(h_ext, small.u_qkv, layer, at)
    if attended is None:
        attended = attend(*_heads(qkv, at.cfg), at.layout)
    h_ext = None
    if mid is None:
        mid, h_ext, _, _ = make_mid(x, attended, layer, at)
    return Saved(x, qkv, attended, mid, gate_up, small), h_ext


# ------------------------------------------------------------------------------------- backward


def backward(
    dx_ext: Tensor,
    kept: list[Saved],
    layer: ExplicitLayer,
    extra_below: int,
    at: LayerContext,
    last: bool,
) -> Tensor | None:
    """Gradient of the layer's input; the layer's adapters' gradients are added to layer.grads.

    dx_ext: [T, D + R], the gradient of the layer's output, with room for down_proj's rank. Returns
    the same for the layer below, [T, D + extra_below]; None where last: below is the frozen
    embedding, which needs none. kept: what the layer saved, as its one element: it is taken out, so
    that gate and up are free memory by the time attention needs some.
    """
    saved = kept.pop()
    saved, h_ext = complete(saved, layer, at)
    dmid_ext = _mlp_backward(dx_ext, saved, h_ext, layer, at)
    del h_ext
    saved = saved._replace(gate_up=None)
    dx_below = _attention_backward(dmid_ext, saved, layer, extra_below, at, last)
    reduce_partials(layer.partials, layer.grads, at.scaling)
    return dx_below


def _mlp_backward(
    dx_ext: Tensor, saved: Saved, h_ext: Tensor | None, layer: ExplicitLayer, at: LayerContext
) -> Tensor:
    D, F, T = at.cfg.hidden_size, at.cfg.intermediate_size, dx_ext.shape[0]
    mid, small, down, group = saved.mid_TD, saved.small, layer.down, layer.gate_up
    assert mid is not None
    chunks = [slice(0, T)] if saved.gate_up is not None else mlp_rows(T, at)
    share = layer.partials.shape[0] // (1 if len(chunks) == 1 else at.mlp_chunks)
    layer.partials[len(chunks) * share :].zero_()  # splits of chunks that have no rows
    fill_t(dx_ext, down)
    dy, t = dx_ext[:, :D], dx_ext[:, D:] if down.rank else None
    _add_dB(small.u_down, dy, down)
    if saved.gate_up is None and h_ext is None:
        h_ext = normalise(mid, layer.norm2, small.rstd2, rank_columns=group.rank)
    lefts = (*by_linear(small.u_gate_up, group), t)
    sums = (*group.dB, down.dA)
    dh = torch.empty((T, D), dtype=dx_ext.dtype, device=dx_ext.device)
    t_gate_up = dx_ext.new_empty((T, group.rank))
    for i, rows in enumerate(chunks):
        gate_up = saved.gate_up
        if gate_up is None:
            assert h_ext is not None
            u = None if small.u_gate_up is None else small.u_gate_up[rows]
            gate_up, _ = product(h_ext[rows], u, group, at)
        da = product_backward(dx_ext[rows], down, at)
        splits = slice(i * share, (i + 1) * share)
        swiglu_backward_(
            gate_up,
            da,
            lefts=tuple(None if x is None else x[rows] for x in lefts),  # pyright: ignore
            partials=tuple(None if x is None else x[splits] for x in sums),  # pyright: ignore
        )
        del da
        fill_t(gate_up, group)
        torch.mm(gate_up, concat_rows_A(group, at.scaling, at.scratch), out=dh[rows])
        t_gate_up[rows] = gate_up[:, 2 * F :]
        del gate_up
    if group.dA is not None:  # the input of gate and up is mid / rms(mid) * weight
        outer_sum(t_gate_up, mid, group.dA, row_scale_T=small.rstd2, column_scale_N=layer.norm2)
    return rms_norm_backward(
        dh, mid, layer.norm2, small.rstd2, dresidual_TD=dy, rank_columns=layer.o.rank
    )


def _attention_backward(
    dmid_ext: Tensor,
    saved: Saved,
    layer: ExplicitLayer,
    extra_below: int,
    at: LayerContext,
    last: bool,
) -> Tensor | None:
    D, group, small = at.cfg.hidden_size, layer.qkv, saved.small
    x, qkv, attended = saved.x_TD, saved.qkv, saved.attended
    assert x is not None and qkv is not None and attended is not None
    fill_t(dmid_ext, layer.o)
    dmid = dmid_ext[:, :D]
    do = product_backward(dmid_ext, layer.o, at)
    if layer.o.dA is not None:
        outer_sum(dmid_ext[:, D:], attended.out_TNH.flatten(1), layer.o.dA)
    _add_dB(small.u_o, dmid, layer.o)
    q, k, v = _heads(qkv, at.cfg)
    grads = attend_backward(do.view_as(attended.out_TNH), q, k, v, attended, at.layout)
    del do, q, k, v
    width = sum(group.sizes)
    us = by_linear(small.u_qkv, group)
    rope_backward(grads, at.cos, at.sin, qkv[:, :width], us=tuple(us), partials=group.dB)  # pyright: ignore
    del grads
    fill_t(qkv, group)  # where q, k and v were, their gradients are now
    if group.dA is not None:
        outer_sum(qkv[:, width:], x, group.dA, row_scale_T=small.rstd1, column_scale_N=layer.norm1)
    if last:
        return None
    dh = product_backward(qkv, group, at)
    return rms_norm_backward(
        dh, x, layer.norm1, small.rstd1, dresidual_TD=dmid, rank_columns=extra_below
    )


def _add_dB(u: Tensor | None, dy_TO: Tensor, group: FusedLinear) -> None:
    """dB = dy^T u of a group of one."""
    if u is not None and group.dB[0] is not None:
        outer_sum(u, dy_TO, group.dB[0].transpose(1, 2))
