"""Memory policies: what each layer saves between forward and backward, and how many bytes.

T tokens  D hidden  F ffn  N query heads  K key/value heads  H head_dim  R rank
"""

from collections.abc import Iterable
from typing import NamedTuple

from minisft.config.model import ModelConfig
from minisft.kernels.low_rank import row_stride


class Policy(NamedTuple):
    """Parts of `block.Saved` saved on the GPU and in pinned host memory; the rest is recomputed.

    x, the layer's input, is always in one of the two: everything else follows from it.
    """

    gpu: frozenset[str]
    host: frozenset[str] = frozenset()


def _policy(gpu: str, host: str = "") -> Policy:
    return Policy(frozenset(gpu.split()), frozenset(host.split()))


# Names say what is recomputed, as values of --gradient-checkpointing. From "no matrix product is
# run again" to "only the layer's input is saved"; then the same with host memory.
POLICIES = {
    "none": _policy("x qkv attended mid gate_up"),
    "recompute_gate_up": _policy("x qkv attended mid"),
    "recompute_gate_up+qkv": _policy("x attended mid"),
    "all_but_attention": _policy("x attended"),
    "full": _policy("x"),
    # At 8B the copies buy larger micro-batches: 17,277 tokens/s at 6,144 tokens, 17,099 at 4,096.
    "none+offload": _policy("qkv gate_up", "x attended mid"),
    # Bound by the host link, 51 GB/s each way.
    "offload": _policy("", "x qkv attended mid gate_up"),
    "recompute_gate_up+offload": _policy("", "x qkv attended mid"),
    "recompute_gate_up+qkv+offload": _policy("", "x attended mid"),
    "full+offload": _policy("", "x"),
}


class Dims(NamedTuple):
    """The sizes that bytes and seconds are computed from."""

    cfg: ModelConfig
    itemsize: int  # bytes of the compute dtype
    ranks: dict[str, int]  # rank columns of qkv, o, gate_up and down (`cost.group_ranks`)


def part_bytes(dims: Dims) -> dict[str, int]:
    """Bytes per token and layer of each part, and of what is always saved ("small")."""
    cfg, itemsize, ranks = dims
    D, F, H = cfg.hidden_size, cfg.intermediate_size, cfg.head_dim
    N, K = cfg.num_attention_heads, cfg.num_key_value_heads
    return {
        "x": D * itemsize,
        "qkv": row_stride((N + 2 * K) * H + ranks["qkv"]) * itemsize,
        # the output, and a float32 log-sum-exp per head
        "attended": N * H * itemsize + N * 4,
        "mid": D * itemsize,
        "gate_up": row_stride(2 * F + ranks["gate_up"]) * itemsize,
        # `block.AlwaysSaved`: x A^T of every linear, and two float32 1 / rms
        "small": sum(ranks.values()) * itemsize + 8,
    }


def mlp_chunks(tokens: int, policy: Policy, most: int) -> int:
    """Number of chunks (1, 2, 4 or 8) that the MLP processes the tokens in.

    most: tokens per chunk, unless that takes more than 8. Always 1 if gate and up are saved: they
    are one tensor in memory then, and chunks would save none.
    """
    if "gate_up" in policy.gpu | policy.host:
        return 1
    return next(n for n in (1, 2, 4, 8) if n == 8 or tokens <= most * n)


def saved_bytes(policy: Policy, dims: Dims) -> tuple[int, int]:
    """(on the GPU, on the host): bytes saved per token and layer under the policy."""
    sizes = part_bytes(dims)
    gpu = sizes["small"] + sum(sizes[name] for name in policy.gpu)
    return gpu, sum(sizes[name] for name in policy.host)


def pinned_bytes(policies: Iterable[Policy], dims: Dims, tokens: int) -> int:
    """Pinned host memory of all layers for micro-batches of `tokens` tokens."""
    sizes = part_bytes(dims)
    # Only attention's output is copied; the log-sum-exp stays on the GPU.
    sizes["attended"] -= dims.cfg.num_attention_heads * 4
    # Torch's allocator of pinned memory rounds up to powers of two.
    rounded = {name: 1 << (size * tokens - 1).bit_length() for name, size in sizes.items()}
    return sum(rounded[name] for policy in policies for name in policy.host)
