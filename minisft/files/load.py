"""Load the base model of a run: frozen weights on the device, and the initial training state."""

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
from minisft.files import weights
from minisft.files.device import peak_memory_gib, resolve_device, resolve_dtype
from minisft.files.quant_state import kinds
from minisft.files.weights import Checkpoint, dequantized
from minisft.kernels.nf4 import NF4Weight
from minisft.llama import EMBEDDING, TOKEN_IDS, Compute
from minisft.lora import Flat, allocate, init_lora_, param_groups, trainable_shapes
from minisft.optim import check_optimizer, init_moments
from minisft.step import INITIAL_LOSS_SCALE, State
from minisft.variants import pissa


@dataclass(frozen=True)
class Base:
    """The base model of a run: its frozen weights, and the settings to compute with them."""

    directory: Path
    frozen: dict[str, Tensor | NF4Weight]
    compute: Compute
    device: torch.device
    lora: LoraConfig | None
    load_seconds: float = 0.0
    load_peak_gib: float = 0.0  # on the device, or of the process on CPU
    # Initial A and B of PiSSA and OLoRA, under the names of A and B, on CPU (`variants.pissa`).
    initial_lora: dict[str, Tensor] = field(default_factory=dict)

    @property
    def cfg(self) -> ModelConfig:
        """The architecture of the model: sizes, number of layers, tying."""
        return self.compute.model


def base_4bit(config: TrainConfig, base: Base) -> str:
    """Return `quant_state.kinds` of the base to use the adapter with; "" if it is not in 4 bits."""
    if not config.serves_in_4bit:
        return ""
    return kinds(w for w in base.frozen.values() if isinstance(w, NF4Weight))


def find_base(config: TrainConfig) -> Path:
    """Return the directory of the base model; download it if config.model is a hub id.

    Before the download, raises UserError for a device, dtype or optimizer that is not available
    on this machine.
    """
    device = resolve_device(config.device)
    resolve_dtype(config.dtype, device)
    check_optimizer(config.optim, device)
    return weights.resolve_model(config.model, config.revision)


def load_base(
    config: TrainConfig, initial_lora: Mapping[str, Tensor] = {}, directory: Path | None = None
) -> tuple[Base, State]:
    """Load a base model; return its frozen weights (Base) and the initial training state.

    The trained tensors are views of one flat buffer. A trained copy of a 4-bit weight starts from
    the decoded values. initial_lora: Base.initial_lora of the run to resume; if empty, the initial
    A and B of PiSSA and OLoRA are computed. directory: result of an earlier call of `find_base`.
    With config.dry_run, everything is checked but all tensors are on torch's meta device. Raises
    UserError for a 4-bit base whose weights would change, for missing or invalid files, and in the
    cases of `find_base` and `check_patterns`.
    """
    started = time.perf_counter()
    directory = directory or find_base(config)
    checkpoint = open_base(directory, config)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    lora = None if config.lora is None else split_targets(config.lora)
    if lora:
        check_patterns(lora, checkpoint.cfg)
    shapes = trainable_shapes(lora, checkpoint.cfg)
    flat = allocate(shapes, torch.device("meta") if config.dry_run else device)
    first = {n: t for n, t in initial_lora.items() if tuple(t.shape) == shapes.get(n)}
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
    four_bit = weights.four_bit_names(checkpoint, config.load_in_4bit)
    if config.dry_run:
        unfilled = weights.meta_weights(checkpoint, dtype, four_bit)
        frozen = {name: weight for name, weight in unfilled if name not in shapes}
    else:
        init_lora_(flat, config.seed, config.init_lora_weights)
        frozen = load_weights_(checkpoint, flat, compute, lora, four_bit, first, config.seed)
    state = State(
        trainable=flat,
        moments=init_moments(flat, param_groups(shapes, config), config.optim),
        loss_scale=INITIAL_LOSS_SCALE if dtype == torch.float16 else 1.0,
    )
    if device.type == "cuda" and not config.dry_run:
        torch.cuda.synchronize(device)
    seconds, peak = time.perf_counter() - started, peak_memory_gib(device)
    return Base(directory, frozen, compute, device, lora, seconds, peak, first), state


def load_weights_(
    checkpoint: Checkpoint,
    trainable: Flat,
    compute: Compute,
    lora: LoraConfig | None,
    four_bit: set[str],
    initial_lora: dict[str, Tensor],
    seed: int,
) -> dict[str, Tensor | NF4Weight]:
    """Fill the trained tensors from the checkpoint; return the frozen weights, on their device.

    four_bit: names of the weights to hold in 4 bits. initial_lora: initial A and B of PiSSA and
    OLoRA; tensors that it lacks are computed and stored in it (`take_part_`).
    """
    device = trainable.buffer.device
    frozen: dict[str, Tensor | NF4Weight] = {}
    for name, weight in weights.stream_weights(checkpoint):
        if name in trainable.views:
            trainable.views[name].copy_(dequantized(weight))
            continue
        path = name.removesuffix(".weight")
        if lora and lora.splits_weights and f"{path}.lora_A.weight" in trainable.views:
            weight = take_part_(path, weight, lora, trainable, initial_lora, seed)
        frozen[name] = weights.to_device(name, weight, device, compute.dtype, name in four_bit)
    if lora and lora.use_dora:
        for name, view in trainable.views.items():
            path, is_magnitude, _ = name.partition(".lora_magnitude_vector")
            if is_magnitude:  # starts as the lengths of the rows of the weight plus its update
                W_OI = dequantized(frozen[f"{path}.weight"]).float()
                A_RI, B_OR = (trainable.views[f"{path}.lora_{x}.weight"] for x in "AB")
                view.copy_((W_OI + lora.scaling_of(path) * (B_OR @ A_RI)).norm(dim=1))
    if lora and lora.trainable_token_indices:
        embedding = frozen[EMBEDDING]
        assert isinstance(embedding, Tensor)
        frozen[TOKEN_IDS] = ids = torch.tensor(lora.trainable_token_indices, device=device)
        trainable.views[TOKEN_ROWS].copy_(embedding[ids])
    return frozen


def take_part_(
    path: str,
    weight: Tensor | NF4Weight,
    lora: LoraConfig,
    trainable: Flat,
    initial_lora: dict[str, Tensor],
    seed: int,
) -> Tensor:
    """Set A and B of a linear from its weight W (PiSSA, OLoRA); return W - scaling * B A, float32.

    A and B are copied from `initial_lora`; if they are missing there, they are computed and added.
    """
    A_name, B_name = (f"{path}.lora_{x}.weight" for x in "AB")
    A_RI, B_OR = trainable.views[A_name], trainable.views[B_name]
    W_OI = dequantized(weight).to(A_RI.device, torch.float32)
    if not {A_name, B_name} <= initial_lora.keys():
        A0_RI, B0_OR = pissa.initial_lora(path, W_OI, lora, seed)
        initial_lora |= {A_name: A0_RI.cpu().contiguous(), B_name: B0_OR.cpu().contiguous()}
    A_RI.copy_(initial_lora[A_name])
    B_OR.copy_(initial_lora[B_name])
    return W_OI - lora.scaling_of(path) * (B_OR @ A_RI)


def open_base(directory: Path, config: TrainConfig) -> Checkpoint:
    """Open and check a run's base; raise UserError if 4-bit weights in it would have to change."""
    checkpoint = weights.open_checkpoint(directory, weights.load_model_config(directory))
    problem = remedy = ""
    if config.full_finetuning:
        problem = "--full-finetuning trains every weight"
        remedy = "drop --full-finetuning to train an adapter"
    elif config.lora and config.lora.splits_weights and config.load_in_4bit:
        flag = f"--init-lora-weights {config.init_lora_weights}"
        problem = f"{flag} would quantise what is left of it a second time"
        remedy = "--no-load-in-4bit, which decodes this one"
    if problem and checkpoint.four_bit:
        what = f"{directory} is quantised to 4 bits, and {problem}"
        raise UserError(f"{what}: use the unquantised base, or {remedy}")
    return checkpoint
