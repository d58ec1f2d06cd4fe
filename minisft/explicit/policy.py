"""What each layer keeps between forward and backward: named policies, and their bytes.

T tokens  D hidden  F ffn  N query heads  K key/value heads  H head_dim  R rank
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from minisft.config.model import ModelConfig
from minisft.kernels.low_rank import row_stride

PARTS = ("x", "qkv", "attended", "mid", "gate_up")


class Policy(NamedTuple):
    """Parts kept on the GPU, and parts kept in pinned host memory; the rest is computed again.

    x, the layer's input, is always one of the two.
    """

    gpu: frozenset[str]
    host: frozenset[str] = frozenset()


def _policy(gpu: str, host: str = "") -> Policy:
    return Policy(frozenset(gpu.split()), frozenset(host.split()))


# From "no matrix product is ever run again" to "residuals only"; then with host memory.
POLICIES = {
    "none": _policy("x qkv attended mid gate_up"),
    "recompute_gate_up": _policy("x qkv attended mid"),
    "recompute_gate_up+qkv": _policy("x attended mid"),
    "all_but_attention": _policy("x attended"),
    "full": _policy("x"),
    "none+offload": _policy("qkv gate_up", "x attended mid"),
    "offload": _policy("", "x qkv attended mid gate_up"),
    "recompute_gate_up+offload": _policy("", "x qkv attended mid"),
    "recompute_gate_up+qkv+offload": _policy("", "x attended mid"),
    "full+offload": _policy("", "x"),
}


def part_bytes(cfg: ModelConfig, itemsize: int, ranks: dict[str, int]) -> dict[str, int]:
    """Bytes a token and layer of each part. ranks: of qkv, o, gate_up and down."""
    D, F, H = cfg.hidden_size, cfg.intermediate_size, cfg.head_dim
    N, K = cfg.num_attention_heads, cfg.num_key_value_heads
    return {
        "x": D * itemsize,
        "qkv": row_stride((N + 2 * K) * H + ranks["qkv"]) * itemsize,
        "attended": N * H * itemsize + N * 4,  # and the log-sum-exp of every head
        "mid": D * itemsize,
        "gate_up": row_stride(2 * F + ranks["gate_up"]) * itemsize,
        "small": sum(ranks.values()) * itemsize + 8,  # always on the GPU
    }


def mlp_chunks(tokens: int, policy: Policy, most: int) -> int:
    """Parts that tokens go through the MLP in: where gate and up are not kept, of `most` or so."""
    if "gate_up" in policy.gpu | policy.host:
        return 1
    return next(n for n in (1, 2, 4, 8) if n == 8 or tokens <= most * n)


def kept_bytes(
    policy: Policy, cfg: ModelConfig, itemsize: int, ranks: dict[str, int]
) -> tuple[int, int]:
    """(on the GPU, on the host): bytes a token and layer under that policy."""
    sizes = part_bytes(cfg, itemsize, ranks)
    gpu = sizes["small"] + sum(sizes[name] for name in policy.gpu)
    return gpu, sum(sizes[name] for name in policy.host)


def pinned_bytes(
    policies: Iterable[Policy],
    cfg: ModelConfig,
    itemsize: int,
    ranks: dict[str, int],
    tokens: int,
) -> int:
    """Host memory that micro-batches of so many tokens take, with what its allocator rounds up."""
    sizes = part_bytes(cfg, itemsize, ranks)
    sizes["attended"] -= cfg.num_attention_heads * 4  # the log-sum-exp stays on the GPU
    each = {name: 1 << (size * tokens - 1).bit_length() for name, size in sizes.items()}
    return sum(each[name] for policy in policies for name in policy.host)
