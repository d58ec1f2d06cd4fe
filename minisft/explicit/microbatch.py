"""Loss and gradients of a micro-batch by the hand-written pass: layers, head, layers backwards.

Static shapes, no autograd, no reading back: on a GPU the whole of it is captured in a CUDA graph,
one for each bucket of shapes, and replayed.

T tokens  M targets  D hidden  V vocab
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.batches import MicroBatch, StepBatch
from minisft.explicit.attention import Layout
from minisft.explicit.block import (
    ExplicitLayer,
    FusedLinear,
    LayerContext,
    Saved,
    backward,
    forward,
    place_weight,
)
from minisft.explicit.offload import Host
from minisft.explicit.policy import Policy, mlp_chunks
from minisft.kernels.linear_cross_entropy import linear_cross_entropy_grad
from minisft.kernels.low_rank import row_stride
from minisft.kernels.nf4 import NF4Weight, side_by_side
from minisft.kernels.rms_norm import add_rms_norm, rms_norm_backward
from minisft.llama import Compute, Weights, head_weight
from minisft.lora import Flat, allocate, viewed
from minisft.rope import cos_and_sin, rope_inverse_frequencies

SPLITS = 8  # of the tokens, in the sums that make dA and dB

GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@dataclass
class ExplicitPass:
    """A model prepared for the hand-written pass. Buffers are allocated once."""

    layers: list[ExplicitLayer]
    embedding: Tensor
    norm: Tensor
    head: Tensor
    shadow: Flat  # the adapters in the compute dtype, their ranks as in `whole_ranks`
    sums: Flat  # float32: the gradient of these, which the layers add to
    grads: Flat  # the same in the shapes of the trainable buffer; `sums` itself where they agree
    loss: Tensor  # float32 []: sum over the targets so far
    weight: Tensor  # float32 [1]: what the loss is multiplied by before the backward pass
    scratch: Tensor
    rope: tuple[Tensor, float]  # frequencies float32 [1, H/2], and the factor on cos and sin
    compute: Compute
    policies: list[Policy]  # of each layer
    chunk: int  # rows of logits alive at once
    mlp_tokens: int  # tokens that go through the MLP at a time, where gate and up are not kept
    host: Host
    graphs: dict[tuple, Graph] = field(default_factory=dict)
    stream: torch.cuda.Stream | None = None  # one for all work, so that cuBLAS has one workspace
    pool: Any = None  # memory that all graphs share: only one runs at a time


@dataclass
class Graph:
    """The tensors that a bucket's micro-step reads, and once it was seen twice, its capture."""

    inputs: StaticBatch
    captured: torch.cuda.CUDAGraph | None = None


@dataclass(frozen=True)
class StaticBatch:
    """A micro-batch padded to a bucket: what a graph reads. Padding trains nothing.

    targets_M of -1 stand for no target; dense: target i belongs to token i and rows are not read.
    """

    input_ids_T: Tensor
    position_ids_T: Tensor
    rows_M: Tensor
    targets_M: Tensor
    layout: Layout
    dense: bool

    def to(self, device: torch.device) -> StaticBatch:
        """A copy on the device."""
        tensors = (t.to(device, copy=True) for t in self._tensors())
        ids, positions, rows, targets, cu = tensors
        return StaticBatch(
            ids, positions, rows, targets, self.layout._replace(cu_seqlens=cu), self.dense
        )

    def copy_into(self, other: StaticBatch) -> None:
        """Overwrite the tensors of a batch of the same bucket."""
        for source, target in zip(self._tensors(), other._tensors(), strict=True):
            target.copy_(source.pin_memory(), non_blocking=True)

    def _tensors(self) -> tuple[Tensor, ...]:
        return (
            self.input_ids_T, self.position_ids_T, self.rows_M, self.targets_M,
            self.layout.cu_seqlens,
        )  # fmt: skip

    def key(self) -> tuple:
        """What a graph is captured for."""
        return (
            len(self.input_ids_T), len(self.targets_M), len(self.layout.cu_seqlens),
            self.layout.longest, self.layout.dense, self.dense,
        )  # fmt: skip


_PLAIN_LORA = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.lora_[AB]\.weight")


def unsupported_reason(
    trainable: Flat, frozen: Weights, compute: Compute, device: torch.device | None = None
) -> str:
    """Why the hand-written pass does not cover this run ("" where it does).

    device: where it computes, if not where the trained tensors lie (a dry run's lie nowhere).
    """
    on_gpu = (device or trainable.buffer.device).type == "cuda"
    if compute.lora_dropout:
        return "LoRA dropout"
    if compute.loss_type != "nll" or compute.label_smoothing:
        return "a loss other than plain nll"
    if compute.neftune_alpha:
        return "NEFTune noise"
    if any(name.endswith("magnitude_vector") for name in trainable.views):
        return "DoRA"
    if any(".lora_embedding_" in name for name in trainable.views):
        return "an adapter on the embedding"
    ranks = {v.shape[0] for n, v in trainable.views.items() if n.endswith(".lora_A.weight")}
    if compute.lora_ratios or len(ranks) > 1:
        return "ranks or scales of single modules"
    head_dim = compute.model.head_dim
    if on_gpu and (head_dim < 32 or head_dim & (head_dim - 1)):
        return f"head_dim {head_dim}, which is no power of two from 32 up"
    if on_gpu and compute.dtype == torch.float32:
        return "float32"
    if not all(_PLAIN_LORA.fullmatch(name) for name in trainable.views):
        return "trained tensors beside plain LoRA on the linears"
    if any(name.endswith("_proj.bias") for name in frozen):
        return "biases"
    if compute.model.rope.rope_type == "dynamic":
        return "RoPE that depends on the document's length"
    return ""


def whole_ranks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of A and B that the pass computes with: ranks rounded up to a multiple of eight.

    The rows of A and columns of B beyond the rank are zeros, and so are their gradients. A step
    whose products have another inner dimension takes half as long again (scripts/LOG.md).
    """
    return {
        name: (row_stride(rows), columns) if ".lora_A." in name else (rows, row_stride(columns))
        for name, (rows, columns) in shapes.items()
    }


def prepare(
    trainable: Flat,
    frozen: dict[str, Tensor | NF4Weight],
    compute: Compute,
    policies: list[Policy],
    *,
    chunk: int,
    max_tokens: int,
    mlp_tokens: int = 8192,
) -> ExplicitPass:
    """Views and buffers for the hand-written pass.

    4-bit weights that read one input are laid side by side, group by group; `frozen` keeps views of
    them, so that nothing is stored twice.
    """
    cfg, dtype = compute.model, compute.dtype
    device = trainable.buffer.device
    shapes = whole_ranks(trainable.shapes)
    sums = allocate(shapes, device)
    grads = sums if shapes == trainable.shapes else allocate(trainable.shapes, device)
    shadow = viewed(torch.zeros_like(sums.buffer, dtype=dtype), shapes)
    spans = [_layer_span(shadow, i) for i in range(cfg.num_hidden_layers)]
    most = max(stop - start for start, stop in spans)
    partials = torch.empty((SPLITS, most), dtype=torch.float32, device=device)
    layers, largest = [], 0
    for i, (start, stop) in enumerate(spans):
        mine = partials[:, : stop - start]
        prefix = f"model.layers.{i}."
        groups = {
            key: _group([prefix + n for n in names], frozen, shadow, mine, start)
            for key, names in GROUPS.items()
        }
        for group in groups.values():
            O, I = group.weight.shape
            largest = max(largest, (O + group.rank) * I, O * row_stride(I + group.rank))
        layers.append(
            ExplicitLayer(
                norm1=_tensor(frozen, prefix + "input_layernorm.weight"),
                norm2=_tensor(frozen, prefix + "post_attention_layernorm.weight"),
                partials=mine,
                grads=sums.buffer[start:stop],
                **groups,
            )
        )
    frequencies, factor = rope_inverse_frequencies(
        cfg.rope, cfg.head_dim, cfg.max_position_embeddings
    )
    return ExplicitPass(
        rope=(frequencies.to(device).unsqueeze(0), factor),
        layers=layers,
        embedding=_tensor(frozen, "model.embed_tokens.weight"),
        norm=_tensor(frozen, "model.norm.weight"),
        head=head_weight({}, frozen, cfg, dtype),
        shadow=shadow,
        sums=sums,
        grads=grads,
        loss=torch.zeros((), dtype=torch.float32, device=device),
        weight=torch.ones(1, dtype=torch.float32, device=device),
        scratch=torch.empty(largest, dtype=dtype, device=device),
        compute=compute,
        policies=policies,
        chunk=chunk,
        mlp_tokens=mlp_tokens,
        host=Host(device, max_tokens),
    )


def _tensor(frozen: Weights, name: str) -> Tensor:
    weight = frozen[name]
    assert isinstance(weight, Tensor), f"{name} is never in 4 bits"
    return weight


def _layer_span(shadow: Flat, i: int) -> tuple[int, int]:
    mine = [v for name, v in shadow.views.items() if name.startswith(f"model.layers.{i}.")]
    return (int(mine[0].storage_offset()), _end(mine[-1])) if mine else (0, 0)


def _end(view: Tensor) -> int:
    return int(view.storage_offset()) + view.numel()


def _group(
    paths: list[str],
    frozen: dict[str, Tensor | NF4Weight],
    shadow: Flat,
    partials: Tensor,
    first: int,
) -> FusedLinear:
    names = [f"{p}.weight" for p in paths]
    weights = [frozen[n] for n in names]
    sizes = tuple(w.shape[0] for w in weights)
    if len(weights) == 1:
        weight = weights[0]
    elif joined := _four_bit_side_by_side(weights):
        weight, views = joined
        frozen.update(zip(names, views, strict=True))
    else:
        weight = _dense_side_by_side(weights, shadow.buffer)
        if not any(isinstance(w, NF4Weight) for w in weights):
            frozen.update(zip(names, weight.split(sizes), strict=True))

    def sums(view: Tensor) -> Tensor:
        """Where the sums over tokens of a tensor's gradient go, [S, *its shape]."""
        return partials[:, view.storage_offset() - first : _end(view) - first].unflatten(
            1, view.shape
        )

    As = [shadow.views[n] for p in paths if (n := f"{p}.lora_A.weight") in shadow.views]
    Bs = tuple(shadow.views.get(f"{p}.lora_B.weight") for p in paths)
    A = None
    if As:  # neighbours in the buffer: one matrix, one below the other
        A = shadow.buffer[As[0].storage_offset() : _end(As[-1])].view(-1, weight.shape[1])
    return FusedLinear(
        weight=weight,
        sizes=sizes,
        A=A,
        B=Bs,
        dA=None if A is None else sums(A),
        dB=tuple(None if B is None else sums(B) for B in Bs),
    )


def _four_bit_side_by_side(
    weights: list[Tensor | NF4Weight],
) -> tuple[NF4Weight, list[NF4Weight]] | None:
    four_bit = [w for w in weights if isinstance(w, NF4Weight)]
    return side_by_side(four_bit) if len(four_bit) == len(weights) else None


def _dense_side_by_side(weights: list[Tensor | NF4Weight], like: Tensor) -> Tensor:
    rows = [w.shape[0] for w in weights]
    out = like.new_empty((sum(rows), weights[0].shape[1]))
    for weight, part in zip(weights, out.split(rows), strict=True):
        place_weight(weight, part)
    return out


# -------------------------------------------------------------------------------------- a step

_MOST_GRAPHS = 32  # further buckets are launched kernel by kernel


def explicit_loss_and_grads(
    fast: ExplicitPass, trainable: Flat, batch: StepBatch, loss_scale: float
) -> tuple[Tensor, Tensor]:
    """The token-mean loss of a step, [] float32, and its gradient, float32 [n].

    The micro-batches lie on the CPU. Nothing is read back from the device.
    """
    load_(fast, trainable)
    fast.sums.buffer.zero_()
    fast.loss.zero_()
    fast.weight.fill_(loss_scale / max(1, batch.num_loss_tokens))
    for micro in batch.micro_batches:
        if micro.targets_M.numel():
            run_(fast, bucketed(micro))
    grads = gathered(fast)
    if loss_scale != 1:
        grads.mul_(1 / loss_scale)
    return fast.loss / max(1, batch.num_loss_tokens), grads


def load_(fast: ExplicitPass, trainable: Flat) -> None:
    """The trained adapters into fast.shadow, in its dtype."""
    if fast.grads is fast.sums:  # no rank was rounded up
        fast.shadow.buffer.copy_(trainable.buffer)
        return
    for name, view in trainable.views.items():
        _corner(fast.shadow.views[name], view).copy_(view)


def gathered(fast: ExplicitPass) -> Tensor:
    """The gradient that the layers have added up, float32 [n] as the trainable buffer."""
    if fast.grads is not fast.sums:
        for name, view in fast.grads.views.items():
            view.copy_(_corner(fast.sums.views[name], view))
    return fast.grads.buffer


def _corner(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a matrix of a rank rounded up that is of the rank itself."""
    return whole[: like.shape[0], : like.shape[1]]


def run_(fast: ExplicitPass, batch: StaticBatch) -> None:
    """One micro-batch: kernel by kernel the first time its bucket is seen, then as a graph."""
    device = fast.loss.device
    if device.type != "cuda":
        micro_step_(fast, batch)
        return
    if fast.stream is None:
        fast.stream, fast.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    current = torch.cuda.current_stream(device)
    fast.stream.wait_stream(current)
    with torch.cuda.stream(fast.stream):
        graph = fast.graphs.get(batch.key())
        if graph is None:
            inputs = batch.to(device)
            if len(fast.graphs) < _MOST_GRAPHS:
                fast.graphs[batch.key()] = Graph(inputs)
            micro_step_(fast, inputs)
        else:
            batch.copy_into(graph.inputs)
            if graph.captured is None:
                _capture_(fast, graph)
            assert graph.captured is not None
            graph.captured.replay()
    current.wait_stream(fast.stream)


def _capture_(fast: ExplicitPass, graph: Graph) -> None:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what ran kernel by kernel lies in memory that a graph cannot use
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, pool=fast.pool, stream=fast.stream):
        micro_step_(fast, graph.inputs)
    graph.captured = captured


# --------------------------------------------------------------------------------- a micro-batch


def bucketed(micro: MicroBatch) -> StaticBatch:
    """The micro-batch padded to sizes that few others differ from: few graphs, little padding."""
    lengths = micro.tokens.documents.lengths
    n = sum(lengths)
    tokens = bucket_tokens(n)
    if tokens == n and len(set(lengths)) == 1:  # dense: no padding, no further documents
        return pad(micro, n, len(lengths), _targets(micro, n), lengths[0])
    longest = min(tokens, max(1024, 1 << (max(lengths) - 1).bit_length()))
    documents = len(lengths) + 1 + (tokens - n) // longest
    documents = _round_up(documents, 16 if documents <= 32 else 32)
    return pad(micro, tokens, documents, _targets(micro, tokens), longest)


def bucket_tokens(n: int) -> int:
    """The tokens of the bucket that n tokens go into: never fewer for more."""
    return _round_up(n, 256 if n <= 4096 else 512)


def _targets(micro: MicroBatch, tokens: int) -> int:
    share = _round_up(len(micro.targets_M), max(1, tokens // 4))
    return tokens if share > 0.8 * tokens else share


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def pad(micro: MicroBatch, tokens: int, documents: int, targets: int, longest: int) -> StaticBatch:
    """The micro-batch in a bucket of that many tokens, documents and targets, on its own device.

    Padding tokens are documents of their own at the end; further documents are empty.
    """
    ids, positions = micro.tokens.input_ids_T, micro.tokens.position_ids_T
    device = ids.device
    lengths = list(micro.tokens.documents.lengths)
    uniform = lengths[0] if len(set(lengths)) == 1 and sum(lengths) == tokens else 0
    spare = tokens - sum(lengths)
    while spare > 0:
        lengths.append(min(spare, longest))
        spare -= lengths[-1]
    lengths += [0] * (documents - len(lengths))
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    padding = tokens - len(ids)
    dense = targets == tokens
    if dense:
        rows = torch.zeros(1, dtype=torch.int64)
        at = torch.full((tokens,), -1, dtype=torch.int64)
        at[micro.target_rows_M.cpu()] = micro.targets_M.cpu()
    else:
        more = targets - len(micro.targets_M)
        rows = F.pad(micro.target_rows_M.cpu(), (0, more))
        at = F.pad(micro.targets_M.cpu(), (0, more), value=-1)
    return StaticBatch(
        F.pad(ids, (0, padding)),
        F.pad(positions, (0, padding)),
        rows.to(device),
        at.to(device),
        Layout(cu.to(device), longest, uniform),
        dense,
    )


def micro_step_(fast: ExplicitPass, batch: StaticBatch) -> None:
    """Adds the micro-batch's loss to fast.loss, and its gradient, times fast.weight, to grads."""
    compute, cfg = fast.compute, fast.compute.model
    cos, sin = cos_and_sin(batch.position_ids_T, *fast.rope, compute.dtype)
    at = LayerContext(cfg, compute.lora_scaling, cos, sin, batch.layout, fast.scratch)
    tokens = len(batch.input_ids_T)
    layers, eps = fast.layers, cfg.rms_norm_eps
    x = F.embedding(batch.input_ids_T, fast.embedding).to(compute.dtype)
    x, h, rstd = add_rms_norm(x, None, layers[0].norm1, eps, rank_columns=layers[0].qkv.rank)
    kept: list[Saved | None] = []
    for i, layer in enumerate(layers):
        above = layers[i + 1] if i + 1 < len(layers) else None
        norm, extra = (above.norm1, above.qkv.rank) if above else (fast.norm, 0)
        here = at._replace(mlp_chunks=mlp_chunks(tokens, fast.policies[i], fast.mlp_tokens))
        x, h, rstd, saved = forward(x, h, rstd, layer, norm, extra, here)
        kept.append(fast.host.keep(i, saved, fast.policies[i]))
        del saved
    dh = _head_(fast, h, batch)
    del h
    dx = rms_norm_backward(dh, x, fast.norm, rstd, rank_columns=layers[-1].down.rank)
    del dh, x
    fast.host.start_fetching(len(layers) - 1)
    for i in range(len(layers) - 1, -1, -1):
        saved = [fast.host.fetch(i, kept[i])]
        kept[i] = None
        extra = layers[i - 1].down.rank if i else 0
        assert dx is not None
        here = at._replace(mlp_chunks=mlp_chunks(tokens, fast.policies[i], fast.mlp_tokens))
        dx = backward(dx, saved, layers[i], extra, here, last=i == 0)


def _head_(fast: ExplicitPass, h_TD: Tensor, batch: StaticBatch) -> Tensor:
    """Loss into fast.loss; the gradient of the last norm's output, [T, D]."""
    h_MD = h_TD if batch.dense else h_TD[batch.rows_M]
    loss, d_MD = linear_cross_entropy_grad(
        h_MD, fast.head, batch.targets_M, fast.weight, chunk=fast.chunk
    )
    fast.loss += loss
    if batch.dense:
        return d_MD
    return torch.zeros_like(h_TD).index_add_(0, batch.rows_M, d_MD)
