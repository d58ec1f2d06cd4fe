"""Memory policies: which activations a layer saves for its backward pass, and their bytes.

T tokens  D hidden  F ffn  N query heads  K key/value heads  H head_dim  R rank
"""

from collections.abc import Iterable
from typing import NamedTuple

from minisft.config.model import ModelConfig
from minisft.kernels.low_rank import row_stride


class Policy(NamedTuple):
    """Parts of `block.Saved` to save on the GPU or in pinned host memory; others are recomputed.

    x, the layer's input, is always saved: all other parts can be recomputed from it.
    """

    gpu: frozenset[str]
    host: frozenset[str] = frozenset()


def _policy(gpu: str, host: str = "") -> Policy:
    return Policy(frozenset(gpu.split()), frozenset(host.split()))


# Names are the values of --gradient-checkpointing and say what is recomputed. Policies on the GPU
# come first, from no recomputed matmul to only the layer's input saved; then those using the host.
POLICIES = {
    "none": _policy("x qkv attended mid gate_up"),
    "recompute_gate_up": _policy("x qkv attended mid"),
    "recompute_gate_up+qkv": _policy("x attended mid"),
    "all_but_attention": _policy("x attended"),
    "full": _policy("x"),
    # Allows larger micro-batches of an 8B model: 17,277 tokens/s at 6,144 tokens, 17,099 at 4,096.
    "none+offload": _policy("qkv gate_up", "x attended mid"),
    # Limited by the link between GPU and host: 51 GB/s in each direction.
    "offload": _policy("", "x qkv attended mid gate_up"),
    "recompute_gate_up+offload": _policy("", "x qkv attended mid"),
    "recompute_gate_up+qkv+offload": _policy("", "x attended mid"),
    "full+offload": _policy("", "x"),
}


class Dims(NamedTuple):
    """Sizes from which memory (bytes) and time (seconds) are predicted."""

    cfg: ModelConfig
    itemsize: int  # bytes of the compute dtype
    ranks: dict[str, int]  # rank columns of qkv, o, gate_up and down (`cost.group_ranks`)


def part_bytes(dims: Dims) -> dict[str, int]:
    """Return the bytes per token and layer of each part; "small" is what every policy saves."""
    cfg, itemsize, ranks = dims
    D, F, H = cfg.hidden_size, cfg.intermediate_size, cfg.head_dim
    N, K = cfg.num_attention_heads, cfg.num_key_value_heads
    return {
        "x": D * itemsize,
        "qkv": row_stride((N + 2 * K) * H + ranks["qkv"]) * itemsize,
        # attention's output, and a float32 log-sum-exp per head
        "attended": N * H * itemsize + N * 4,
        "mid": D * itemsize,
        "gate_up": row_stride(2 * F + ranks["gate_up"]) * itemsize,
        # `block.AlwaysSaved`: x A^T of every linear, and two float32 1 / rms
        "small": sum(ranks.values()) * itemsize + 8,
    }


def mlp_chunks(tokens: int, policy: Policy, most: int) -> int:
    """Return the number of chunks (1, 2, 4 or 8) in which the MLP processes the tokens.

    most: tokens per chunk, exceeded if 8 chunks are too few. The result is 1 if gate_up is saved:
    it is then one tensor in memory, and chunks would save no memory.
    """
    if "gate_up" in policy.gpu | policy.host:
        return 1
    return next(n for n in (1, 2, 4, 8) if n == 8 or tokens <= most * n)


def saved_bytes(policy: Policy, dims: Dims) -> tuple[int, int]:
    """Return the bytes saved per token and layer under the policy: (on the GPU, on the host)."""
    sizes = part_bytes(dims)
    gpu = sizes["small"] + sum(sizes[name] for name in policy.gpu)
    return gpu, sum(sizes[name] for name in policy.host)


def pinned_bytes(policies: Iterable[Policy], dims: Dims, tokens: int) -> int:
    """Return the bytes of pinned host memory of all layers for micro-batches of `tokens` tokens."""
    sizes = part_bytes(dims)
    # Of attention, only the output is copied to the host; the log-sum-exp stays on the GPU.
    sizes["attended"] -= dims.cfg.num_attention_heads * 4
    # Torch's allocator of pinned memory rounds sizes up to powers of two.
    rounded = {name: 1 << (size * tokens - 1).bit_length() for name, size in sizes.items()}
    return sum(rounded[name] for policy in policies for name in policy.host)
