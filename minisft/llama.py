"""The Llama forward pass: pure functions over two dicts of tensors keyed by Hugging Face names.

frozen     weights that never change: "model.layers.0.self_attn.q_proj.weight" -> Tensor, or
           NF4Weight for a linear in 4 bits
trainable  float32 tensors the optimizer updates: "….q_proj.lora_A.weight", "….lora_B.weight",
           trained copies of embedding and head, or (full fine-tuning) every weight

A tensor in `trainable` replaces the tensor of the same name in `frozen`, so that full fine-tuning,
trained embeddings and adapters share one code path.

T tokens  D hidden  F ffn  V vocab  N query heads  K key/value heads  H head_dim  R LoRA rank
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    module_key,
    packed_attention,
    random_bits,
    rms_norm,
    swiglu,
)
from minisft.rope import rope_table
from minisft.variants.neftune import embedding_noise
from minisft.variants.token_rows import replace_embeddings, replace_head_rows

EMBEDDING = "model.embed_tokens.weight"
TOKEN_IDS = "model.embed_tokens.token_adapter.token_ids"  # int64, among the frozen weights
Weights = Mapping[str, Tensor | NF4Weight]
Ratios = Mapping[str, float]  # `Compute.lora_ratios` as a dict
Rope = tuple[Tensor, Tensor]  # cos and sin of every token's angles, [T, H] each
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [T,N,H], k [T,K,H], v [T,K,H] -> [T,N,H]


@dataclass(frozen=True)
class Compute:
    """Settings of the forward pass and the loss, constant during a run."""

    model: ModelConfig
    dtype: torch.dtype = torch.float32
    lora_scaling: float = 1.0
    lora_dropout: float = 0.0  # 0 outside training
    checkpoint_blocks: bool = False  # recompute each block in the backward pass
    loss_type: str = "nll"
    label_smoothing: float = 0.0
    neftune_alpha: float = 0.0  # noise on the embeddings of tokens that have dropout keys
    # (module path, the module's LoRA scale / lora_scaling) for modules where the ratio is not 1
    lora_ratios: tuple[tuple[str, float], ...] = ()


class Layer(NamedTuple):
    """The weights of one decoder block, as references to the tensors of the model."""

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
    """A micro-batch as the model sees it: documents concatenated, no padding."""

    input_ids_T: Tensor  # int64
    position_ids_T: Tensor  # int64, from 0 in every document
    documents: Documents
    dropout_keys_T: Tensor | None = None  # int64; in training with LoRA dropout or NEFTune only


def leaf(trainable: Weights, frozen: Weights, name: str) -> Tensor:
    """Return the tensor `name` from `trainable`, else from `frozen`; must not be a 4-bit weight."""
    tensor = trainable[name] if name in trainable else frozen[name]
    assert isinstance(tensor, Tensor), f"{name} is in 4 bits"
    return tensor


def linear_view(trainable: Weights, frozen: Weights, path: str, ratios: Ratios) -> Linear:
    """Return the Linear at a path such as model.layers.0.mlp.up_proj: weight, bias and LoRA."""
    weight_name, bias_name, A_name = f"{path}.weight", f"{path}.bias", f"{path}.lora_A.weight"
    has_bias = bias_name in frozen or bias_name in trainable
    lora = None
    if A_name in trainable:
        A, B = (leaf(trainable, {}, f"{path}.lora_{x}.weight") for x in "AB")
        # Modules may differ in scale, but LoraContext has one for all: B absorbs the difference.
        B = B * ratios[path] if path in ratios else B
        name = f"{path}.lora_magnitude_vector"
        magnitude = leaf(trainable, {}, name) if name in trainable else None
        lora = Lora(A, B, module_key(path), magnitude)
    return Linear(
        weight=trainable[weight_name] if weight_name in trainable else frozen[weight_name],
        bias=leaf(trainable, frozen, bias_name) if has_bias else None,
        lora=lora,
    )


def layer_view(trainable: Weights, frozen: Weights, i: int, ratios: Ratios) -> Layer:
    """Return the weights of decoder layer i, counted from 0."""

    def norm(name: str) -> Tensor:
        return leaf(trainable, frozen, f"model.layers.{i}.{name}.weight")

    def projection(name: str) -> Linear:
        return linear_view(trainable, frozen, f"model.layers.{i}.{name}", ratios)

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
    x_TD: Tensor, layer: Layer, rope: Rope, attend: Attend, lora_ctx: LoraContext, cfg: ModelConfig
) -> Tensor:
    """One decoder block: x + attention(norm(x)), then x + mlp(norm(x)). [T, D] -> [T, D].

    attend: causal attention within documents; generation passes a function with a key/value cache.
    """
    h_TD = rms_norm(x_TD, layer.input_layernorm, cfg.rms_norm_eps)
    q_TNH, k_TKH, v_TKH = (
        linear(h_TD, projection, lora_ctx).unflatten(-1, (-1, cfg.head_dim))
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    q_TNH, k_TKH = apply_rope(q_TNH, *rope), apply_rope(k_TKH, *rope)
    o_TNH = attend(q_TNH, k_TKH, v_TKH)
    x_TD = x_TD + linear(o_TNH.flatten(-2), layer.o_proj, lora_ctx)
    h_TD = rms_norm(x_TD, layer.post_attention_layernorm, cfg.rms_norm_eps)
    gate_TF, up_TF = linear(h_TD, layer.gate_proj, lora_ctx), linear(h_TD, layer.up_proj, lora_ctx)
    return x_TD + linear(swiglu(gate_TF, up_TF), layer.down_proj, lora_ctx)


def hidden_states(trainable: Weights, frozen: Weights, tokens: Tokens, compute: Compute) -> Tensor:
    """Return the hidden states of all tokens after the final norm, [T, D] in compute.dtype."""
    cfg, documents = compute.model, tokens.documents
    lora_ctx = LoraContext(compute.lora_scaling, compute.lora_dropout, tokens.dropout_keys_T)
    rope = rope_table(
        tokens.position_ids_T, documents.lengths, cfg.rope, head_dim=cfg.head_dim,
        max_positions=cfg.max_position_embeddings, dtype=compute.dtype,
    )  # fmt: skip

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, documents)

    x_TD = embed(trainable, frozen, tokens.input_ids_T, compute)
    if compute.neftune_alpha and tokens.dropout_keys_T is not None:
        bits_TD = random_bits(tokens.dropout_keys_T, module_key("neftune"), cfg.hidden_size)
        noise_TD = embedding_noise(bits_TD, documents.lengths, compute.neftune_alpha, compute.dtype)
        x_TD = x_TD + noise_TD
    ratios = dict(compute.lora_ratios)
    for i in range(cfg.num_hidden_layers):
        layer = layer_view(trainable, frozen, i, ratios)
        if compute.checkpoint_blocks and torch.is_grad_enabled():
            # Dropout masks are hashes of the tokens' keys, so there is no random state to preserve.
            x_TD = checkpoint(  # pyright: ignore[reportAssignmentType]
                block, x_TD, layer, rope, attend, lora_ctx, cfg,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
        else:
            x_TD = block(x_TD, layer, rope, attend, lora_ctx, cfg)
    return rms_norm(x_TD, leaf(trainable, frozen, "model.norm.weight"), cfg.rms_norm_eps)


def embed(trainable: Weights, frozen: Weights, input_ids_T: Tensor, compute: Compute) -> Tensor:
    """Return token embeddings, [T, D] in compute.dtype, including LoRA or trained token rows."""
    dtype = compute.dtype
    x_TD = F.embedding(input_ids_T, leaf(trainable, frozen, EMBEDDING)).to(dtype)
    if EMBEDDING_A in trainable:
        # A lookup of A's columns equals one-hot(id) A^T without building the one-hot matrix.
        A_TR = F.embedding(input_ids_T, leaf(trainable, {}, EMBEDDING_A).T).to(dtype)
        ratio = dict(compute.lora_ratios).get("model.embed_tokens", 1.0)
        update_TD = A_TR @ leaf(trainable, {}, EMBEDDING_B).to(dtype).T
        return x_TD + update_TD * (compute.lora_scaling * ratio)
    if TOKEN_ROWS in trainable:
        ids_N, rows_ND = leaf({}, frozen, TOKEN_IDS), leaf(trainable, {}, TOKEN_ROWS)
        return replace_embeddings(x_TD, input_ids_T, ids_N, rows_ND)
    return x_TD


def head_weight(
    trainable: Weights, frozen: Weights, cfg: ModelConfig, dtype: torch.dtype
) -> Tensor:
    """Return the output projection, [V, D] in dtype: lm_head, or the embedding matrix if tied."""
    if not cfg.tie_word_embeddings:
        return leaf(trainable, frozen, "lm_head.weight").to(dtype)
    head_VD = leaf(trainable, frozen, EMBEDDING).to(dtype)
    # As in PEFT, a tied head uses trained token rows too, but not LoRA on the embedding.
    if TOKEN_ROWS in trainable:
        ids_N, rows_ND = leaf({}, frozen, TOKEN_IDS), leaf(trainable, {}, TOKEN_ROWS)
        return replace_head_rows(head_VD, ids_N, rows_ND)
    return head_VD


def logits(trainable: Weights, frozen: Weights, tokens: Tokens, compute: Compute) -> Tensor:
    """Return next-token logits of all tokens, [T, V] in compute.dtype. Not used in training."""
    h_TD = hidden_states(trainable, frozen, tokens, compute)
    return F.linear(h_TD, head_weight(trainable, frozen, compute.model, compute.dtype))


def make_tokens(documents: list[list[int]], device: torch.device | str = "cpu") -> Tokens:
    """Concatenate documents (lists of token ids) into Tokens, for generation, merging and tests."""
    lengths = tuple(len(d) for d in documents)
    return Tokens(
        torch.tensor([t for d in documents for t in d], dtype=torch.int64, device=device),
        torch.cat([torch.arange(n) for n in lengths]).to(device),
        documents_of(lengths, device),
    )
