"""A base and its adapter as one ordinary checkpoint, written shard by shard and checked after.

W' = W + scaling * B A (DoRA: with rows of the trained length), formed in float32 and rounded once.
W is the base as it is stored
(`16bit`), or decoded from the 4 bits that the adapter was trained on (`dequant`): then the merged
model is the one that was trained.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minisft.config.errors import UserError
from minisft.config.lora import LoraConfig
from minisft.config.targets import EMBEDDING_A, EMBEDDING_B, TOKEN_ROWS, scaling_ratios
from minisft.files.adapter import base_in_4bit, load_adapter, other_4bit
from minisft.files.adapter_config import read_adapter_config
from minisft.files.device import resolve_device, resolve_dtype
from minisft.files.disk import atomic_directory, refuse_existing
from minisft.files.export import save_shards, write_model_files
from minisft.files.load import token_ids
from minisft.files.weights import (
    Checkpoint,
    dequantized,
    four_bit_names,
    kinds_of,
    load_model_config,
    open_checkpoint,
    resolve_model,
    stream_weights,
    to_device,
)
from minisft.llama import (
    EMBEDDING,
    TOKEN_IDS,
    Compute,
    logits,
    make_tokens,
)
from minisft.session.modelfile import serving_files
from minisft.text.tokenizer import load_tokenizer, tokenizer_of

CPU = torch.device("cpu")
BASES = ("auto", "16bit", "dequant")
# Largest |merged - live| / |live| of the logits, by the dtype that is written.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


class Merged(NamedTuple):
    """What `merge` did: onto which base, and how far its logits are from the live model's."""

    base: str  # 16bit or dequant
    model: Path
    relative_difference: float
    largest_difference: float
    from_trained: float | None = None  # relative, where the adapter was trained on the other base

    def __str__(self) -> str:
        how = {"16bit": "as it is stored", "dequant": "decoded from 4 bits"}
        line = (
            f"merged onto {self.model}, {how[self.base]}; logits differ from those of the adapter "
            f"on that base by {self.relative_difference:.1e} of their size, "
            f"{self.largest_difference:.1e} at most"
        )
        if self.from_trained is not None:
            trained = "as it is stored" if self.base == "dequant" else "in 4 bits"
            line += (
                f"; the adapter was trained on the base {trained}, and from the logits of that "
                f"model they differ by {self.from_trained:.1e}"
            )
        return line


def merge(
    adapter: str | Path,
    output_dir: str | Path,
    *,
    model: str = "",
    revision: str | None = None,
    base: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
) -> Merged:
    """Write output_dir, a transformers directory, from an adapter directory and its base.

    model, revision: the adapter's own unless given. base: `auto` is dequant for an adapter that was
    trained on a base in 4 bits. dtype: of the file; auto is the base's own, or bfloat16 where that
    is not said. The result appears under its name once it is complete and its logits agree.
    Raises UserError for what the user can mend, and if the logits do not agree.
    """
    out = Path(output_dir)
    if base not in BASES:
        raise UserError(f"--base is {base!r}; expected one of {', '.join(BASES)}")
    refuse_existing(out)
    raw = read_adapter_config(adapter)
    name = model or str(raw.get("base_model_name_or_path") or "")
    if not name:
        raise UserError(f"{adapter}: the adapter names no base model; give --model")
    directory = resolve_model(name, revision or (None if model else raw.get("revision")))
    checkpoint = open_checkpoint(directory, load_model_config(directory))
    lora, tensors = load_adapter(adapter, checkpoint.cfg)
    trained_in_4bit = bool(checkpoint.four_bit) or base_in_4bit(adapter)  # None: not known
    if base == "auto":
        base = "dequant" if trained_in_4bit else "16bit"
    if base == "16bit" and checkpoint.four_bit:
        raise UserError(
            f"--base 16bit, but {directory} is stored in 4 bits; give --model the 16-bit base, or "
            "take --base dequant"
        )
    where = resolve_device(device)
    stored = checkpoint.cfg.dtype or "bfloat16"
    kind = resolve_dtype(stored if dtype == "auto" else dtype, where)
    four_bit = four_bit_names(checkpoint, base == "dequant")
    trained = four_bit if trained_in_4bit is None else four_bit_names(checkpoint, trained_in_4bit)
    if other := other_4bit(adapter, kinds_of(checkpoint, trained)):
        warnings.warn(other, stacklevel=2)
    with atomic_directory(out) as temporary:
        tokenizer = load_tokenizer(tokenizer_of(Path(adapter), directory))
        merged = merged_weights(checkpoint, four_bit, lora, tensors, where)
        save_shards(temporary, merged, kind)
        tied = checkpoint.cfg.tie_word_embeddings and not lora.lora_embeddings
        cfg = dataclasses.replace(checkpoint.cfg, tie_word_embeddings=tied)
        files = serving_files("FROM .", tokenizer, cfg)
        write_model_files(temporary, directory, cfg, kind, files)
        ours = logits_of(open_checkpoint(temporary, load_model_config(temporary)), kind, where)
        live = logits_of(checkpoint, kind, where, lora, tensors, four_bit)
        relative, largest = difference(ours, live), (ours - live).abs().max().item()
        if not relative <= TOLERANCE[kind]:
            raise UserError(
                f"{out}: the merged model's logits differ from the live model's by {relative:.2e} "
                f"of their size (expected at most {TOLERANCE[kind]:g}); nothing was written"
            )
        away = None
        if trained != four_bit:
            away = difference(ours, logits_of(checkpoint, kind, where, lora, tensors, trained))
    return Merged(base, directory, relative, largest, away)


def merged_weights(
    checkpoint: Checkpoint,
    four_bit: set[str],
    lora: LoraConfig,
    tensors: dict[str, Tensor],
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """(key, float32 weight) of the merged model, one at a time. four_bit: decoded from 4 bits."""
    for name, weight in stream_weights(checkpoint):
        if name in tensors:  # a trained copy
            yield name, tensors[name]
            continue
        if name == EMBEDDING and TOKEN_ROWS in tensors:
            assert isinstance(weight, Tensor)
            yield name, weight.float().index_copy(0, token_ids(lora, CPU), tensors[TOKEN_ROWS])
            continue
        if name == EMBEDDING and EMBEDDING_A in tensors:
            assert isinstance(weight, Tensor)
            update = (tensors[EMBEDDING_B] @ tensors[EMBEDDING_A]).T
            yield name, weight.float() + lora.scaling_of("model.embed_tokens") * update
            if checkpoint.cfg.tie_word_embeddings:  # the head is not adapted: no longer tied
                yield "lm_head.weight", weight.float()
            continue
        if name in four_bit:
            weight = to_device(name, weight, device, torch.float32, True)
        weight = dequantized(weight)
        path = name.removesuffix(".weight")
        if f"{path}.lora_A.weight" not in tensors:
            yield name, weight
            continue
        A, B = (tensors[f"{path}.lora_{x}.weight"].to(device) for x in "AB")
        merged = weight.to(device, torch.float32) + lora.scaling_of(path) * (B @ A)
        if lora.use_dora:
            magnitude = tensors[f"{path}.lora_magnitude_vector"].to(device)
            merged *= (magnitude / merged.norm(dim=1)).unsqueeze(1)
        yield name, merged


def logits_of(
    source: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    lora: LoraConfig | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    four_bit: Set[str] = frozenset(),
) -> Tensor:
    """float64 [48, V]: a checkpoint's logits on 48 tokens, computed in `dtype`.

    With lora and its tensors: under the adapter. four_bit: names of the weights kept in 4 bits.
    """
    cfg, trained = source.cfg, tensors or {}
    ids = [(7919 * i + 1) % cfg.vocab_size for i in range(48)]
    frozen = {
        name: to_device(name, weight, device, dtype, name in four_bit)
        for name, weight in stream_weights(source)
        if name not in trained
    }
    compute = Compute(cfg, dtype)
    if lora is not None:
        ratios = scaling_ratios(lora, cfg)
        compute = Compute(cfg, dtype, lora_scaling=lora.scaling, lora_ratios=ratios)
        if TOKEN_ROWS in trained:
            frozen[TOKEN_IDS] = token_ids(lora, device)
    trained = {name: tensor.to(device) for name, tensor in trained.items()}
    with torch.no_grad():
        tokens = make_tokens([ids[:16], ids[16:]], device)
        return logits(trained, frozen, tokens, compute).double().cpu()


def difference(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|."""
    return ((ours - theirs).norm() / theirs.norm()).item()
