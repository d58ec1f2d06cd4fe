"""Memory estimates, and one-line out-of-memory errors that suggest cheaper settings."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from minisft.config.errors import UserError
from minisft.config.train import TrainConfig
from minisft.files.checkpoint import what_is_kept
from minisft.files.load import Base, load_base
from minisft.llama import Compute
from minisft.lora import Flat
from minisft.loss import rows_evaluated, rows_of_logits
from minisft.step import ExecutionPlan, State

# On the CPU, torch signals out of memory by a plain RuntimeError with one of these texts.
_CPU_ALLOCATOR = ("can't allocate memory", "not enough memory")
Needs = dict[str, float]  # purpose -> GiB
_PLANNED = "gradient, buffers and activations"  # of the explicit pass on a GPU


@contextmanager
def out_of_memory(config: TrainConfig) -> Iterator[Needs]:
    """Turn an out-of-memory error into a UserError with an estimate and cheaper settings.

    Yields a dict to fill with the estimate; if empty, only weights and optimizer are estimated.
    """
    needs: Needs = {}
    try:
        yield needs
    # RuntimeError includes torch.OutOfMemoryError, which the GPU allocator raises.
    except (MemoryError, RuntimeError) as e:
        known = isinstance(e, torch.OutOfMemoryError | MemoryError)
        if not known and not any(text in str(e) for text in _CPU_ALLOCATOR):
            raise
        reason = (str(e).strip() or type(e).__name__).splitlines()[0].split(". ")[0]
        needs = needs or resident_gib(*load_base(dataclasses.replace(config, dry_run=True)))
        raise UserError(
            f"out of memory ({reason}). Estimated need: {in_words(needs)}. "
            f"{'; '.join(levers(config, needs))}. {what_is_kept(Path(config.output_dir))}"
        ) from e


def in_words(needs: Needs) -> str:
    """Format an estimate as text: each purpose with its GiB."""
    return ", ".join(f"{what} {gib:.2f} GiB" for what, gib in needs.items())


def levers(config: TrainConfig, needs: Needs) -> list[str]:
    """Suggest settings that need less memory; the first suggestions do not change the training."""
    found, rows = [], config.per_device_train_batch_size
    # The batch size is irrelevant to the explicit pass, which plans its own micro-batches.
    if _PLANNED in needs:
        gib = sum(needs.values())
        found.append(f"--max-memory-gib below {gib:.2f} plans with less (same training, slower)")
    elif rows > 1:
        found.append(
            f"halve --per-device-train-batch-size {rows} and double "
            f"--gradient-accumulation-steps {config.gradient_accumulation_steps} (same training)"
        )
    if config.gradient_checkpointing in (("none",) if _PLANNED in needs else ("none", "auto")):
        found.append("--gradient-checkpointing full (same training, slower)")
    found.append(f"lower --max-length {config.max_length}")
    if config.full_finetuning:
        found.append("train an adapter instead (no --full-finetuning)")
    elif not config.load_in_4bit:
        found.append("--load-in-4bit")
    return found


def resident_gib(base: Base, state: State) -> Needs:
    """Returns the exact GiB of the frozen weights and of the trained tensors with their moments."""
    frozen = sum(w.nbytes if isinstance(w, Tensor) else w.nbytes() for w in base.frozen.values())
    trained = state.trainable.buffer.nbytes + sum(m.nbytes for m in state.moments.values())
    return {"frozen weights": frozen / 2**30, "trained tensors and optimizer": trained / 2**30}


def estimate(base: Base, state: State, plan: ExecutionPlan, tokens: int, evaluated: int) -> Needs:
    """Estimate the memory of a run: GiB by purpose.

    tokens, evaluated: size of the largest training micro-batch and evaluation batch (0: none). The
    explicit pass on a GPU needs its planned peak; autograd needs the gradient, saved activations
    and two float32 blocks of logits. Evaluation replaces the activations if it needs more.
    """
    needs = resident_gib(base, state)
    V, cfg, size = base.cfg.vocab_size, base.cfg, base.compute.dtype.itemsize
    # Evaluation holds the activations of one layer: input, norm and residual sum, two float32
    # copies for the norm, and gate, up and their product.
    layer = (4 * size + 8) * cfg.hidden_size + 3 * size * cfg.intermediate_size
    logits = 2 * 4 * min(evaluated, rows_evaluated(V)) * V
    evaluation = (evaluated * layer + logits) / 2**30
    if plan.choice and plan.choice.peak_bytes:
        rest = plan.choice.peak_bytes / 2**30 - sum(needs.values())
        return needs | {_PLANNED: max(rest, evaluation)}
    logits = 2 * 4 * min(tokens, rows_of_logits(V)) * V
    activations = (tokens * autograd_bytes(base.compute, state.trainable) + logits) / 2**30
    what = f"activations of {tokens:,} tokens"
    if evaluation > activations:
        what, activations = f"activations of {evaluated:,} evaluated tokens", evaluation
    return needs | {"gradient": state.trainable.buffer.nbytes / 2**30, what: activations}


def autograd_bytes(compute: Compute, trainable: Flat) -> float:
    """Returns the bytes per token that autograd saves for the backward pass, over all layers."""
    # Activations saved for the backward pass. Per layer: each norm's input in float32 and its
    # output (and, if the norm's weight is trained, the value before that weight); q, k, v, the
    # attention output; gate, silu(gate), up and their product. Per adapted linear: x A^T; x after
    # dropout, if there is any; with DoRA, the output before scaling.
    cfg = compute.model
    D, F, L = cfg.hidden_size, cfg.intermediate_size, cfg.num_hidden_layers
    heads = 2 * (cfg.num_attention_heads + cfg.num_key_value_heads) * cfg.head_dim
    numbers = L * (2 * D + heads + 4 * F)
    for name, view in trainable.views.items():
        if name.endswith(".lora_A.weight"):
            r, in_features = view.shape
            numbers += r + (in_features if compute.lora_dropout else 0)
        elif name.endswith((".lora_magnitude_vector", "layernorm.weight")):
            numbers += view.numel()
    size = compute.dtype.itemsize
    total = numbers * size + L * 2 * D * 4
    # With checkpointed blocks: one layer's activations, while recomputed, and all layers' inputs.
    return total / L + L * D * size if compute.checkpoint_blocks else total
