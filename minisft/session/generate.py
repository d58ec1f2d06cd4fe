"""Greedy or sampled continuation of prompts, with a key/value cache.

Prompts go through the model side by side, one token each per round, as documents do in training.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.config.errors import UserError
from minisft.config.model import ModelConfig
from minisft.llama import (
    Attend,
    Compute,
    Weights,
    block,
    embed,
    head_weight,
    layer_view,
    leaf,
    make_tokens,
)
from minisft.nn import Documents, LoraContext, packed_attention, rms_norm
from minisft.rope import rope_table
from minisft.text.chat import render
from minisft.text.encoding import encode
from minisft.text.tokenizer import Tokenizer


class Sampling(NamedTuple):
    """How the next token is chosen: temperature 0 is greedy; top_p keeps the likeliest share."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


Cache = list[list[tuple[Tensor, Tensor]]]  # [layer][document] -> keys, values [capacity, K, H]


@torch.no_grad()
def generate(
    trainable: Weights,
    frozen: Weights,
    prompts: list[list[int]],
    compute: Compute,
    *,
    max_new_tokens: int,
    stop_ids: set[int],
    sampling: Sampling,
    device: torch.device,
) -> list[list[int]]:
    """Continue each prompt (a non-empty list of ids) until a stop id or max_new_tokens.

    Returns the new ids of each prompt, in order, the stop id included where one was reached.
    """
    compute = dataclasses.replace(compute, lora_dropout=0.0, checkpoint_blocks=False)
    cfg = compute.model
    capacity = [len(p) + max_new_tokens for p in prompts]
    shape = (cfg.num_key_value_heads, cfg.head_dim)
    cache: Cache = [
        [
            tuple(torch.empty(n, *shape, dtype=compute.dtype, device=device) for _ in "kv")
            for n in capacity
        ]  # pyright: ignore
        for _ in range(cfg.num_hidden_layers)
    ]
    generator = torch.Generator(device).manual_seed(sampling.seed)
    written = [0] * len(prompts)
    new: list[list[int]] = [[] for _ in prompts]
    active, inputs = list(range(len(prompts))), prompts
    for _ in range(max_new_tokens):
        logits = _extend(trainable, frozen, inputs, active, cache, written, compute, device)
        if not logits.isfinite().all():
            raise UserError(
                "the model's logits are not finite, so there is no next token: its weights or the "
                "adapter's are damaged, or --dtype is too narrow for them"
            )
        chosen = _choose(logits, sampling, generator)
        for i, token in zip(active, chosen, strict=True):
            new[i].append(token)
        active = [i for i in active if new[i][-1] not in stop_ids]
        if not active:
            break
        inputs = [[new[i][-1]] for i in active]
    return new


def _extend(
    trainable: Weights,
    frozen: Weights,
    inputs: list[list[int]],
    active: list[int],
    cache: Cache,
    written: list[int],
    compute: Compute,
    device: torch.device,
) -> Tensor:
    """Run new tokens of the active documents through the model, extending the cache in place.

    inputs[j] are the new ids of document active[j]: a whole prompt at first, then one token.
    Returns the logits after each document's last token, [documents, V] float32.
    """
    cfg = compute.model
    tokens = make_tokens(inputs, device)
    starts = [written[i] for i in active]
    contexts = tuple(start + len(ids) for start, ids in zip(starts, inputs, strict=True))
    offsets = torch.tensor(starts, device=device).repeat_interleave(
        torch.tensor([len(ids) for ids in inputs], device=device)
    )
    rope = rope_table(
        tokens.position_ids_T + offsets,
        tokens.documents.lengths,
        cfg.rope,
        head_dim=cfg.head_dim,
        max_positions=cfg.max_position_embeddings,
        dtype=compute.dtype,
        contexts=contexts,
    )
    x_TD = embed(trainable, frozen, tokens.input_ids_T, compute)
    adapter, ratios = LoraContext(compute.lora_scaling, 0.0, None), dict(compute.lora_ratios)
    for i in range(cfg.num_hidden_layers):
        layer_cache = [cache[i][document] for document in active]
        attend = _cached_attention(layer_cache, starts, tokens.documents)
        x_TD = block(x_TD, layer_view(trainable, frozen, i, ratios), rope, attend, adapter, cfg)
    for i, context in zip(active, contexts, strict=True):
        written[i] = context
    last = tokens.documents.cu_seqlens[1:].long() - 1
    h_BD = rms_norm(x_TD[last], leaf(trainable, frozen, "model.norm.weight"), cfg.rms_norm_eps)
    return F.linear(h_BD, head_weight(trainable, frozen, cfg, compute.dtype)).float()


def _cached_attention(
    cache: list[tuple[Tensor, Tensor]], starts: list[int], documents: Documents
) -> Attend:
    def attend(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        lengths = documents.lengths
        for (keys, values), start, k, v in zip(
            cache, starts, k_TKH.split(lengths), v_TKH.split(lengths), strict=True
        ):
            keys[start : start + len(k)], values[start : start + len(v)] = k, v
        if not any(starts):  # the prompts themselves: ordinary causal attention
            return packed_attention(q_TNH, k_TKH, v_TKH, documents)
        out = []
        for (keys, values), start, q in zip(cache, starts, q_TNH.split(lengths), strict=True):
            q, k, v = (
                x.transpose(0, 1).unsqueeze(0) for x in (q, keys[: start + 1], values[: start + 1])
            )
            out.append(F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]))
        return torch.cat(out).squeeze(2)

    return attend


def _choose(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> list[int]:
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).tolist()
    p_BV = (logits_BV / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        sorted_BV, order = p_BV.sort(-1, descending=True)
        beyond = sorted_BV.cumsum(-1) - sorted_BV >= sampling.top_p
        p_BV = torch.zeros_like(p_BV).scatter(1, order, sorted_BV.masked_fill(beyond, 0))
    return torch.multinomial(p_BV, 1, generator=generator).squeeze(1).tolist()


def stop_ids(tokenizer: Tokenizer, cfg: ModelConfig) -> set[int]:
    """Ids that end a turn: the checkpoint's and the tokenizer's EOS, and what the chat template
    puts after an assistant's message if that is a special token."""
    stops = set(cfg.eos_token_ids)
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            text = render(tokenizer.chat_template, turn, special_tokens=tokenizer.special_tokens)
        except UserError:  # a template that wants other roles says nothing about plain turns
            return stops
        after = encode(tokenizer, text[text.rfind("b") + 1 :].strip(), add_special_tokens=False)
        special = {t for t, a in tokenizer.backend.get_added_tokens_decoder().items() if a.special}
        stops |= set(after[:1]) & special
    return stops
