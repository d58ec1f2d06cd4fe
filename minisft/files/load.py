"""The base model of a run, loaded: frozen weights, trainable state, tokenizer, device and dtype."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from minisft.config.errors import UserError
from minisft.config.lora import LoraConfig
from minisft.config.model import ModelConfig
from minisft.config.targets import TOKEN_ROWS, check_patterns, scaling_ratios, split_targets
from minisft.config.train import TrainConfig
from minisft.files.device import peak_memory_gib, resolve_device, resolve_dtype
from minisft.files.quant_state import kinds
from minisft.files.weights import (
    Checkpoint,
    dequantized,
    four_bit_names,
    load_model_config,
    meta_weights,
    open_checkpoint,
    resolve_model,
    stream_weights,
    to_device,
)
from minisft.kernels.nf4 import NF4Weight
from minisft.llama import EMBEDDING, TOKEN_IDS, Compute
from minisft.lora import Flat, allocate, init_lora_, param_groups, trainable_shapes
from minisft.optim import check_optimizer, init_moments
from minisft.step import INITIAL_LOSS_SCALE, State
from minisft.text.tokenizer import Tokenizer, load_tokenizer
from minisft.variants.pissa import initial_lora


@dataclass(frozen=True)
class Base:
    """The base model of a run: config, frozen weights, tokenizer, and how to compute with it."""

    directory: Path
    frozen: dict[str, Tensor | NF4Weight]
    tokenizer: Tokenizer
    compute: Compute
    device: torch.device
    lora: LoraConfig | None
    load_seconds: float = 0.0
    load_peak_gib: float = 0.0  # on the device, or of the process on CPU
    # A0 and B0 (`minisft.variants.pissa`) by the names of A and B, on CPU.
    start: dict[str, Tensor] = field(default_factory=dict)

    @property
    def cfg(self) -> ModelConfig:
        return self.compute.model


def base_4bit(config: TrainConfig, model: Base) -> str:
    """`quant_state.kinds` of the base that the adapter belongs on; "" if that is not in 4 bits."""
    if not config.serves_in_4bit:
        return ""
    return kinds(w for w in model.frozen.values() if isinstance(w, NF4Weight))


def load_base(config: TrainConfig, start: Mapping[str, Tensor] = {}) -> tuple[Base, State]:
    """Weights to the device one tensor at a time; the trained ones as views of a flat buffer.

    With config.load_in_4bit each linear is quantised as it comes. A trained copy of a weight that
    is stored in 4 bits starts from its decoded values. start: Base.start of the run that is
    resumed; without it, what PiSSA and OLoRA start from is computed. With config.dry_run everything
    is checked and nothing loaded: all tensors lie on torch's meta device, which keeps sizes alone.
    UserError for a 4-bit checkpoint whose weights are to change, and as `check_patterns`,
    `check_optimizer` and the readers have it.
    """
    started = time.perf_counter()
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    check_optimizer(config.optim, device)
    directory = resolve_model(config.model, config.revision)
    checkpoint = open_base(directory, config)
    tokenizer = load_tokenizer(directory, chat_template=config.chat_template)
    lora = None if config.lora is None else split_targets(config.lora)
    if lora:
        check_patterns(lora, checkpoint.cfg)
    shapes = trainable_shapes(lora, checkpoint.cfg)
    flat = allocate(shapes, torch.device("meta") if config.dry_run else device)
    four_bit = four_bit_names(checkpoint, config.load_in_4bit)
    first = {n: t for n, t in start.items() if n in shapes and tuple(t.shape) == shapes[n]}
    if config.dry_run:
        weights = meta_weights(checkpoint, dtype, four_bit)
        frozen = {name: weight for name, weight in weights if name not in shapes}
    else:
        init_lora_(flat, config.seed, config.init_lora_weights)
        frozen = {}
        for name, weight in stream_weights(checkpoint):
            if name in flat.views:
                flat.views[name].copy_(dequantized(weight))
                continue
            path = name.removesuffix(".weight")
            if lora and lora.splits_weights and f"{path}.lora_A.weight" in flat.views:
                weight = take_part_(path, weight, lora, flat, first, config.seed)
            frozen[name] = to_device(name, weight, device, dtype, name in four_bit)
        if lora and lora.use_dora:
            init_magnitudes_(flat, frozen, lora)
        if lora and lora.trainable_token_indices:
            ids, embedding = token_ids(lora, device), frozen[EMBEDDING]
            assert isinstance(embedding, Tensor)
            flat.views[TOKEN_ROWS].copy_(embedding[ids])
            frozen[TOKEN_IDS] = ids
    compute = Compute(
        model=checkpoint.cfg,
        dtype=dtype,
        lora_scaling=lora.scaling if lora else 1.0,
        lora_ratios=scaling_ratios(lora, checkpoint.cfg) if lora else (),
        lora_dropout=lora.lora_dropout if lora else 0.0,
        loss_type=config.loss_type,
        label_smoothing=config.label_smoothing,
        neftune_alpha=config.neftune_noise_alpha,
        checkpoint_blocks=config.gradient_checkpointing in ("block", "full"),
    )
    state = State(
        trainable=flat,
        moments=init_moments(flat, param_groups(shapes, config), config.optim),
        loss_scale=INITIAL_LOSS_SCALE if dtype == torch.float16 else 1.0,
    )
    if device.type == "cuda" and not config.dry_run:
        torch.cuda.synchronize(device)
    peak = peak_memory_gib(device)
    seconds = time.perf_counter() - started
    return Base(directory, frozen, tokenizer, compute, device, lora, seconds, peak, first), state


def take_part_(
    path: str,
    weight: Tensor | NF4Weight,
    lora: LoraConfig,
    trainable: Flat,
    start: dict[str, Tensor],
    seed: int,
) -> Tensor:
    """Start A and B of a linear as a part of its weight; the rest of it, float32 on their device.

    A part that `start` does not hold is computed and put there.
    """
    A_name, B_name = (f"{path}.lora_{x}.weight" for x in "AB")
    A_RI, B_OR = trainable.views[A_name], trainable.views[B_name]
    W_OI = dequantized(weight).to(A_RI.device, torch.float32)
    if not {A_name, B_name} <= start.keys():
        A0_RI, B0_OR = initial_lora(path, W_OI, lora, seed)
        start |= {A_name: A0_RI.cpu().contiguous(), B_name: B0_OR.cpu().contiguous()}
    A_RI.copy_(start[A_name])
    B_OR.copy_(start[B_name])
    return W_OI - lora.scaling_of(path) * (B_OR @ A_RI)


def open_base(directory: Path, config: TrainConfig) -> Checkpoint:
    """The checked headers of a run's base; UserError for a 4-bit one that is to change."""
    checkpoint = open_checkpoint(directory, load_model_config(directory))
    if config.full_finetuning and checkpoint.four_bit:
        raise UserError(
            f"{directory} is quantised to 4 bits, and --full-finetuning trains every weight: use "
            "the unquantised base, or drop --full-finetuning to train an adapter"
        )
    if config.lora and config.lora.splits_weights and config.load_in_4bit and checkpoint.four_bit:
        raise UserError(
            f"{directory} is quantised to 4 bits, and --init-lora-weights "
            f"{config.init_lora_weights} would quantise what is left of it a second time: use the "
            "unquantised base, or --no-load-in-4bit, which decodes this one"
        )
    return checkpoint


def token_ids(lora: LoraConfig, device: torch.device) -> Tensor:
    """The ids of trained token rows, int64, as the forward pass finds them among the weights."""
    return torch.tensor(lora.trainable_token_indices, dtype=torch.int64, device=device)


def init_magnitudes_(
    trainable: Flat, frozen: Mapping[str, Tensor | NF4Weight], lora: LoraConfig
) -> None:
    """DoRA's magnitudes start as the lengths of the rows of the frozen weights and their update."""
    for name, view in trainable.views.items():
        path, found, _ = name.partition(".lora_magnitude_vector")
        if found:
            W_OI = dequantized(frozen[f"{path}.weight"]).float()
            A_RI, B_OR = (trainable.views[f"{path}.lora_{x}.weight"] for x in "AB")
            view.copy_((W_OI + lora.scaling_of(path) * (B_OR @ A_RI)).norm(dim=1))
