"""A Llama in memory, small enough to train in a test: weights, an adapter, and token rows.

All its sizes differ, so that a transposed or misplaced tensor cannot fit by accident.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minisft.batches import Batches, RowSchedule, StepBatch, TokenizedDataset
from minisft.config.lora import LoraConfig
from minisft.config.model import ModelConfig
from minisft.lora import Flat, allocate, init_lora_, trainable_shapes
from minisft.optim import init_moments
from minisft.step import State

CFG = ModelConfig(
    vocab_size=97,
    hidden_size=40,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=14,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
)
LORA = LoraConfig(r=3, lora_alpha=6)
CPU = torch.device("cpu")


def random_weights(
    cfg: ModelConfig = CFG, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Every weight of the model, norms and biases random too: ones and zeros hide bugs."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in cfg.weight_shapes().items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = (1 + 0.1 * noise if "norm" in name else 0.15 * noise).to(dtype)
    return weights


def random_adapter(
    cfg: ModelConfig = CFG, lora: LoraConfig = LORA, seed: int = 1, b_scale: float = 0.1
) -> Flat:
    """An adapter whose B is not zero (b_scale 0: as training starts), and its trained copies."""
    flat = allocate(trainable_shapes(lora, cfg), CPU)
    init_lora_(flat, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, view in flat.views.items():
        if not name.endswith(".lora_A.weight"):
            scale = b_scale if name.endswith(".lora_B.weight") else 0.15
            view.copy_(torch.randn(view.shape, generator=generator) * scale)
    return flat


def whole_model(cfg: ModelConfig = CFG, seed: int = 0) -> Flat:
    """All weights as the trained buffer of full fine-tuning."""
    flat = allocate(trainable_shapes(None, cfg), CPU)
    for name, tensor in random_weights(cfg, seed).items():
        flat.views[name].copy_(tensor)
    return flat


def state_of(trainable: Flat, loss_scale: float = 1.0) -> State:
    """A state before its first step."""
    return State(trainable, init_moments(trainable, [], "adamw"), loss_scale=loss_scale)


def dataset_of(rows: list[list[list[int]]], labels: list[list[list[int]]]) -> TokenizedDataset:
    """Rows of documents of token ids, and their labels in the same shape."""
    documents = [d for row in rows for d in row]

    def offsets(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0)

    return TokenizedDataset(
        torch.tensor([t for d in documents for t in d], dtype=torch.int32),
        torch.tensor([t for row in labels for d in row for t in d], dtype=torch.int32),
        offsets([len(d) for d in documents]),
        offsets([len(row) for row in rows]),
        {},
    )


def random_dataset(
    lengths: list[list[int]], seed: int = 0, masked: float = 0.3, vocab: int = CFG.vocab_size
) -> TokenizedDataset:
    """Rows of documents of these lengths; a share `masked` of their labels is ignored."""
    generator = torch.Generator().manual_seed(seed)
    rows, labels = [], []
    for row in lengths:
        rows.append([torch.randint(vocab, (n,), generator=generator).tolist() for n in row])
        draws = [torch.rand(n, generator=generator).tolist() for n in row]
        labels.append(
            [
                [-100 if u < masked else t for t, u in zip(d, draw, strict=True)]
                for d, draw in zip(rows[-1], draws, strict=True)
            ]
        )
    return dataset_of(rows, labels)


def all_rows(dataset: TokenizedDataset, **settings) -> StepBatch:
    """One step over every row of a dataset. settings: max_tokens, dropout, step, seed."""
    settings = {"max_tokens": 10**9, "dropout": False, "step": 0, "seed": 0} | settings
    schedule = RowSchedule(len(dataset), len(dataset), 1, seed=settings["seed"])
    batches = Batches(dataset, schedule, settings["max_tokens"], CPU, dropout=settings["dropout"])
    return batches.batch(settings["step"])


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in float64."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
