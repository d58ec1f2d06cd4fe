"""What is trained, as one flat fp32 buffer with a named view per tensor.

Neighbours in the model are neighbours in the buffer (the A matrices of q, k, v; of gate, up), and
decayed tensors come before those that are not, so that an optimizer group is one contiguous slice.
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

# Trainer decays everything but biases and norms (transformers.Trainer.get_decay_parameter_names).
_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm(\.|$)|_norm(\.|$)")


# Trained copies, and the same weights in full fine-tuning: with a learning rate of their own.
EMBEDDING_WEIGHTS = ("model.embed_tokens.weight", "lm_head.weight")


class Flat(NamedTuple):
    """One 1-D buffer and views into it by name, in the buffer's order."""

    buffer: Tensor  # float32 [n]
    views: dict[str, Tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in the buffer's order."""
        return {name: tuple(view.shape) for name, view in self.views.items()}


class ParamGroup(NamedTuple):
    """A slice of the flat buffer that the optimizer treats alike."""

    start: int
    stop: int
    decayed: bool
    learning_rate: float  # at the schedule's peak
    eight_bit: bool = False  # whether an 8-bit optimizer keeps its moments in 8 bits


def trainable_shapes(lora: LoraConfig | None, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every trained tensor, in buffer order. lora None: all weights of the model.

    Tied embeddings are one tensor, model.embed_tokens.weight, whichever of the two was asked for.
    UserError for targets that match nothing.
    """
    if lora is None:
        shapes = cfg.weight_shapes()
        return dict(sorted(shapes.items(), key=lambda kv: not is_decayed(kv[0])))
    shapes = adapter_shapes(lora, cfg)
    return dict(sorted(shapes.items(), key=lambda kv: _place(kv[0])))


def _place(name: str) -> tuple[int, int, bool]:
    """Order that lays tensors that read one input side by side: A of q, k, v, then B of q, k, v."""
    if not name.startswith("model.layers."):  # trained rows and copies come last
        return (1 << 30, 0, False)
    parts = name.split(".")  # model.layers.3.self_attn.q_proj.lora_A.weight
    group = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2}
    return int(parts[2]), group.get(parts[4], 3), parts[5] == "lora_B"


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to the tensor of that name, by Trainer's rule."""
    return _NOT_DECAYED.search(name.lower()) is None


def allocate(shapes: dict[str, tuple[int, ...]], device: torch.device) -> Flat:
    """A zeroed fp32 buffer with one view per shape, in order."""
    total = sum(math.prod(s) for s in shapes.values())
    return viewed(torch.zeros(total, dtype=torch.float32, device=device), shapes)


def viewed(buffer: Tensor, shapes: Mapping[str, Sequence[int]]) -> Flat:
    """The 1-D buffer with one view per shape, in order: the layout that `allocate` gives."""
    parts = buffer.split([math.prod(s) for s in shapes.values()])
    return Flat(buffer, {n: p.view(*s) for (n, s), p in zip(shapes.items(), parts, strict=True)})


def param_groups(shapes: dict[str, tuple[int, ...]], config: TrainConfig) -> list[ParamGroup]:
    """The optimizer's slices of a buffer made by `allocate(shapes)`, as few as the settings allow.

    Trained embeddings and heads have --embedding-learning-rate where one is given, lora_B matrices
    the learning rate times --loraplus-lr-ratio. Eight-bit moments are for matrices that are neither
    embedding nor head.
    """
    out: list[ParamGroup] = []
    start = 0
    for name, shape in shapes.items():
        embedding, tokens = name in EMBEDDING_WEIGHTS, name == TOKEN_ROWS
        rate = config.learning_rate
        if embedding and config.embedding_learning_rate is not None:
            rate = config.embedding_learning_rate
        elif config.loraplus_lr_ratio is not None and ".lora_B." in name:
            rate *= config.loraplus_lr_ratio
        stop, decayed = start + math.prod(shape), is_decayed(name)
        eight_bit = config.optim.endswith("_8bit") and len(shape) == 2
        eight_bit = eight_bit and not embedding and not tokens
        if out and out[-1][2:] == (decayed, rate, eight_bit):
            out[-1] = out[-1]._replace(stop=stop)
        else:
            out.append(ParamGroup(start, stop, decayed, rate, eight_bit))
        start = stop
    return out


def init_lora_(trainable: Flat, seed: int, kind: str = "default") -> None:
    """B zero; A uniform in ±1/sqrt(in_features), PEFT's default, or `gaussian` of deviation 1/r.

    Of the embedding's pair A is zero and B normal.

    The draw of a module depends on (seed, its name) alone, not on which others are trained or on
    the device. Trained copies and magnitudes are left for the weight loader to fill.
    """
    for name, view in trainable.views.items():
        digest = blake2b(f"{seed},{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        if name.endswith(".lora_embedding_B"):
            view.copy_(torch.randn(view.shape, generator=generator))
        if name.endswith(".lora_A.weight"):
            r, in_features = view.shape
            if kind == "gaussian":
                view.copy_(torch.randn(view.shape, generator=generator) / r)
                continue
            bound = 1 / math.sqrt(in_features)
            view.copy_(torch.empty(view.shape).uniform_(-bound, bound, generator=generator))
