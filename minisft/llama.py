"""The Llama forward pass: pure functions over two dicts of tensors keyed by Hugging Face names.

frozen     weights that never change, "model.layers.0.self_attn.q_proj.weight" -> Tensor, or
           NF4Weight: a linear in 4 bits
trainable  what the optimizer moves: "….q_proj.lora_A.weight", "….lora_B.weight" [fp32 masters],
           trained copies, or (full fine-tuning) every weight under its own name

A trained tensor stands in for the frozen one of the same name, so full fine-tuning, trained
embeddings and adapters are one code path.

T tokens (documents side by side)  D hidden  N query heads  K key/value heads  H head_dim
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minisft.config.model import ModelConfig
from minisft.config.targets import EMBEDDING_A, EMBEDDING_B, TOKEN_ROWS
from minisft.kernels.nf4 import NF4Weight
from minisft.nn import (
    Documents,
    Linear,
    Lora,
    LoraContext,
    apply_rope,
    documents_of,
    linear,
    mix64,
    packed_attention,
    rms_norm,
    swiglu,
)
from minisft.rope import rope_table

EMBEDDING = "model.embed_tokens.weight"
TOKEN_IDS = "model.embed_tokens.token_adapter.token_ids"  # int64, kept beside the frozen weights
Weights = Mapping[str, Tensor | NF4Weight]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [T,N,H], k [T,K,H], v [T,K,H] -> [T,N,H]


@dataclass(frozen=True)
class Compute:
    """How the forward pass is computed, apart from the weights: fixed for a run."""

    model: ModelConfig
    dtype: torch.dtype = torch.float32
    lora_scaling: float = 1.0
    lora_dropout: float = 0.0  # 0 outside training
    checkpoint_blocks: bool = False
    loss_type: str = "nll"
    label_smoothing: float = 0.0
    neftune_alpha: float = 0.0  # noise on the embeddings, where tokens carry dropout keys
    lora_ratios: tuple[tuple[str, float], ...] = ()  # of modules with a scale of their own


class Layer(NamedTuple):
    """The weights of one decoder block. A view: nothing is copied."""

    input_layernorm: Tensor
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    post_attention_layernorm: Tensor
    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear


class Tokens(NamedTuple):
    """A micro-batch as the model sees it: documents side by side, no padding."""

    input_ids_T: Tensor  # int64
    position_ids_T: Tensor  # int64, from 0 in every document
    documents: Documents
    dropout_keys_T: Tensor | None = None  # int64, with LoRA dropout only


def leaf(trainable: Weights, frozen: Weights, name: str) -> Tensor:
    """The trained tensor of that name if there is one, else the frozen one (else KeyError).

    For what is never in 4 bits: embedding, head, norms, biases, adapters.
    """
    tensor = trainable[name] if name in trainable else frozen[name]
    assert isinstance(tensor, Tensor), f"{name} is in 4 bits"
    return tensor


def linear_view(
    trainable: Weights, frozen: Weights, path: str, ratios: Mapping[str, float]
) -> Linear:
    """Weight, bias and adapter of the linear at a path such as model.layers.0.mlp.up_proj.

    ratios: path -> scale of its adapter over that of the others, where it is not 1.
    """
    weight_name, bias_name, A_name = f"{path}.weight", f"{path}.bias", f"{path}.lora_A.weight"
    has_bias = bias_name in frozen or bias_name in trainable
    lora = None
    if A_name in trainable:
        A, B = (leaf(trainable, {}, f"{path}.lora_{x}.weight") for x in "AB")
        B = B * ratios[path] if path in ratios else B
        name = f"{path}.lora_magnitude_vector"
        magnitude = leaf(trainable, {}, name) if name in trainable else None
        lora = Lora(A, B, module_key(path), magnitude)
    return Linear(
        weight=trainable[weight_name] if weight_name in trainable else frozen[weight_name],
        bias=leaf(trainable, frozen, bias_name) if has_bias else None,
        lora=lora,
    )


def module_key(path: str) -> int:
    """A 62-bit number that names the module in dropout draws, the same in every process."""
    return int.from_bytes(blake2b(path.encode(), digest_size=8).digest(), "big") >> 2


def layer_view(trainable: Weights, frozen: Weights, i: int, ratios: Mapping[str, float]) -> Layer:
    """The leaves of decoder layer i; ratios as in `linear_view`."""
    prefix = f"model.layers.{i}."

    def norm(name: str) -> Tensor:
        return leaf(trainable, frozen, f"{prefix}{name}.weight")

    def projection(name: str) -> Linear:
        return linear_view(trainable, frozen, prefix + name, ratios)

    return Layer(
        input_layernorm=norm("input_layernorm"),
        q_proj=projection("self_attn.q_proj"),
        k_proj=projection("self_attn.k_proj"),
        v_proj=projection("self_attn.v_proj"),
        o_proj=projection("self_attn.o_proj"),
        post_attention_layernorm=norm("post_attention_layernorm"),
        gate_proj=projection("mlp.gate_proj"),
        up_proj=projection("mlp.up_proj"),
        down_proj=projection("mlp.down_proj"),
    )


def block(
    x_TD: Tensor,
    layer: Layer,
    rope: tuple[Tensor, Tensor],
    attend: Attend,
    adapter: LoraContext,
    cfg: ModelConfig,
) -> Tensor:
    """One decoder block: x + attention(norm(x)), then x + mlp(norm(x)). [T, D] -> [T, D]."""
    h_TD = rms_norm(x_TD, layer.input_layernorm, cfg.rms_norm_eps)
    q_TNH, k_TKH, v_TKH = (
        linear(h_TD, projection, adapter).unflatten(-1, (-1, cfg.head_dim))
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    q_TNH, k_TKH = apply_rope(q_TNH, *rope), apply_rope(k_TKH, *rope)
    o_TNH = attend(q_TNH, k_TKH, v_TKH)
    x_TD = x_TD + linear(o_TNH.flatten(-2), layer.o_proj, adapter)
    h_TD = rms_norm(x_TD, layer.post_attention_layernorm, cfg.rms_norm_eps)
    gate_TF, up_TF = linear(h_TD, layer.gate_proj, adapter), linear(h_TD, layer.up_proj, adapter)
    return x_TD + linear(swiglu(gate_TF, up_TF), layer.down_proj, adapter)


def hidden_states(trainable: Weights, frozen: Weights, tokens: Tokens, compute: Compute) -> Tensor:
    """Final hidden states (after the last norm) of every token, [T, D] in compute.dtype."""
    cfg = compute.model
    documents = tokens.documents
    adapter = LoraContext(compute.lora_scaling, compute.lora_dropout, tokens.dropout_keys_T)
    rope = rope_table(
        tokens.position_ids_T,
        documents.lengths,
        cfg.rope,
        head_dim=cfg.head_dim,
        max_positions=cfg.max_position_embeddings,
        dtype=compute.dtype,
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, documents)

    ratios = dict(compute.lora_ratios)
    x_TD = embed(trainable, frozen, tokens.input_ids_T, compute)
    if compute.neftune_alpha and tokens.dropout_keys_T is not None:
        x_TD = x_TD + embedding_noise(tokens, x_TD, compute.neftune_alpha)
    for i in range(cfg.num_hidden_layers):
        layer = layer_view(trainable, frozen, i, ratios)
        if compute.checkpoint_blocks and torch.is_grad_enabled():
            x_TD = checkpoint(  # pyright: ignore[reportAssignmentType]
                block, x_TD, layer, rope, attend, adapter, cfg,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
        else:
            x_TD = block(x_TD, layer, rope, attend, adapter, cfg)
    return rms_norm(x_TD, leaf(trainable, frozen, "model.norm.weight"), cfg.rms_norm_eps)


def embed(trainable: Weights, frozen: Weights, input_ids_T: Tensor, compute: Compute) -> Tensor:
    """Rows of the embedding matrix, [T, D] in compute.dtype, plus scaling * A^T[id] B^T where it is
    adapted; trained token rows stand in for theirs."""
    dtype = compute.dtype
    x_TD = F.embedding(input_ids_T, leaf(trainable, frozen, EMBEDDING)).to(dtype)
    if EMBEDDING_A in trainable:
        A_TR = F.embedding(input_ids_T, leaf(trainable, {}, EMBEDDING_A).T).to(dtype)
        ratio = dict(compute.lora_ratios).get("model.embed_tokens", 1.0)
        update_TD = A_TR @ leaf(trainable, {}, EMBEDDING_B).to(dtype).T
        return x_TD + update_TD * (compute.lora_scaling * ratio)
    if TOKEN_ROWS not in trainable:
        return x_TD
    is_row_TN = input_ids_T.unsqueeze(1) == leaf({}, frozen, TOKEN_IDS)
    rows_TD = leaf(trainable, {}, TOKEN_ROWS).to(dtype)[is_row_TN.int().argmax(1)]
    return torch.where(is_row_TN.any(1, keepdim=True), rows_TD, x_TD)


def embedding_noise(tokens: Tokens, x_TD: Tensor, alpha: float) -> Tensor:
    """NEFTune's noise, uniform in ±alpha / sqrt(tokens of the document * D), like x.

    A function of the tokens' dropout keys alone, as dropout is.
    """
    assert tokens.dropout_keys_T is not None
    keys_T1 = (tokens.dropout_keys_T + module_key("neftune")).unsqueeze(1)
    columns_D = torch.arange(x_TD.shape[1], device=x_TD.device) * 0x1E3779B97F4A7C15
    uniform_TD = ((mix64(keys_T1 + columns_D) >> 40) & 0xFFFFFF).float() / 2**24
    lengths = torch.tensor(tokens.documents.lengths, device=x_TD.device)
    per_token = lengths.repeat_interleave(lengths, output_size=x_TD.shape[0])
    bound_T1 = alpha / (per_token * x_TD.shape[1]).float().sqrt().unsqueeze(1)
    return ((2 * uniform_TD - 1) * bound_T1).to(x_TD.dtype)


def head_weight(
    trainable: Weights, frozen: Weights, cfg: ModelConfig, dtype: torch.dtype
) -> Tensor:
    """The output projection [V, D] in dtype: lm_head, or the embedding where they are tied."""
    if not cfg.tie_word_embeddings:
        return leaf(trainable, frozen, "lm_head.weight").to(dtype)
    head_VD = leaf(trainable, frozen, EMBEDDING).to(dtype)
    if TOKEN_ROWS not in trainable:
        return head_VD
    rows = leaf(trainable, {}, TOKEN_ROWS).to(dtype)
    return head_VD.index_copy(0, leaf({}, frozen, TOKEN_IDS), rows)


def logits(trainable: Weights, frozen: Weights, tokens: Tokens, compute: Compute) -> Tensor:
    """Next-token logits of every token, [T, V] in compute.dtype. Training never calls this."""
    h_TD = hidden_states(trainable, frozen, tokens, compute)
    return F.linear(h_TD, head_weight(trainable, frozen, compute.model, compute.dtype))


def make_tokens(documents: list[list[int]], device: torch.device | str = "cpu") -> Tokens:
    """Lay documents (lists of token ids) side by side, for evaluation, generation and tests."""
    lengths = tuple(len(d) for d in documents)
    return Tokens(
        torch.tensor([t for d in documents for t in d], dtype=torch.int64, device=device),
        torch.cat([torch.arange(n) for n in lengths]).to(device),
        documents_of(lengths, device),
    )
