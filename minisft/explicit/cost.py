"""Predicted cost of a choice: bytes on the GPU and seconds per token.

Bytes are exact arithmetic over what the pass allocates; seconds are a rough model that only has to
rank the choices. Rates are an H200's. mlp: tokens per chunk of the MLP.

T tokens  D hidden  F ffn  N query heads  K key/value heads  H head_dim  V vocab  O, I of a linear
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
# Copies slow down the compute next to them: by 3 % at 1B with copies in every layer.
_CONTENTION = 0.03


def group_ranks(trainable: Flat, cfg: ModelConfig) -> dict[str, int]:
    """Rank columns of each fused linear, in the layer that has most; ranks are padded."""

    def rank(i: int, paths: tuple[str, ...]) -> int:
        names = (f"model.layers.{i}.{path}.lora_A.weight" for path in paths)
        return sum(row_stride(trainable.views[n].shape[0]) for n in names if n in trainable.views)

    layers = range(cfg.num_hidden_layers)
    return {group: max(rank(i, paths) for i in layers) for group, paths in GROUPS.items()}


def group_shapes(cfg: ModelConfig) -> dict[str, tuple[int, int]]:
    """[O, I] of each fused linear."""
    D, F = cfg.hidden_size, cfg.intermediate_size
    q, kv = (heads * cfg.head_dim for heads in (cfg.num_attention_heads, cfg.num_key_value_heads))
    return {"qkv": (q + 2 * kv, D), "o": (D, q), "gate_up": (2 * F, D), "down": (D, F)}


def buffer_bytes(trainable: Flat, dims: Dims) -> int:
    """Bytes of the pass's buffers: gradients, adapters, sums over tokens, scratch; and cuBLAS's."""
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
    """Peak bytes of a micro-batch on the GPU, without weights and buffers. chunk: logits' rows."""
    cfg, itemsize, _ = dims
    parts = part_bytes(dims)
    D, F = cfg.hidden_size * itemsize, cfg.intermediate_size * itemsize
    NH = cfg.num_attention_heads * cfg.head_dim
    saved = {p: saved_bytes(p, dims) for p in policies}
    # one layer's parts in flight
    host = max(on_host for _, on_host in saved.values())
    # dO; dQ, which flash attention sums in float32; dK and dV for every query head
    attention_grads = parts["qkv"] + NH * (itemsize + 4 + 2 * itemsize)
    logits = min(chunk, tokens) * cfg.vocab_size * itemsize
    # The peak is at the head, or in the backward pass of some layer's MLP or attention.
    most = (sum(saved[p][0] for p in policies) + 3 * D + host) * tokens + logits
    others = 0  # saved by the layers whose backward pass is yet to come
    for policy, run in itertools.groupby(policies):
        mine = saved[policy][0]
        # Of equal layers the last one peaks: all the others are still saved then.
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
    """Rough seconds per token: matmuls, attention, decoding, and what the host link adds.

    tokens: of a micro-batch; each decodes all weights again. length: of a document.
    """
    forward = backward = host = last = 0.0
    for policy, layers in Counter(policies).items():
        layer_forward, layer_backward = _layer_seconds(dims.cfg, policy, tokens, mlp, length)
        forward += layers * layer_forward
        backward += layers * layer_backward
        copied = saved_bytes(policy, dims)[1] / _HOST_BYTES
        host += layers * copied
        # Copies overlap with other layers' compute; after the last layer's there is none.
        last = copied if policy == policies[-1] else last
    return max(forward, host) + max(backward, host) + 2 * last + 2 * _CONTENTION * host


def _layer_seconds(
    cfg: ModelConfig, policy: Policy, tokens: float, mlp: int, length: int
) -> tuple[float, float]:
    """Seconds per token of one layer's forward and backward pass."""
    q = cfg.num_attention_heads * cfg.head_dim
    weights = {group: O * I for group, (O, I) in group_shapes(cfg).items()}
    once, overhead = sum(weights.values()), _LAYER_S / tokens / 2
    saved = policy.gpu | policy.host
    makes = {"qkv": "qkv", "gate_up": "gate_up", "o": "mid"}  # fused linear -> part it computes
    recomputed = sum(weights[group] for group, part in makes.items() if part not in saved)
    attended = 0 if "attended" in saved else 2 * q * length
    # Each chunk of the MLP decodes gate_up in forward, recompute and backward, down in two of them.
    more_chunks = mlp_chunks(int(tokens), policy, mlp) - 1
    more = more_chunks * (3 * weights["gate_up"] + 2 * weights["down"])
    # 4 bits read and 16 written per decoded weight are 2.5 bytes.
    decode = 2.5 * (2 * once + recomputed + more) / tokens / _BYTES
    forward = (2 * once + 2 * q * length) / _FLOPS + overhead
    flops = 2 * once + 5 * q * length + 2 * recomputed + attended
    return forward, flops / _FLOPS + decode + overhead
