"""Choose how a run computes gradients: explicit or autograd, memory policies, micro-batch size."""

import itertools
import math
from bisect import bisect
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from minisft.config.errors import UserError
from minisft.config.train import TrainConfig
from minisft.explicit.buckets import bucket_tokens
from minisft.explicit.cost import buffer_bytes, group_ranks, peak_bytes, token_seconds
from minisft.explicit.coverage import unsupported_reason
from minisft.explicit.policy import POLICIES, Dims, Policy, pinned_bytes
from minisft.llama import Compute, Weights
from minisft.lora import Flat

# Safety margin of the planner: measured peaks exceeded predicted peaks by 0.1 to 1.2 %.
_SLACK = 1.005
_MAX_TOKENS = 16384  # larger micro-batches are not faster
# Candidates for the rows of logits computed at a time, and for the tokens per MLP chunk.
_CHUNKS, _MLP_TOKENS = (2048, 1024, 512, 256), (8192, 4096, 2048, 1024)


class Choice(NamedTuple):
    """The chosen way to compute gradients. For autograd, policies is () and most numbers are 0."""

    explicit: bool
    policies: tuple[Policy, ...]  # one per layer
    tokens: int  # of a micro-batch at most, unless one row is longer
    chunk: int  # rows of logits at a time
    mlp_tokens: int  # tokens per chunk of the MLP, if gate_up is not saved
    peak_bytes: int  # predicted, of the GPU; 0 if nothing was predicted
    description: str  # one line for the user


class Memory(NamedTuple):
    """Memory in bytes: used and allowed on the GPU, and available on the host."""

    used: float  # by weights and training state, once they are loaded
    limit: float  # what the run may use, including `used`
    host: float = math.inf  # host memory that may be pinned


def choose(
    config: TrainConfig,
    trainable: Flat,
    frozen: Weights,
    compute: Compute,
    longest: int,
    device: torch.device | None = None,
    to_load: int = 0,
) -> Choice:
    """Choose explicit pass or autograd, memory policies and micro-batch size of a run.

    `auto` selects the fastest choice that fits into free memory, or into config.max_memory_gib.
    longest: tokens of the longest row. A dry run has its tensors on meta and passes the device of
    the real run, and in to_load the bytes that the real run loads first. Raises UserError if an
    explicitly requested option is unavailable.
    """
    device = device or trainable.buffer.device
    reason = unsupported_reason(trainable, frozen, compute, device)
    requested = config.step_impl
    if requested == "explicit" and reason:
        raise UserError(
            f"--step-impl explicit does not cover {reason}; use --step-impl auto, or leave that out"
        )
    name = "full" if config.gradient_checkpointing == "block" else config.gradient_checkpointing
    if requested == "autograd" or reason or (requested == "auto" and device.type != "cuda"):
        return _autograd(config, name, reason, device)
    if device.type != "cuda":
        tokens = config.per_device_train_batch_size * config.max_length
        policies = (POLICIES["none" if name == "auto" else name],) * compute.model.num_hidden_layers
        return Choice(True, policies, tokens, 1024, 8192, 0, f"explicit block, {name}")
    memory = gpu_memory(device, config.max_memory_gib, to_load)
    # Upper bound of a step's tokens: every row is as long as the longest row.
    step_tokens = longest * config.per_device_train_batch_size * config.gradient_accumulation_steps
    return choose_on_gpu(config, trainable, compute, name, longest, step_tokens, memory)


def _autograd(config: TrainConfig, name: str, reason: str, device: torch.device) -> Choice:
    """Return the Choice for autograd. name: policy. reason: why not the explicit pass; or empty."""
    if name not in ("auto", "none", "full"):
        setting = "--step-impl autograd" if config.step_impl == "autograd" else f"--device {device}"
        raise UserError(
            f"--gradient-checkpointing is {name!r}, which needs the explicit pass; with "
            f"{reason or setting} expected auto, none or full"
        )
    tokens = config.per_device_train_batch_size * config.max_length
    saved = "each layer's input" if name == "full" else "all activations"
    description = f"autograd, keeping {saved}" + (f" ({reason})" if reason else "")
    return Choice(False, (), tokens, 0, 0, 0, description)


def gpu_memory(device: torch.device, limit_gib: float, to_load: int = 0) -> Memory:
    """Return the memory limits of a run that will load another to_load bytes onto this GPU.

    limit_gib: --max-memory-gib; 0: 95 % of free GPU memory. Host limit: 60 % of its free memory.
    """
    allocated = torch.cuda.memory_allocated(device)
    used, host = allocated + to_load, 0.6 * available_host_bytes()
    if limit_gib:
        return Memory(used, limit_gib * 2**30, host)
    free, _ = torch.cuda.mem_get_info(device)
    # The driver counts the free blocks of torch's allocator as used.
    unused = torch.cuda.memory_reserved(device) - allocated
    return Memory(used, used + 0.95 * (free + unused - to_load), host)


def available_host_bytes(root: Path = Path("/")) -> float:
    """Return free host bytes: MemAvailable or, if less, what the container has left; or inf."""
    found = [math.inf]
    with suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        found.append(1024 * float(line.split()[1]))
    with suppress(OSError, ValueError, StopIteration):
        group = root / "sys/fs/cgroup"
        limit, used = (float((group / f"memory.{n}").read_text()) for n in ("max", "current"))
        # The container's page cache counts as used, but the kernel can reclaim it.
        lines = (group / "memory.stat").read_text().splitlines()
        cached = next(line for line in lines if line.startswith("inactive_file "))
        found.append(limit - used + float(cached.split()[1]))
    return min(found)


class _Planner(NamedTuple):
    """Builds and compares choices for one run on one GPU."""

    dims: Dims
    base: float  # bytes used before the first micro-batch: weights, training state, buffers
    memory: Memory
    longest: int
    step_tokens: int

    def candidates(self, kinds: list[Policy], tokens: int) -> list[Choice]:
        """Return the best choice of this size with one policy in all layers, and variants of it.

        A variant has another policy in the last layers. If none fits: all one-policy choices.
        """
        layers = self.dims.cfg.num_hidden_layers
        grid = itertools.product(kinds, _CHUNKS, _MLP_TOKENS)
        same = [self.choice((kind,) * layers, tokens, chunk, mlp) for kind, chunk, mlp in grid]
        best = min(same, key=self.rank)
        if not self.fits(best):
            return same
        found = [best]
        for kind in kinds:

            def mixed(n: int, kind: Policy = kind) -> Choice:
                return self.choice(best.policies[: layers - n] + (kind,) * n, *best[2:5])

            # Use `kind` in as many of the last layers as fit; fitting is monotone in n.
            count = bisect(range(1, layers), False, key=lambda n: not self.fits(mixed(n)))
            found += [mixed(count)] if count else []
        return found

    def choice(self, policies: tuple[Policy, ...], tokens: int, chunk: int, mlp: int) -> Choice:
        peak = peak_bytes(self.dims, policies, tokens, chunk, mlp)
        return Choice(True, policies, tokens, chunk, mlp, int(self.base + peak), "")

    def pinned(self, choice: Choice) -> int:
        return pinned_bytes(choice.policies, self.dims, choice.tokens)

    def fits(self, choice: Choice) -> bool:
        limit = self.memory.limit / _SLACK
        return choice.peak_bytes <= limit and self.pinned(choice) <= self.memory.host

    def rank(self, choice: Choice) -> tuple:
        """Sort key: choices that fit first, then the fastest, then the largest chunks."""
        # Tokens per micro-batch if the step is split into the fewest equal micro-batches.
        tokens = self.step_tokens / math.ceil(self.step_tokens / choice.tokens)
        seconds = token_seconds(self.dims, choice.policies, tokens, choice.mlp_tokens, self.longest)
        sizes = (-choice.chunk, -choice.mlp_tokens, choice.tokens, choice.peak_bytes)
        return not self.fits(choice), seconds, *sizes

    def description(self, choice: Choice) -> str:
        """Describe the choice in one line: policies, micro-batch size, predicted memory."""
        layers, policies = self.dims.cfg.num_hidden_layers, choice.policies
        counts = {k: policies.count(p) for k, p in POLICIES.items() if p in policies}
        saved = ", ".join(k if n == layers else f"{k} in {n} layers" for k, n in counts.items())
        text = (
            f"explicit block, {saved}, up to {choice.tokens:,} tokens at a time; predicted peak "
            f"{choice.peak_bytes / 2**30:.2f} of {self.memory.limit / 2**30:.2f} GiB"
        )
        pinned = self.pinned(choice)
        return text + (f", and {pinned / 2**30:.1f} GiB of host memory" if pinned else "")


def choose_on_gpu(
    config: TrainConfig,
    trainable: Flat,
    compute: Compute,
    name: str,
    longest: int,
    step_tokens: int,
    memory: Memory,
) -> Choice:
    """Return the fastest choice that fits, else that with the lowest peak. Does not query a GPU.

    name: a policy or auto. step_tokens: tokens of the largest step. Raises UserError if a policy
    requested by name needs more host memory than may be pinned.
    """
    dims = Dims(compute.model, compute.dtype.itemsize, group_ranks(trainable, compute.model))
    base = memory.used + buffer_bytes(trainable, dims)
    planner = _Planner(dims, base, memory, longest, step_tokens)
    kinds = list(POLICIES.values()) if name == "auto" else [POLICIES[name]]
    sizes = micro_batch_sizes(config.micro_batch_tokens, longest, step_tokens)
    found = [choice for tokens in sizes for choice in planner.candidates(kinds, tokens)]
    best = min(found, key=planner.rank)
    if not planner.fits(best):
        # Nothing fits: take the lowest predicted peak within the hard limit of host memory.
        best = min(found, key=lambda c: (planner.pinned(c) > memory.host, c.peak_bytes))
    if (pinned := planner.pinned(best)) > memory.host:
        raise UserError(
            f"--gradient-checkpointing {name} would keep {pinned / 2**30:.1f} GiB in host memory, "
            f"where {memory.host / 2**30:.1f} GiB may be used; use auto, or a smaller "
            "--max-length or --micro-batch-tokens"
        )
    return best._replace(description=planner.description(best))


def micro_batch_sizes(requested: int, longest: int, step_tokens: int) -> list[int]:
    """Return candidate sizes in tokens, largest first. requested: --micro-batch-tokens; 0: any.

    Each size is that of a bucket, so that padded micro-batches do not exceed it.
    """
    least = bucket_tokens(longest)
    if requested:
        return [max(least, bucket_tokens(requested))]
    sizes, size = {least}, min(step_tokens, _MAX_TOKENS)
    sizes.add(max(least, bucket_tokens(size)))
    while (size := size // 2) > least:
        # Halves alone are too coarse: 8B in 20.9 GiB fits 6,144 tokens, 1 % faster than 4,096.
        for part in (size, size * 3 // 2):
            sizes.add(bucket_tokens(max(1, part // longest) * longest))
    return sorted(sizes, reverse=True)
