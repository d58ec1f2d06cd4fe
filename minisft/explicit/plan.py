"""How a run computes its gradients: which pass, which memory policy, how many tokens at a time.

Memory is exact arithmetic over what the pass allocates; speed is a rough model that only has to
rank the choices. Rates are an H200's.

T tokens  D hidden  F ffn  N query heads  K key/value heads  H head_dim  V vocab
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from minisft.config.errors import UserError
from minisft.config.model import ModelConfig
from minisft.config.train import TrainConfig
from minisft.explicit.microbatch import (
    GROUPS,
    SPLITS,
    bucket_tokens,
    unsupported_reason,
    whole_ranks,
)
from minisft.explicit.policy import (
    POLICIES,
    Policy,
    kept_bytes,
    mlp_chunks,
    part_bytes,
    pinned_bytes,
)
from minisft.kernels.low_rank import row_stride
from minisft.llama import Compute, Weights
from minisft.lora import Flat

_FLOPS, _BYTES, _HOST_BYTES, _LAYER_S = 520e12, 3.2e12, 51e9, 70e-6
_CONTENTION = 0.03  # of a copy's time is lost beside it
_SLACK = 1.005  # measured peaks are up to so much above the predicted ones
_MOST_TOKENS = 16384  # beyond it a micro-batch gains nothing


class Choice(NamedTuple):
    """How gradients are computed. policies is empty where autograd does it."""

    explicit: bool
    policies: tuple[Policy, ...]
    tokens: int  # of a micro-batch at most, but for longer rows
    chunk: int  # rows of logits at a time
    mlp_tokens: int  # tokens through the MLP at a time, where gate and up are not kept
    peak_bytes: int  # predicted, of the GPU; 0 where nothing was predicted
    said: str  # one line for the reader


class Memory(NamedTuple):
    """Bytes of a GPU, and of the host beside it."""

    used: float  # by weights and the state of training, once they are there
    room: float  # what the run may use, those included
    host: float = math.inf  # what it may pin of the host's


class _Candidate(NamedTuple):
    """Policies of the layers, with the numbers of `Choice`."""

    policies: tuple[Policy, ...]
    tokens: int
    chunk: int
    mlp_tokens: int
    seconds: float
    peak: float
    pinned: float


def choose(
    config: TrainConfig,
    trainable: Flat,
    frozen: Weights,
    compute: Compute,
    longest: int,
    step_tokens: int,
    device: torch.device | None = None,
    to_load: int = 0,
) -> Choice:
    """The pass, policy and micro-batch of a run.

    longest: tokens of the longest row; step_tokens: of the largest step. `auto` takes the fastest
    that fits the memory that is free, or config.max_memory_gib. device, to_load: of a dry run,
    whose tensors lie nowhere: where it would compute, and the bytes it would first load there.
    UserError if what was asked for by name cannot be had.
    """
    device = device or trainable.buffer.device
    reason = unsupported_reason(trainable, frozen, compute, device)
    asked = config.step_impl
    if asked == "explicit" and reason:
        raise UserError(
            f"--step-impl explicit does not cover {reason}; use --step-impl auto, or leave that out"
        )
    name = "full" if config.gradient_checkpointing == "block" else config.gradient_checkpointing
    if asked == "autograd" or reason or (asked == "auto" and device.type != "cuda"):
        if name not in ("auto", "none", "full"):
            why = reason or (
                "--step-impl autograd" if asked == "autograd" else f"--device {device}"
            )
            raise UserError(
                f"--gradient-checkpointing is {name!r}, which needs the explicit pass; with {why} "
                "expected auto, none or full"
            )
        tokens = config.per_device_train_batch_size * config.max_length
        kept = "each layer's input" if name == "full" else "all activations"
        said = f"autograd, keeping {kept}" + (f" ({reason})" if reason else "")
        return Choice(False, (), tokens, 0, 0, 0, said)
    layers = compute.model.num_hidden_layers
    if device.type != "cuda":
        tokens = config.per_device_train_batch_size * config.max_length
        policy = POLICIES["none" if name == "auto" else name]
        return Choice(True, (policy,) * layers, tokens, 1024, 8192, 0, f"explicit block, {name}")
    memory = gpu_memory(device, config.max_memory_gib, to_load)
    return choose_on_gpu(config, trainable, compute, name, longest, step_tokens, memory)


def gpu_memory(device: torch.device, limit_gib: float, to_load: int = 0) -> Memory:
    """What is used and what may be, of a GPU that to_load bytes are still to come to.

    limit_gib: of --max-memory-gib; 0 is 95 % of what is free. Of the host's, 60 %.
    """
    allocated = torch.cuda.memory_allocated(device)
    used, host = allocated + to_load, 0.6 * available_host_bytes()
    if limit_gib:
        return Memory(used, limit_gib * 2**30, host)
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - allocated
    return Memory(used, used + 0.95 * (free + unused - to_load), host)


def available_host_bytes(root: Path = Path("/")) -> float:
    """What processes here may still use: the kernel's own estimate, and a container's limit.

    Infinite where neither is told.
    """
    found = [math.inf]
    with suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        found.append(1024 * float(line.split()[1]))
    with suppress(OSError, ValueError, StopIteration):
        group = root / "sys/fs/cgroup"
        limit, used = (float((group / f"memory.{n}").read_text()) for n in ("max", "current"))
        lines = (group / "memory.stat").read_text().splitlines()
        cached = next(line for line in lines if line.startswith("inactive_file "))
        found.append(limit - used + float(cached.split()[1]))
    return min(found)


def choose_on_gpu(
    config: TrainConfig,
    trainable: Flat,
    compute: Compute,
    name: str,
    longest: int,
    step_tokens: int,
    memory: Memory,
) -> Choice:
    """The fastest of all choices that fit, or the least; arithmetic alone, no GPU is asked.

    UserError if what was asked for by name needs more of the host than there is.
    """
    cfg, itemsize = compute.model, compute.dtype.itemsize
    ranks, room = group_ranks(trainable, cfg), memory.room / _SLACK
    base = memory.used + buffer_bytes(trainable, cfg, itemsize, ranks)

    def candidate(policies: tuple[Policy, ...], tokens: int, chunk: int, mlp: int) -> _Candidate:
        each = step_tokens / math.ceil(step_tokens / tokens)  # what a micro-batch comes to hold
        seconds = token_seconds(cfg, policies, each, mlp, longest, itemsize, ranks)
        peak = base + peak_bytes(cfg, policies, tokens, chunk, mlp, itemsize, ranks)
        pinned = pinned_bytes(policies, cfg, itemsize, ranks, tokens)
        return _Candidate(policies, tokens, chunk, mlp, seconds, peak, pinned)

    def fits(c: _Candidate) -> bool:
        return c.peak <= room and c.pinned <= memory.host

    def rank(c: _Candidate) -> tuple:
        """Of equally fast ones the largest chunks."""
        return not fits(c), c.seconds, -c.chunk, -c.mlp_tokens, c.tokens, c.peak

    layers = cfg.num_hidden_layers
    kinds = [POLICIES[n] for n in (POLICIES if name == "auto" else [name])]
    found = []
    for tokens in _micro_batches(config.micro_batch_tokens, longest, step_tokens):
        numbers = itertools.product(kinds, (2048, 1024, 512, 256), (8192, 4096, 2048, 1024))
        plain = [candidate((kind,) * layers, tokens, chunk, mlp) for kind, chunk, mlp in numbers]
        best = min(plain, key=rank)
        if not fits(best):
            found += plain
            continue
        found.append(best)
        for better in kinds:
            mixed = [best.policies[: layers - n] + (better,) * n for n in range(1, layers)]

            def over(policies: tuple[Policy, ...], best: _Candidate = best) -> bool:
                return not fits(candidate(policies, *best[1:4]))

            some = bisect(mixed, False, key=over)  # in as many of the last layers as fit
            found += [candidate(mixed[some - 1], *best[1:4])] if some else []
    best = min(found, key=rank)
    if not fits(best):
        best = min(found, key=lambda c: (c.pinned > memory.host, c.peak))
    policies, tokens, chunk, mlp, _, peak, pinned = best
    if pinned > memory.host:
        raise UserError(
            f"--gradient-checkpointing {name} would keep {pinned / 2**30:.1f} GiB in host memory, "
            f"where {memory.host / 2**30:.1f} GiB may be used; use auto, or a smaller "
            "--max-length or --micro-batch-tokens"
        )
    counts = {k: policies.count(p) for k, p in POLICIES.items() if p in policies}
    kept = ", ".join(k if n == layers else f"{k} in {n} layers" for k, n in counts.items())
    said = (
        f"explicit block, {kept}, up to {tokens:,} tokens at a time; predicted peak "
        f"{peak / 2**30:.2f} of {memory.room / 2**30:.2f} GiB"
    )
    if pinned:
        said += f", and {pinned / 2**30:.1f} GiB of host memory"
    return Choice(True, policies, tokens, chunk, mlp, int(peak), said)


def _micro_batches(asked: int, longest: int, step_tokens: int) -> list[int]:
    """Candidates, largest first, each the size of a bucket: padding never goes beyond it."""
    least = bucket_tokens(longest)
    if asked:
        return [max(least, bucket_tokens(asked))]
    sizes, size = {least}, min(step_tokens, _MOST_TOKENS)
    sizes.add(max(least, bucket_tokens(size)))
    while (size := size // 2) > least:
        for part in (size, size * 3 // 2):  # whole rows, where they are as long as the longest
            sizes.add(bucket_tokens(max(1, part // longest) * longest))
    return sorted(sizes, reverse=True)


def group_ranks(trainable: Flat, cfg: ModelConfig) -> dict[str, int]:
    """Columns of u = x A^T beside each group of linears, the most of any layer; `whole_ranks`."""

    def rank(i: int, paths: tuple[str, ...]) -> int:
        names = (f"model.layers.{i}.{path}.lora_A.weight" for path in paths)
        return sum(row_stride(trainable.views[n].shape[0]) for n in names if n in trainable.views)

    layers = range(cfg.num_hidden_layers)
    return {group: max(rank(i, paths) for i in layers) for group, paths in GROUPS.items()}


def group_shapes(cfg: ModelConfig) -> dict[str, tuple[int, int]]:
    """[O, I] of each group of linears, their rows side by side."""
    D, F = cfg.hidden_size, cfg.intermediate_size
    q, kv = (heads * cfg.head_dim for heads in (cfg.num_attention_heads, cfg.num_key_value_heads))
    return {"qkv": (q + 2 * kv, D), "o": (D, q), "gate_up": (2 * F, D), "down": (D, F)}


def buffer_bytes(trainable: Flat, cfg: ModelConfig, itemsize: int, ranks: dict[str, int]) -> int:
    """Gradient, adapters in the compute dtype, partial sums of a layer, decoded weights."""
    n = sum(math.prod(shape) for shape in whole_ranks(trainable.shapes).values())
    own = trainable.buffer.numel()
    gathered = 4 * own if own != n else 0
    shapes = [(O, I, ranks[group]) for group, (O, I) in group_shapes(cfg).items()]
    scratch = max(max((O + R) * I, O * row_stride(I + R)) for O, I, R in shapes)
    partials = SPLITS * (n // cfg.num_hidden_layers)
    workspace = 36 << 20  # cuBLAS
    return gathered + n * (4 + itemsize) + 4 * partials + scratch * itemsize + workspace


def peak_bytes(
    cfg: ModelConfig,
    policies: tuple[Policy, ...],
    tokens: int,
    chunk: int,
    mlp: int,
    itemsize: int,
    ranks: dict[str, int],
) -> int:
    """Most bytes of the GPU that a micro-batch needs beside weights and buffers."""
    parts = part_bytes(cfg, itemsize, ranks)
    D, F, V = cfg.hidden_size * itemsize, cfg.intermediate_size * itemsize, cfg.vocab_size
    NH = cfg.num_attention_heads * cfg.head_dim
    whole = sum(parts.values())
    counts = Counter(policies)
    kept = sum(n * kept_bytes(p, cfg, itemsize, ranks)[0] for p, n in counts.items())
    host = max(kept_bytes(p, cfg, itemsize, ranks)[1] for p in counts)  # one layer's on its way
    angles = 2 * cfg.head_dim * itemsize
    grads = parts["qkv"] + NH * (itemsize + 4 + 2 * itemsize)  # dO; dQ in float32; dK, dV a head
    logits = min(chunk, tokens) * V * itemsize
    most = (kept + 3 * D + host) * tokens + logits  # the head
    below = 0
    for policy, run in itertools.groupby(policies):
        mine = kept_bytes(policy, cfg, itemsize, ranks)[0]
        below += mine * (len(list(run)) - 1)  # the most is needed at the last of equal layers
        gate_up = parts["gate_up"] / mlp_chunks(tokens, policy, mlp)
        rest = whole - parts["gate_up"]
        a = F / mlp_chunks(tokens, policy, mlp)
        mlp_pass = below + rest + gate_up + host + 3 * D + a  # forward as backward
        attention = below + rest + host + 2 * D + grads
        below += mine
        most = max(most, mlp_pass * tokens, attention * tokens)
    return int(most + angles * tokens)


def token_seconds(
    cfg: ModelConfig,
    policies: tuple[Policy, ...],
    tokens: float,
    mlp: int,
    length: int,
    itemsize: int,
    ranks: dict[str, int],
) -> float:
    """Rough seconds a token: products, decoding, and what the host link adds."""
    q = cfg.num_attention_heads * cfg.head_dim
    weights = {group: O * I for group, (O, I) in group_shapes(cfg).items()}
    once = sum(weights.values())
    overhead = _LAYER_S / tokens / 2
    forward = backward = host = last = 0.0
    for policy, layers in Counter(policies).items():
        kept = policy.gpu | policy.host
        again = {"qkv": "qkv" not in kept, "gate_up": "gate_up" not in kept, "o": "mid" not in kept}
        redone = sum(weights[g] for g, yes in again.items() if yes)
        attended = 0 if "attended" in kept else 2 * q * length
        chunks = mlp_chunks(int(tokens), policy, mlp) - 1
        more = chunks * (3 * weights["gate_up"] + 2 * weights["down"])
        decode = 2.5 * (2 * once + redone + more) / tokens / _BYTES
        forward += layers * ((2 * once + 2 * q * length) / _FLOPS + overhead)
        flops = 2 * once + 5 * q * length + 2 * redone + attended
        backward += layers * (flops / _FLOPS + decode + overhead)
        copied = kept_bytes(policy, cfg, itemsize, ranks)[1] / _HOST_BYTES
        host += layers * copied
        last = copied if policy == policies[-1] else last  # nothing hides the last layer's copies
    return max(forward, host) + max(backward, host) + 2 * last + 2 * _CONTENTION * host
