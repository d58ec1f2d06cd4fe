"""Predict the cost of a choice of memory policies: bytes on the GPU and seconds per token.

Bytes are computed exactly from what the pass allocates. Seconds are a rough estimate, which is only
used to rank choices. Rates are those of an H200. mlp: tokens per chunk of the MLP.

T tokens  D hidden  F ffn  N query heads  K key/value heads  H head_dim  V vocab  [O, I] of a linear
"""

import itertools
import math
from collections import Counter

from minisft.config.model import ModelConfig
from minisft.explicit.block import scratch_numel
from minisft.explicit.buffers import GROUPS, SPLITS, padded_shapes
from minisft.explicit.policy import Dims, Policy, mlp_chunks, part_bytes, saved_bytes
from minisft.kernels.low_rank import row_stride
from minisft.lora import Flat

_FLOPS = 520e12  # per second, of matmuls and attention in a step
_BYTES = 3.2e12  # per second, of a decode
_HOST_BYTES = 51e9  # per second and direction, between GPU and host
_LAYER_S = 70e-6  # seconds per layer and micro-batch that do not depend on its size
# Copies slow down concurrent compute: by 3 % for a 1B model with copies in every layer.
_CONTENTION = 0.03


def group_ranks(trainable: Flat, cfg: ModelConfig) -> dict[str, int]:
    """Return the most rank columns that each fused linear has in any layer; ranks are padded."""

    def rank(i: int, paths: tuple[str, ...]) -> int:
        names = (f"model.layers.{i}.{path}.lora_A.weight" for path in paths)
        return sum(row_stride(trainable.views[n].shape[0]) for n in names if n in trainable.views)

    layers = range(cfg.num_hidden_layers)
    return {group: max(rank(i, paths) for i in layers) for group, paths in GROUPS.items()}


def group_shapes(cfg: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return the weight shape [O, I] of each fused linear."""
    D, F = cfg.hidden_size, cfg.intermediate_size
    q, kv = (heads * cfg.head_dim for heads in (cfg.num_attention_heads, cfg.num_key_value_heads))
    return {"qkv": (q + 2 * kv, D), "o": (D, q), "gate_up": (2 * F, D), "down": (D, F)}


def buffer_bytes(trainable: Flat, dims: Dims) -> int:
    """Return the bytes of gradients, adapters, partial sums, scratch and the cuBLAS workspace."""
    cfg, itemsize, ranks = dims
    n = sum(math.prod(shape) for shape in padded_shapes(trainable.shapes).values())
    own = trainable.buffer.numel()
    # `ExplicitPass.grads` is a second buffer only if ranks were padded.
    gathered = 4 * own if own != n else 0
    scratch = max(scratch_numel(shape, ranks[group]) for group, shape in group_shapes(cfg).items())
    partials = SPLITS * (n // cfg.num_hidden_layers)
    workspace = 36 << 20  # cuBLAS
    return gathered + n * (4 + itemsize) + 4 * partials + scratch * itemsize + workspace


def peak_bytes(dims: Dims, policies: tuple[Policy, ...], tokens: int, chunk: int, mlp: int) -> int:
    """Return peak GPU bytes of a micro-batch without weights and buffers. chunk: rows of logits."""
    cfg, itemsize, _ = dims
    parts = part_bytes(dims)
    D, F = cfg.hidden_size * itemsize, cfg.intermediate_size * itemsize
    NH = cfg.num_attention_heads * cfg.head_dim
    saved = {p: saved_bytes(p, dims) for p in policies}
    # copies between GPU and host are in flight for one layer at a time
    host = max(on_host for _, on_host in saved.values())
    # dO, dQ (flash attention sums it in float32), and dK and dV for every query head
    attention_grads = parts["qkv"] + NH * (itemsize + 4 + 2 * itemsize)
    logits = min(chunk, tokens) * cfg.vocab_size * itemsize
    # Memory peaks at the head or in the backward pass of one layer's MLP or attention.
    most = (sum(saved[p][0] for p in policies) + 3 * D + host) * tokens + logits
    others = 0  # saved by the layers whose backward pass is yet to come
    for policy, run in itertools.groupby(policies):
        mine = saved[policy][0]
        # Of layers with equal policies the last peaks highest: all others are still saved then.
        others += mine * (len(list(run)) - 1)
        chunks = mlp_chunks(tokens, policy, mlp)
        layer = sum(parts.values()) - parts["gate_up"]
        in_mlp = others + layer + parts["gate_up"] / chunks + host + 3 * D + F / chunks
        in_attention = others + layer + host + 2 * D + attention_grads
        most = max(most, in_mlp * tokens, in_attention * tokens)
        others += mine
    return int(most + 2 * cfg.head_dim * itemsize * tokens)  # and cos and sin


def token_seconds(
    dims: Dims, policies: tuple[Policy, ...], tokens: float, mlp: int, length: int
) -> float:
    """Estimate the seconds per token of matmuls, attention, decoding and copies to the host.

    tokens: size of a micro-batch (each one decodes all weights). length: tokens per document.
    """
    forward = backward = host = last = 0.0
    for policy, layers in Counter(policies).items():
        layer_forward, layer_backward = _layer_seconds(dims.cfg, policy, tokens, mlp, length)
        forward += layers * layer_forward
        backward += layers * layer_backward
        copied = saved_bytes(policy, dims)[1] / _HOST_BYTES
        host += layers * copied
        # Copies overlap with other layers' compute, but no compute follows the last layer's copies.
        last = copied if policy == policies[-1] else last
    return max(forward, host) + max(backward, host) + 2 * last + 2 * _CONTENTION * host


def _layer_seconds(
    cfg: ModelConfig, policy: Policy, tokens: float, mlp: int, length: int
) -> tuple[float, float]:
    """Estimate (forward, backward) seconds per token of one layer."""
    q = cfg.num_attention_heads * cfg.head_dim
    weights = {group: O * I for group, (O, I) in group_shapes(cfg).items()}
    once, overhead = sum(weights.values()), _LAYER_S / tokens / 2
    saved = policy.gpu | policy.host
    makes = {"qkv": "qkv", "gate_up": "gate_up", "o": "mid"}  # fused linear -> part it computes
    recomputed = sum(weights[group] for group, part in makes.items() if part not in saved)
    attended = 0 if "attended" in saved else 2 * q * length
    # Each MLP chunk decodes gate_up in forward, recompute, backward; down in forward, backward.
    more_chunks = mlp_chunks(int(tokens), policy, mlp) - 1
    more = more_chunks * (3 * weights["gate_up"] + 2 * weights["down"])
    # Decoding one weight reads 4 bits and writes 16 bits: 2.5 bytes.
    decode = 2.5 * (2 * once + recomputed + more) / tokens / _BYTES
    forward = (2 * once + 2 * q * length) / _FLOPS + overhead
    flops = 2 * once + 5 * q * length + 2 * recomputed + attended
    return forward, flops / _FLOPS + decode + overhead
