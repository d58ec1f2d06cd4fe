"""One decoder block with a hand-written backward pass. Everything saved for backward is explicit.

A frozen weight needs no gradient, so its input is not saved for it; the gradient of LoRA's A needs
that input, which is cheap to recompute. LoRA is folded into the large matmuls:
forward [x, xA^T] @ [W, sB]^T, backward [dy, dyB] @ [W; sA], with s = lora_alpha / r.

Rank columns: the last R columns of a row are reserved for x A^T or dy B. A tensor whose name has no
shape suffix (h, dx, qkv, gate_up) carries them: it is [T, width + R], R being the total rank of the
fused linear that reads or wrote it. A name with a suffix (x_TD) is exactly that shape.

T tokens  D hidden  F ffn  N query heads  K key/value heads  H head_dim  R rank  S splits of tokens
I, O  inputs and outputs of a fused linear
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
    """Linears that read one input, their rows concatenated into one weight [O, I]."""

    weight: Tensor | nf4.NF4Weight
    sizes: tuple[int, ...]  # rows of each linear
    A: Tensor | None  # [R, I]: the A of every adapted linear, rows concatenated
    B: tuple[Tensor | None, ...]  # of each linear [O_j, R_j]
    dA: Tensor | None  # float32 [S, R, I]: sums over the tokens of each split
    dB: tuple[Tensor | None, ...]  # float32 [S, O_j, R_j]

    @property
    def rank(self) -> int:
        """R, summed over the linears; 0 if none is adapted."""
        return 0 if self.A is None else self.A.shape[0]


class ExplicitLayer(NamedTuple):
    """The weights, adapters and gradient buffers of one decoder layer."""

    norm1: Tensor  # [D]: before attention
    qkv: FusedLinear
    o: FusedLinear
    norm2: Tensor  # [D]: before the MLP
    gate_up: FusedLinear
    down: FusedLinear
    # float32 [S, n]: dA and dB of the layer in the order of the flat buffer; shared by all layers
    partials: Tensor
    grads: Tensor  # float32 [n]: the layer's slice of the flat gradient


class LayerContext(NamedTuple):
    """What a layer needs besides its weights; the same for all layers but for mlp_chunks."""

    cfg: ModelConfig
    scaling: float  # lora_alpha / r
    cos: Tensor  # [T, H]
    sin: Tensor
    documents: Documents
    # 1-D, compute dtype. One buffer for all layers: a weight is decoded right before its product,
    # and the next decode overwrites it.
    scratch: Tensor
    mlp_chunks: int = 1  # the MLP processes the tokens in this many chunks; 1 if gate_up is saved


class AlwaysSaved(NamedTuple):
    """Saved under every policy: a few numbers per token."""

    rstd1: Tensor  # float32 [T]: 1 / rms of the layer's input
    rstd2: Tensor  # float32 [T]: 1 / rms of mid
    u_qkv: Tensor | None  # x A^T, [T, R]
    u_o: Tensor | None
    u_gate_up: Tensor | None
    u_down: Tensor | None


class Saved(NamedTuple):
    """Inputs of a layer's backward pass; None if the policy recomputes them."""

    x_TD: Tensor | None  # the layer's input
    qkv: Tensor | None  # q and k after RoPE, then v: [T, (N + 2K) H + R]
    attended: Attended | None
    mid_TD: Tensor | None  # x + attention's output
    gate_up: Tensor | None  # [T, 2F + R]
    small: AlwaysSaved


def write_weight(weight: Tensor | nf4.NF4Weight, out_OI: Tensor, pdl: bool = False) -> None:
    """Write the weight into `out` in out's dtype, decoding 4 bits. Rows of out may be strided.

    pdl: no kernel in flight writes the weight, so that a decode may start before its predecessor
    ends (`dequantize_into`). True of frozen weights during a step.
    """
    if isinstance(weight, nf4.NF4Weight):
        nf4.dequantize_into(weight, out_OI, pdl=pdl)
    else:
        out_OI.copy_(weight)


def scratch_numel(shape: tuple[int, int], rank: int) -> int:
    """Elements of scratch that a fused linear [O, I] of this rank needs, decoded with A or B."""
    O, I = shape
    return max((O + rank) * I, O * low_rank.row_stride(I + rank))


def concat_columns_B(linear: FusedLinear, scaling: float, scratch: Tensor) -> Tensor:
    """[W, scaling * B], [O, I + R], in scratch; B of several linears is block diagonal."""
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
    """[W; scaling * A], [O + R, I], in scratch."""
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
    """x W^T and its LoRA update [T, O + R], rank columns not written; and u = x A^T [T, R].

    x: [T, I + R]; its rank columns are overwritten with u. u: x A^T if known from the forward pass.
    """
    O, I = linear.weight.shape
    # Writes into its own input: with u in the last R columns, [x, u] is one operand of the matmul
    # and the LoRA update costs no pass over y. `make_mlp` reads u from there afterwards.
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
    """Split y = x [W; A]^T of one linear: (x W^T [T, O], its LoRA update, u = x A^T [T, R])."""
    # One matmul gives x W^T and u and reads x once, where `product` reads it twice. It pays because
    # a norm follows, which reads y anyway and adds the update u B^T then.
    (B,) = linear.B
    if B is None:
        return y, None, None
    O = linear.weight.shape[0]
    # A copy, as a view would keep all of y alive until the backward pass.
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
    """View q [T, N, H], k [T, K, H] and v [T, K, H] in qkv."""
    N, K, H = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    q, k, v = qkv[:, : (N + 2 * K) * H].split((N * H, K * H, K * H), dim=1)
    return q.unflatten(1, (N, H)), k.unflatten(1, (K, H)), v.unflatten(1, (K, H))


def make_qkv(
    h: Tensor, u: Tensor | None, layer: ExplicitLayer, ctx: LayerContext
) -> tuple[Tensor, Tensor]:
    """q and k after RoPE, then v, [T, (N + 2K) H + R]; and u of the three."""
    qkv, u = product(h, u, layer.qkv, ctx)
    rope_(qkv, ctx.cos, ctx.sin, ctx.cfg.num_attention_heads + ctx.cfg.num_key_value_heads)
    return qkv, u


def make_mid(
    x_TD: Tensor, attended: Attended, layer: ExplicitLayer, ctx: LayerContext
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(mid = x + attention's output, its norm with gate_up's rank columns, 1 / rms, u of o)."""
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
    """One layer: (its output, the next norm of it, 1 / rms, everything backward could read).

    h, rstd: norm1 of x, [T, D + R], and its 1 / rms. next_norm: the weight of the norm after this
    layer; next_rank: the rank columns of its result.
    """
    qkv, u_qkv = make_qkv(h, None, layer, ctx)
    # A copy, as u is a view of h, which is not saved.
    u_qkv = u_qkv.contiguous()
    attended = attend(*_heads(qkv, ctx.cfg), ctx.documents)
    mid, h, rstd2, u_o = make_mid(x_TD, attended, layer, ctx)
    y, update, gate_up, u_gate_up, u_down = make_mlp(h, layer, ctx)
    del h
    # The next layer's norm is fused with this layer's residual sum: the sum is read once.
    x_next, h_next, rstd_next = add_rms_norm(
        mid, y, next_norm, ctx.cfg.rms_norm_eps, delta=update, rank_columns=next_rank
    )
    small = AlwaysSaved(rstd, rstd2, u_qkv, u_o, u_gate_up, u_down)
    return x_next, h_next, rstd_next, Saved(x_TD, qkv, attended, mid, gate_up, small)


def make_mlp(
    h: Tensor, layer: ExplicitLayer, ctx: LayerContext
) -> tuple[Tensor, low_rank.LowRank | None, Tensor | None, Tensor, Tensor | None]:
    """(y of down, its LoRA update, gate_up or None if in chunks, u of gate_up, u of down).

    h: [T, D + R]; its rank columns are overwritten with u of gate_up.
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
    # `product` left each chunk's u in the rank columns of h.
    u = h[:, D:].contiguous()
    y, update, u_down = split_update(y, layer.down, ctx)
    return y, update, gate_up, u, u_down


def mlp_rows(T: int, ctx: LayerContext) -> list[slice]:
    """The rows of each chunk of the MLP, multiples of 64; fewer than mlp_chunks if T is small."""
    size = -(-T // ctx.mlp_chunks)
    size = -(-size // 64) * 64
    return [slice(start, min(start + size, T)) for start in range(0, T, size)]


def recompute(saved: Saved, layer: ExplicitLayer, ctx: LayerContext) -> tuple[Saved, Tensor | None]:
    """Recompute what was not saved, except gate_up; also return the MLP's input h if mid was not.

    Runs the forward pass's kernels on the same inputs, so that no policy changes a bit.
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
    # down_proj is never recomputed: backward reads no output of it.
    return Saved(x, qkv, attended, mid, gate_up, small), h


def backward(
    dx: Tensor,
    slot: list[Saved],
    layer: ExplicitLayer,
    previous_rank: int | None,
    ctx: LayerContext,
) -> Tensor | None:
    """Gradient of the layer's input [T, D + previous_rank]; adds those of A and B to layer.grads.

    dx: gradient of the layer's output [T, D + R]; its rank columns, down's, are overwritten. slot:
    a list with the layer's Saved as its one element; it is emptied. previous_rank: of the previous
    layer's down; None for the first layer, whose input gradient nothing needs: returns None.
    """
    # Emptying the caller's list removes its reference to gate_up, which is then freed before
    # attention's backward pass allocates.
    saved, h = recompute(slot.pop(), layer, ctx)
    dmid = _mlp_backward(dx, saved, h, layer, ctx)
    del h
    saved = saved._replace(gate_up=None)
    dx_previous = _attention_backward(dmid, saved, layer, previous_rank, ctx)
    # The splits are added in a fixed order, so that gradients are the same bits in every run.
    low_rank.reduce_partials(layer.partials, layer.grads, ctx.scaling)
    return dx_previous


def _mlp_backward(
    dx: Tensor, saved: Saved, h: Tensor | None, layer: ExplicitLayer, ctx: LayerContext
) -> Tensor:
    """Gradient of mid, [T, D + R] with o's rank columns; writes dA and dB of gate_up and down."""
    D, T, rstd2 = ctx.cfg.hidden_size, dx.shape[0], saved.small.rstd2
    mid, small, down, linear = saved.mid_TD, saved.small, layer.down, layer.gate_up
    assert mid is not None
    chunks = mlp_rows(T, ctx)
    share = layer.partials.shape[0] // (1 if len(chunks) == 1 else ctx.mlp_chunks)
    # Each chunk owns a share of the S splits. With fewer chunks than mlp_chunks nothing writes the
    # last shares, which hold another layer's sums.
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
        # gate_up becomes its own gradient: a second [T, 2F] would raise the peak. The sums over
        # tokens are formed here too, while gate, up and their product are in registers.
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
        # The input of gate and up is mid / rms(mid) * norm2: two scales spare a recomputed h.
        low_rank.outer_sum(t_TR, mid, linear.dA, row_scale_T=rstd2, column_scale_N=layer.norm2)
    return rms_norm_backward(
        dh_TD, mid, layer.norm2, rstd2, dresidual_TD=dy_TD, rank_columns=layer.o.rank
    )


def _attention_backward(
    dmid: Tensor, saved: Saved, layer: ExplicitLayer, previous_rank: int | None, ctx: LayerContext
) -> Tensor | None:
    """Gradient of the layer's input, as `backward`; writes dA and dB of qkv and o.

    dmid: gradient of mid [T, D + R]; its rank columns, o's, are overwritten.
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
    # qkv becomes its own gradient: nothing reads q, k and v any more, and the rank columns next to
    # them make the gradient one operand of the matmul below.
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
    """Write dB = dy^T u, in splits, for a FusedLinear of a single linear."""
    if u is not None and linear.dB[0] is not None:
        low_rank.outer_sum(u, dy_TO, linear.dB[0].transpose(1, 2))
