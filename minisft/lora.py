"""Trained tensors as named views of one flat float32 buffer, and the initial LoRA matrices.

The A matrices of linears with the same input (q, k, v; gate, up) are adjacent in the buffer. In
full fine-tuning, tensors with weight decay come first, so that a parameter group of the optimizer
is one contiguous slice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from minisft.config.lora import LoraConfig
from minisft.config.model import ModelConfig
from minisft.config.targets import TOKEN_ROWS, adapter_shapes
from minisft.config.train import TrainConfig

# Names without weight decay (biases, norms), as in transformers' Trainer.get_decay_parameter_names.
_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm(\.|$)|_norm(\.|$)")
# --embedding-learning-rate applies to these weights, as trained copies or in full fine-tuning.
EMBEDDING_WEIGHTS = ("model.embed_tokens.weight", "lm_head.weight")


class Flat(NamedTuple):
    """A 1-D buffer and its named views, which cover the buffer without gaps, in order."""

    buffer: Tensor  # float32 [n]
    views: dict[str, Tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape, in the order of the buffer."""
        return {name: tuple(view.shape) for name, view in self.views.items()}


class ParamGroup(NamedTuple):
    """A slice start:stop of the flat buffer whose parameters share their optimizer settings."""

    start: int
    stop: int
    decayed: bool
    learning_rate: float  # at the peak of the schedule, unless scaled
    eight_bit: bool = False  # whether an 8-bit optimizer keeps its moments in 8 bits
    name: str = ""  # "embeddings" or "lora_B", if these have a learning rate of their own

    def scaled(self, factor: float) -> ParamGroup:
        """Return the group with its learning rate multiplied by the schedule's factor."""
        return self._replace(learning_rate=self.learning_rate * factor)


def trainable_shapes(lora: LoraConfig | None, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every trained tensor, in buffer order. lora None: all weights.

    A tied embedding and head are one tensor, model.embed_tokens.weight, even if lm_head was
    requested. Raises UserError if a target module of `lora` matches nothing.
    """
    if lora is None:
        shapes = cfg.weight_shapes()
        return dict(sorted(shapes.items(), key=lambda kv: not is_decayed(kv[0])))
    shapes = adapter_shapes(lora, cfg)
    return dict(sorted(shapes.items(), key=lambda kv: _adapter_order(kv[0])))


def _adapter_order(name: str) -> tuple[int, int, bool]:
    """Return a sort key by layer, then by input: A of q, k, v adjacent, then B of q, k, v."""
    # The explicit pass reads adjacent A matrices as one [3R, I] matrix, without a copy.
    if not name.startswith("model.layers."):  # trained rows and copies come last
        return (1 << 30, 0, False)
    parts = name.split(".")  # model.layers.3.self_attn.q_proj.lora_A.weight
    group = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2}
    return int(parts[2]), group.get(parts[4], 3), parts[5] == "lora_B"


def is_decayed(name: str) -> bool:
    """Return whether weight decay applies to the named tensor, by Hugging Face Trainer's rule."""
    return _NOT_DECAYED.search(name.lower()) is None


def allocate(shapes: dict[str, tuple[int, ...]], device: torch.device) -> Flat:
    """Return a zero-filled flat float32 buffer with one named view per shape, in order."""
    total = sum(math.prod(s) for s in shapes.values())
    return viewed(torch.zeros(total, dtype=torch.float32, device=device), shapes)


def viewed(buffer: Tensor, shapes: Mapping[str, Sequence[int]]) -> Flat:
    """Return an existing 1-D buffer with one named view per shape, in the order of `shapes`."""
    parts = buffer.split([math.prod(s) for s in shapes.values()])
    return Flat(buffer, {n: p.view(*s) for (n, s), p in zip(shapes.items(), parts, strict=True)})


def param_groups(shapes: dict[str, tuple[int, ...]], config: TrainConfig) -> list[ParamGroup]:
    """Return the parameter groups of a buffer made by `allocate(shapes)`.

    Adjacent tensors with equal settings share a group. Trained embeddings and heads use
    --embedding-learning-rate if given; lora_B matrices use the learning rate times
    --loraplus-lr-ratio (arXiv:2402.12354).
    """
    out: list[ParamGroup] = []
    start = 0
    for name, shape in shapes.items():
        embedding = name in EMBEDDING_WEIGHTS
        rate, own = config.learning_rate, ""
        if embedding and config.embedding_learning_rate is not None:
            rate, own = config.embedding_learning_rate, "embeddings"
        elif config.loraplus_lr_ratio is not None and ".lora_B." in name:
            rate, own = rate * config.loraplus_lr_ratio, "lora_B"
        stop, decayed = start + math.prod(shape), is_decayed(name)
        # As in bitsandbytes, embeddings have 32-bit moments. Norms and biases are small.
        eight_bit = config.optim.endswith("_8bit") and len(shape) == 2
        eight_bit = eight_bit and not embedding and name != TOKEN_ROWS
        if out and out[-1][2:] == (decayed, rate, eight_bit, own):
            out[-1] = out[-1]._replace(stop=stop)
        else:
            out.append(ParamGroup(start, stop, decayed, rate, eight_bit, own))
        start = stop
    return out


def init_lora_(trainable: Flat, seed: int, kind: str = "default") -> None:
    """Initialise the LoRA matrices in place; the weight loader fills the other views.

    Linears: B stays zero; A is uniform in +-1/sqrt(in_features), PEFT's default, or, for kind
    "gaussian", normal with standard deviation 1/r. Embedding: A stays zero, B is standard normal.
    """
    for name, view in trainable.views.items():
        # One CPU generator per tensor, so that the initial values of a module do not depend on the
        # device or on which other modules are trained.
        digest = blake2b(f"{seed},{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        if name.endswith(".lora_embedding_B"):
            view.copy_(torch.randn(view.shape, generator=generator))
        elif name.endswith(".lora_A.weight") and kind == "gaussian":
            view.copy_(torch.randn(view.shape, generator=generator) / view.shape[0])
        elif name.endswith(".lora_A.weight"):
            bound = 1 / math.sqrt(view.shape[1])
            view.copy_(torch.empty(view.shape).uniform_(-bound, bound, generator=generator))
