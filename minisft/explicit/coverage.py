"""Check whether the explicit pass supports a run."""

import re

import torch

from minisft.llama import Compute, Weights
from minisft.lora import Flat

_PLAIN_LORA = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.lora_[AB]\.weight")


def unsupported_reason(
    trainable: Flat, frozen: Weights, compute: Compute, device: torch.device | None = None
) -> str:
    """Return why the explicit pass does not support this run; "" if it does.

    device: where the run computes; default: the device of trainable (meta in a dry run).
    """
    on_gpu = (device or trainable.buffer.device).type == "cuda"
    if compute.lora_dropout:
        return "LoRA dropout"
    if compute.loss_type != "nll" or compute.label_smoothing:
        return "a loss other than plain nll"
    if compute.neftune_alpha:
        return "NEFTune noise"
    if any(name.endswith("magnitude_vector") for name in trainable.views):
        return "DoRA"
    if any(".lora_embedding_" in name for name in trainable.views):
        return "an adapter on the embedding"
    # All adapters share one scale (`LayerContext.scaling`), and kernels need adapters of one rank.
    ranks = {v.shape[0] for n, v in trainable.views.items() if n.endswith(".lora_A.weight")}
    if compute.lora_ratios or len(ranks) > 1:
        return "ranks or scales of single modules"
    # The RoPE kernel loads half a head as one Triton block, whose size must be a power of two.
    head_dim = compute.model.head_dim
    if on_gpu and (head_dim < 32 or head_dim & (head_dim - 1)):
        return f"head_dim {head_dim} (expected a power of two, at least 32)"
    # cuDNN and flash attention support half precision only.
    if on_gpu and compute.dtype == torch.float32:
        return "float32"
    if not all(_PLAIN_LORA.fullmatch(name) for name in trainable.views):
        return "trained tensors other than plain LoRA on the linears"
    if any(name.endswith("_proj.bias") for name in frozen):
        return "biases"
    # Dynamic RoPE depends on document lengths, but a captured graph must not depend on them.
    if compute.model.rope.rope_type == "dynamic":
        return "RoPE that depends on the document's length"
    return ""
