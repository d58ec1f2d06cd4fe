"""What a run needs of memory, by estimate; out of memory, said in one line with what needs less."""

from __future__ import annotations

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

_CPU_ALLOCATOR = ("can't allocate memory", "not enough memory")  # a plain RuntimeError there


Needs = dict[str, float]  # what for -> GiB
_PLANNED = "gradient, buffers and activations"  # of the hand-written pass on a GPU


@contextmanager
def out_of_memory(config: TrainConfig) -> Iterator[Needs]:
    """Turns running out of GPU or host memory into a UserError with the estimate and the levers.

    Yields where to put the estimate, once there is one; until then it is that of the weights.
    """
    needs: Needs = {}
    try:
        yield needs
    except (torch.OutOfMemoryError, MemoryError) as e:
        raise UserError(_message(config, e, needs)) from e
    except RuntimeError as e:
        if not any(text in str(e) for text in _CPU_ALLOCATOR):
            raise
        raise UserError(_message(config, e, needs)) from e


def _message(config: TrainConfig, error: BaseException, needs: Needs) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
    needs = needs or resident_gib(*load_base(dataclasses.replace(config, dry_run=True)))
    return (
        f"out of memory ({reason}). This run needs, by estimate: {in_words(needs)}. "
        f"{'; '.join(levers(config, needs))}. {what_is_kept(Path(config.output_dir))}"
    )


def in_words(needs: Needs) -> str:
    """The parts of an estimate, in words."""
    return ", ".join(f"{what} {gib:.2f} GiB" for what, gib in needs.items())


def levers(config: TrainConfig, needs: Needs) -> list[str]:
    """The settings that would need less memory, the one that costs nothing first."""
    found = []
    rows = config.per_device_train_batch_size
    if _PLANNED in needs:  # micro-batches of its own, whatever the batch size
        gib = sum(needs.values())
        found.append(f"--max-memory-gib below {gib:.2f} plans with less (same training, slower)")
    elif rows > 1:
        found.append(
            f"halve --per-device-train-batch-size {rows} and double "
            f"--gradient-accumulation-steps {config.gradient_accumulation_steps} (same training)"
        )
    if config.gradient_checkpointing == "none" or (
        config.gradient_checkpointing == "auto" and _PLANNED not in needs
    ):
        found.append("--gradient-checkpointing full (same training, slower)")
    found.append(f"lower --max-length {config.max_length}")
    if config.full_finetuning:
        found.append("train an adapter instead (no --full-finetuning)")
    elif not config.load_in_4bit:
        found.append("--load-in-4bit")
    return found


def resident_gib(base: Base, state: State) -> Needs:
    """GiB of the weights, and of the trained tensors with the optimizer's state; exact."""
    frozen = sum(w.nbytes if isinstance(w, Tensor) else w.nbytes() for w in base.frozen.values())
    trained = state.trainable.buffer.nbytes + sum(m.nbytes for m in state.moments.values())
    return {"frozen weights": frozen / 2**30, "trained tensors and optimizer": trained / 2**30}


def estimate(base: Base, state: State, plan: ExecutionPlan, tokens: int, evaluated: int) -> Needs:
    """Estimated memory of a run in GiB, by what it is for.

    tokens: of the largest micro-batch in training. evaluated: of the largest in evaluation (0:
    there is none). The hand-written pass on a GPU: what it was planned with. Autograd: a gradient
    as long as the trained tensors, what it keeps of each token, and two float32 blocks of logits.
    Where an evaluation needs more than a training step, what the evaluation needs.
    """
    needs = resident_gib(base, state)
    V, cfg, size = base.cfg.vocab_size, base.cfg, base.compute.dtype.itemsize
    # One layer's: its input, norm and sum, the norm's float32; gate, up and their product.
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
    """What autograd keeps of a token in all layers.

    Of a layer: the input of each norm in float32 and its result, and before the weight where that
    is trained; q, k, v and the attended values; gate, silu(gate), up and their product. Of an
    adapted linear x A^T, with dropout what is left of x, with DoRA the output before it is scaled.
    With checkpointed blocks: that of one layer, and the inputs of all.
    """
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
    return total / L + L * D * size if compute.checkpoint_blocks else total
