"""Build the explicit pass from a model: fused weights, adapters in the compute dtype, buffers."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minisft.explicit.block import ExplicitLayer, FusedLinear, scratch_numel, write_weight
from minisft.explicit.graphs import Graphs
from minisft.explicit.offload import Host
from minisft.explicit.policy import Policy
from minisft.kernels.low_rank import row_stride
from minisft.kernels.nf4 import NF4Weight, side_by_side
from minisft.llama import Compute, Weights, head_weight
from minisft.lora import Flat, allocate, viewed
from minisft.rope import rope_inverse_frequencies

# dA and dB are sums over tokens: 8 parallel partial sums, added in a fixed order (no atomics).
SPLITS = 8

Frozen = dict[str, Tensor | NF4Weight]
# Linears that read the same input are fused into one weight.
GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@dataclass
class ExplicitPass:
    """A model prepared for the explicit pass, with all buffers, which are allocated once."""

    layers: list[ExplicitLayer]
    embedding: Tensor  # [V, D]
    norm: Tensor  # [D]
    head: Tensor  # [V, D]
    adapters: Flat  # the trained A and B in the compute dtype, ranks as in `padded_shapes`
    sums: Flat  # float32: their gradient; every layer adds to its slice
    grads: Flat  # the same without the padding of ranks; `sums` itself if there is none
    loss: Tensor  # float32 []: sum over the targets so far
    loss_weight: Tensor  # float32 [1]: scales the loss before the backward pass
    scratch: Tensor  # 1-D: one decoded weight at a time
    rope: tuple[Tensor, float]  # frequencies float32 [1, H/2], and the factor on cos and sin
    compute: Compute
    policies: list[Policy]  # one per layer
    chunk: int  # rows of logits alive at once
    mlp_tokens: int  # tokens per chunk of the MLP, if gate_up is not saved
    host: Host
    graphs: Graphs


def padded_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of A and B with the rank rounded up to a multiple of eight.

    The added rows of A and columns of B are zero, and so are their gradients.
    """
    # Matmuls whose inner dimension is not a multiple of eight are slow: a 1B model trained at
    # 61,143 tokens/s with rank 4, and at 85,270 with rank 4 padded to 8.
    return {
        name: (row_stride(rows), columns) if ".lora_A." in name else (rows, row_stride(columns))
        for name, (rows, columns) in shapes.items()
    }


def prepare(
    trainable: Flat,
    frozen: Frozen,
    compute: Compute,
    policies: list[Policy],
    *,
    chunk: int,
    max_tokens: int,
    mlp_tokens: int = 8192,
) -> ExplicitPass:
    """Build the explicit pass over these weights and allocate all its buffers.

    Replaces linears in the dict `frozen` by views of the fused weights. policies: one per layer.
    chunk: rows of logits computed at a time. max_tokens: tokens of the largest micro-batch.
    mlp_tokens: tokens per chunk of the MLP.
    """
    cfg, device = compute.model, trainable.buffer.device
    shapes = padded_shapes(trainable.shapes)
    sums = allocate(shapes, device)
    adapters = viewed(torch.zeros_like(sums.buffer, dtype=compute.dtype), shapes)
    layers = _layers(frozen, adapters, sums.buffer, cfg.num_hidden_layers)
    linears = [x for y in layers for x in (y.qkv, y.o, y.gate_up, y.down)]
    # Only one weight is decoded at a time, so all weights share scratch sized for the largest.
    scratch = max(scratch_numel((x.weight.shape[0], x.weight.shape[1]), x.rank) for x in linears)
    inverse, factor = rope_inverse_frequencies(cfg.rope, cfg.head_dim, cfg.max_position_embeddings)
    return ExplicitPass(
        layers=layers,
        embedding=_dense(frozen, "model.embed_tokens.weight"),
        norm=_dense(frozen, "model.norm.weight"),
        head=head_weight({}, frozen, cfg, compute.dtype),
        adapters=adapters,
        sums=sums,
        grads=sums if shapes == trainable.shapes else allocate(trainable.shapes, device),
        loss=torch.zeros((), dtype=torch.float32, device=device),
        loss_weight=torch.ones(1, dtype=torch.float32, device=device),
        scratch=torch.empty(scratch, dtype=compute.dtype, device=device),
        rope=(inverse.to(device).unsqueeze(0), factor),
        compute=compute,
        policies=policies,
        chunk=chunk,
        mlp_tokens=mlp_tokens,
        host=Host(device, max_tokens),
        graphs=Graphs(device),
    )


def _layers(frozen: Frozen, adapters: Flat, sums: Tensor, count: int) -> list[ExplicitLayer]:
    """Build all layers; layer.grads is a slice of sums, float32 [n], which is in layer order."""
    sizes = [0] * count
    for name, view in adapters.views.items():
        sizes[int(name.split(".")[2])] += view.numel()
    # All layers share one buffer: its splits are added up before the next layer's backward pass.
    partials = torch.empty((SPLITS, max(sizes)), dtype=torch.float32, device=sums.device)
    layers, start = [], 0
    for i, size in enumerate(sizes):
        prefix, mine = f"model.layers.{i}.", partials[:, :size]
        linears = {
            key: _fused_linear([prefix + n for n in names], frozen, adapters, mine, start)
            for key, names in GROUPS.items()
        }
        layers.append(
            ExplicitLayer(
                norm1=_dense(frozen, prefix + "input_layernorm.weight"),
                norm2=_dense(frozen, prefix + "post_attention_layernorm.weight"),
                partials=mine,
                grads=sums[start : start + size],
                **linears,
            )
        )
        start += size
    return layers


def _dense(frozen: Weights, name: str) -> Tensor:
    weight = frozen[name]
    assert isinstance(weight, Tensor), f"{name} is never in 4 bits"
    return weight


def _fused_linear(
    paths: list[str], frozen: Frozen, adapters: Flat, partials: Tensor, layer_start: int
) -> FusedLinear:
    """Fuse the linears at these module paths. layer_start: the layer's offset in flat buffers."""
    weight, sizes = _fuse_weights([f"{p}.weight" for p in paths], frozen, adapters.buffer)

    def partials_of(view: Tensor) -> Tensor:
        start = int(view.storage_offset()) - layer_start
        return partials[:, start : start + view.numel()].unflatten(1, view.shape)

    As = [adapters.views[n] for p in paths if (n := f"{p}.lora_A.weight") in adapters.views]
    B = tuple(adapters.views.get(f"{p}.lora_B.weight") for p in paths)
    A = None
    if As:
        # These A are adjacent in the flat buffer (`lora._adapter_order`), so a view joins them.
        I = weight.shape[1]
        A = As[0].as_strided((sum(a.shape[0] for a in As), I), (I, 1))
    dA = None if A is None else partials_of(A)
    dB = tuple(None if b is None else partials_of(b) for b in B)
    return FusedLinear(weight, sizes, A, B, dA, dB)


def _fuse_weights(
    names: list[str], frozen: Frozen, like: Tensor
) -> tuple[Tensor | NF4Weight, tuple[int, ...]]:
    """Concatenate the rows of these weights; return (fused weight, number of rows of each)."""
    weights = [frozen[n] for n in names]
    sizes = tuple(w.shape[0] for w in weights)
    four_bit = [w for w in weights if isinstance(w, NF4Weight)]
    if len(weights) == 1:
        return weights[0], sizes
    # Replace weights in the caller's dict by views of the fused weight: this frees the originals.
    if len(four_bit) == len(weights) and (joined := side_by_side(four_bit)):
        fused, views = joined
        frozen.update(zip(names, views, strict=True))
        return fused, sizes
    # Decode 4-bit weights that `side_by_side` cannot join. The 4-bit originals also stay in memory,
    # because the dict of frozen weights refers to them.
    fused = like.new_empty((sum(sizes), weights[0].shape[1]))
    for weight, part in zip(weights, fused.split(sizes), strict=True):
        write_weight(weight, part)
    if not four_bit:
        frozen.update(zip(names, fused.split(sizes), strict=True))
    return fused, sizes
