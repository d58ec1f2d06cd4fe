"""Out of memory, said in one line: what the run needs by estimate, and what would make it less."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from minisft.config import TrainConfig, UserError
from minisft.lora import trainable_shapes
from minisft.model import resolve_device, resolve_dtype
from minisft.targets import split_targets
from minisft.weights import load_model_config, resolve_model

_NF4_BYTES = 0.516  # a weight: half a byte, and the share of its block's scale in 8 bits
_CPU_ALLOCATOR = ("can't allocate memory", "not enough memory")  # a plain RuntimeError there


@contextmanager
def out_of_memory(config: TrainConfig) -> Iterator[None]:
    """Turns running out of GPU or host memory into a UserError with the estimate and the levers."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as e:
        raise UserError(_message(config, e)) from e
    except RuntimeError as e:
        if not any(text in str(e) for text in _CPU_ALLOCATOR):
            raise
        raise UserError(_message(config, e)) from e


def _message(config: TrainConfig, error: BaseException) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
    sizes = ", ".join(f"{what} {gib:.2f} GiB" for what, gib in estimate(config).items())
    tokens = config.per_device_train_batch_size * config.max_length
    return (
        f"out of memory ({reason}). This run needs, by estimate: {sizes} (up to {tokens} tokens at "
        f"a time). {'; '.join(levers(config))}. Checkpoints are intact: resume with "
        "--resume-from-checkpoint auto"
    )


def levers(config: TrainConfig) -> list[str]:
    """The settings that would need less memory, the one that costs nothing first."""
    found = []
    rows = config.per_device_train_batch_size
    if rows > 1:
        found.append(
            f"halve --per-device-train-batch-size {rows} and double "
            f"--gradient-accumulation-steps {config.gradient_accumulation_steps} (same training)"
        )
    if config.gradient_checkpointing in ("auto", "none"):
        found.append("--gradient-checkpointing full (same training, slower)")
    found.append(f"lower --max-length {config.max_length}")
    if config.full_finetuning:
        found.append("train an adapter instead (no --full-finetuning)")
    elif not config.load_in_4bit:
        found.append("--load-in-4bit")
    return found


def estimate(config: TrainConfig) -> dict[str, float]:
    """GiB of the weights, of the trained tensors with gradient and AdamW moments, of activations.

    Activations: what autograd keeps of a block, about 8 D + 2 K H + 4 I numbers a token, for every
    layer; with checkpointed blocks one block's, and D numbers for each of the others.
    """
    cfg = load_model_config(resolve_model(config.model, config.revision))
    size = resolve_dtype(config.dtype, resolve_device(config.device)).itemsize
    lora = config.lora and split_targets(config.lora)
    trained = trainable_shapes(lora, cfg)
    linears = {f"{path}.weight" for path in cfg.linear_paths()} if config.load_in_4bit else set()
    frozen = sum(
        math.prod(shape) * (_NF4_BYTES if name in linears else size)
        for name, shape in cfg.weight_shapes().items()
        if name not in trained
    )
    kv = cfg.num_key_value_heads * cfg.head_dim
    block = 8 * cfg.hidden_size + 2 * kv + 4 * cfg.intermediate_size
    layers = cfg.num_hidden_layers * block
    if config.gradient_checkpointing in ("block", "full"):
        layers = block + cfg.num_hidden_layers * cfg.hidden_size
    tokens = config.per_device_train_batch_size * config.max_length
    return {
        "frozen weights": frozen / 2**30,
        "trained tensors, gradients and moments": 16
        * sum(map(math.prod, trained.values()))
        / 2**30,
        "activations about": size * tokens * layers / 2**30,
    }
