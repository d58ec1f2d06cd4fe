"""Merge an adapter into its base model and write an ordinary checkpoint, which is verified.

The merged weight is W + scaling * B A, computed in float32 and rounded once; with DoRA, its rows
are rescaled to the trained magnitudes. W is the stored base weight (`16bit`) or the weight decoded
from 4 bits (`dequant`), which reproduces the model of an adapter trained on a 4-bit base.
"""

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minisft.config.errors import UserError
from minisft.config.targets import EMBEDDING_A, EMBEDDING_B, TOKEN_ROWS
from minisft.files import weights
from minisft.files.adapter import base_in_4bit, load_adapter, other_4bit
from minisft.files.adapter_config import read_adapter_config
from minisft.files.device import resolve_device, resolve_dtype
from minisft.files.disk import atomic_directory, refuse_existing
from minisft.files.export import save_shards, write_model_files
from minisft.llama import EMBEDDING, logits, make_tokens
from minisft.session.generate import Adapter, InferenceModel, load_for_inference
from minisft.session.serving import serving_files
from minisft.text.tokenizer import load_tokenizer, tokenizer_of

CPU = torch.device("cpu")
BASES = ("auto", "16bit", "dequant")
# Largest accepted |merged - live| / |live| of the logits, for each dtype of the merged files.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


class Merged(NamedTuple):
    """Result of `merge`: the base, and how far the merged model's logits are from the unmerged."""

    base: str  # 16bit or dequant
    model: Path
    relative_difference: float
    largest_difference: float
    from_trained: float | None = None  # relative, if the adapter was trained on the other base

    def __str__(self) -> str:
        how = {"16bit": "as it is stored", "dequant": "decoded from 4 bits"}
        line = (
            f"merged onto {self.model}, {how[self.base]}; logits differ from those of the adapter "
            f"on that base by {self.relative_difference:.1e} (relative), "
            f"{self.largest_difference:.1e} (largest)"
        )
        if self.from_trained is None:
            return line
        trained = "as it is stored" if self.base == "dequant" else "in 4 bits"
        return (
            f"{line}; the adapter was trained on the base {trained}, and logits differ from those "
            f"of that model by {self.from_trained:.1e} (relative)"
        )


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
    """Merge an adapter directory into its base and write output_dir, a transformers directory.

    model, revision: the base; default: the one named by the adapter. base: one of BASES; `auto`: as
    in training. dtype: of the files; `auto`: as in the base's config.json, else bfloat16. Raises
    UserError, and writes nothing, for invalid input or if the merged model's logits differ.
    """
    out = Path(output_dir)
    if base not in BASES:
        raise UserError(f"--base is {base!r}; expected one of {', '.join(BASES)}")
    # Check now: `atomic_directory` does it only after the base has been resolved and read.
    refuse_existing(out)
    directory = _base_directory(adapter, model, revision)
    checkpoint = weights.open_checkpoint(directory, weights.load_model_config(directory))
    loaded = load_adapter(adapter, checkpoint.cfg)
    in_4bit = bool(checkpoint.four_bit) or base_in_4bit(adapter)  # in training; None: unknown
    if base == "auto":
        base = "dequant" if in_4bit else "16bit"
    if base == "16bit" and checkpoint.four_bit:
        raise UserError(
            f"--base 16bit, but {directory} is stored in 4 bits; give --model the 16-bit base, or "
            "use --base dequant"
        )
    place = resolve_device(device)
    kind = resolve_dtype((checkpoint.cfg.dtype or "bfloat16") if dtype == "auto" else dtype, place)
    four_bit = weights.four_bit_names(checkpoint, base == "dequant")
    trained = four_bit if in_4bit is None else weights.four_bit_names(checkpoint, in_4bit)
    if other := other_4bit(adapter, weights.kinds_of(checkpoint, trained)):
        warnings.warn(other, stacklevel=2)
    with atomic_directory(out) as temporary:
        tokenizer = load_tokenizer(tokenizer_of(Path(adapter), directory))
        save_shards(temporary, merged_weights(checkpoint, four_bit, loaded, place), kind)
        # An adapted embedding differs from the head, so the merged model cannot tie them.
        tied = checkpoint.cfg.tie_word_embeddings and not loaded[0].lora_embeddings
        cfg = dataclasses.replace(checkpoint.cfg, tie_word_embeddings=tied)
        write_model_files(temporary, directory, cfg, kind, serving_files("FROM .", tokenizer, cfg))
        written = weights.open_checkpoint(temporary, weights.load_model_config(temporary))
        ours = logits_of(load_for_inference(written, kind, place))
        live = logits_of(load_for_inference(checkpoint, kind, place, four_bit, loaded))
        relative, largest = difference(ours, live), (ours - live).abs().max().item()
        # Write `not <=` instead of `>`: it also rejects a difference that is NaN.
        if not relative <= TOLERANCE[kind]:
            raise UserError(
                f"{out}: the merged model's logits differ from the live model's by {relative:.2e} "
                f"(relative; expected at most {TOLERANCE[kind]:g}); nothing was written"
            )
        away = None
        if trained != four_bit:
            live = logits_of(load_for_inference(checkpoint, kind, place, trained, loaded))
            away = difference(ours, live)
    return Merged(base, directory, relative, largest, away)


def _base_directory(adapter: str | Path, model: str, revision: str | None) -> Path:
    """Returns the directory of the base model: `model`, or else the base that the adapter names."""
    raw = read_adapter_config(adapter)
    name = model or str(raw.get("base_model_name_or_path") or "")
    if not name:
        raise UserError(f"{adapter}: adapter_config.json names no base model; give --model")
    # Ignore the adapter's revision if `model` is given: it belongs to the adapter's own base.
    return weights.resolve_model(name, revision or (None if model else raw.get("revision")))


def merged_weights(
    checkpoint: weights.Checkpoint, four_bit: set[str], adapter: Adapter, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield (key, weight) of the merged model one at a time; adapted weights are float32.

    four_bit: names of the weights to quantise to 4 bits and decode before the update is added.
    """
    lora, tensors = adapter
    for name, weight in weights.stream_weights(checkpoint):
        if name in tensors:  # a trained copy
            yield name, tensors[name]
            continue
        if name in four_bit:
            weight = weights.to_device(name, weight, device, torch.float32, True)
        path, merged = name.removesuffix(".weight"), weights.dequantized(weight)
        if name == EMBEDDING and TOKEN_ROWS in tensors:
            ids = torch.tensor(lora.trainable_token_indices)
            merged = merged.float().index_copy(0, ids, tensors[TOKEN_ROWS])
        elif name == EMBEDDING and EMBEDDING_A in tensors:
            base, update = merged.float(), (tensors[EMBEDDING_B] @ tensors[EMBEDDING_A]).T
            merged = base + lora.scaling_of(path) * update
            if checkpoint.cfg.tie_word_embeddings:  # the head is not adapted: no longer tied
                yield name, merged
                name, merged = "lm_head.weight", base
        elif f"{path}.lora_A.weight" in tensors:
            A, B = (tensors[f"{path}.lora_{x}.weight"].to(device) for x in "AB")
            merged = merged.to(device, torch.float32) + lora.scaling_of(path) * (B @ A)
            if lora.use_dora:
                magnitude = tensors[f"{path}.lora_magnitude_vector"].to(device)
                merged *= (magnitude / merged.norm(dim=1)).unsqueeze(1)
        yield name, merged


@torch.no_grad()
def logits_of(model: InferenceModel) -> Tensor:
    """Returns a model's logits on 48 fixed tokens, [48, V] float64, computed in its dtype."""
    ids = [(7919 * i + 1) % model.compute.model.vocab_size for i in range(48)]
    # Use two documents of different lengths, to verify packing too.
    tokens = make_tokens([ids[:16], ids[16:]], model.device)
    return logits(model.trainable, model.frozen, tokens, model.compute).double().cpu()


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Returns the relative difference |ours - theirs| / |theirs| (Euclidean norms)."""
    return ((ours - theirs).norm() / theirs.norm()).item()
