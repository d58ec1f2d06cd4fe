"""Greedy or sampled text generation with a key/value cache.

All prompts run as one packed batch without padding, as in training. The first pass processes the
prompts; each later pass processes one new token of every prompt that has not ended.
"""

from collections.abc import Set
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft import llama
from minisft.config.errors import UserError
from minisft.config.lora import LoraConfig
from minisft.config.model import ModelConfig
from minisft.config.targets import TOKEN_ROWS, scaling_ratios
from minisft.files.weights import Checkpoint, stream_weights, to_device
from minisft.nn import Documents, LoraContext, packed_attention, rms_norm
from minisft.rope import rope_table
from minisft.text.chat import render
from minisft.text.encoding import encode
from minisft.text.tokenizer import Tokenizer

Adapter = tuple[LoraConfig, dict[str, Tensor]]  # the result of `load_adapter`


class InferenceModel(NamedTuple):
    """The weights of a model, all on `device`, and the settings of its forward pass."""

    trainable: llama.Weights  # the adapter's tensors, or all weights after full fine-tuning
    frozen: llama.Weights
    compute: llama.Compute
    device: torch.device


class Sampling(NamedTuple):
    """Sampling settings. temperature 0: greedy decoding; top_p below 1: nucleus sampling."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


def load_for_inference(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    four_bit: Set[str] = frozenset(),
    adapter: Adapter | None = None,
) -> InferenceModel:
    """Load a model to `device`, tensor by tensor. four_bit: names of the weights held in 4 bits."""
    lora, tensors = adapter or (None, {})
    frozen = {
        name: to_device(name, weight, device, dtype, name in four_bit)
        for name, weight in stream_weights(checkpoint)
        if name not in tensors
    }
    cfg = checkpoint.cfg
    compute = llama.Compute(cfg, dtype)
    if lora is not None:
        compute = llama.Compute(cfg, dtype, lora.scaling, lora_ratios=scaling_ratios(lora, cfg))
        if TOKEN_ROWS in tensors:
            ids = torch.tensor(lora.trainable_token_indices, device=device)
            frozen[llama.TOKEN_IDS] = ids
    trainable = {name: tensor.to(device) for name, tensor in tensors.items()}
    return InferenceModel(trainable, frozen, compute, device)


@torch.no_grad()
def generate(
    model: InferenceModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop_ids: set[int],
    sampling: Sampling = GREEDY,
) -> list[list[int]]:
    """Continue each prompt (a non-empty list of ids) until a stop id or max_new_tokens.

    Returns the new ids of each prompt, in order, including the stop id if one was reached.
    Raises UserError if the logits are not finite.
    """
    cfg, compute = model.compute.model, model.compute

    def empty(capacity: int) -> Tensor:
        shape = (2, capacity, cfg.num_key_value_heads, cfg.head_dim)
        return torch.empty(shape, dtype=compute.dtype, device=model.device)

    # cache[layer][i] holds the keys and values of document i, [2, capacity, K, H].
    capacity = [len(prompt) + max_new_tokens for prompt in prompts]
    cache = [[empty(tokens) for tokens in capacity] for _ in range(cfg.num_hidden_layers)]
    generator = torch.Generator(model.device).manual_seed(sampling.seed)
    new: list[list[int]] = [[] for _ in prompts]
    active, inputs, starts = list(range(len(prompts))), prompts, [0] * len(prompts)
    for _ in range(max_new_tokens):
        logits = _extend_([[layer[i] for i in active] for layer in cache], starts, inputs, model)
        if not logits.isfinite().all():
            raise UserError(
                "the model's logits are not finite, so no next token can be chosen: the weights of "
                "the model or the adapter are damaged, or overflow in this --dtype"
            )
        chosen = _choose(logits, sampling, generator)
        for i, token in zip(active, chosen, strict=True):
            new[i].append(token)
        active = [i for i in active if new[i][-1] not in stop_ids]
        if not active:
            break
        inputs = [[new[i][-1]] for i in active]
        starts = [len(prompts[i]) + len(new[i]) - 1 for i in active]
    return new


def _extend_(
    cache: list[list[Tensor]], starts: list[int], inputs: list[list[int]], model: InferenceModel
) -> Tensor:
    """Run the next tokens of each document through the model; store their keys and values in place.

    cache[layer][j]: keys and values of document j, [2, capacity, K, H], of which starts[j] tokens
    are filled. inputs[j]: the next ids of document j: first its prompt, later one token. Returns
    the logits after each document's last token, [documents, V] float32.
    """
    trainable, frozen, compute, device = model
    cfg, tokens = compute.model, llama.make_tokens(inputs, device)
    lengths = tokens.documents.lengths
    contexts = tuple(start + length for start, length in zip(starts, lengths, strict=True))
    starts_B, lengths_B = torch.tensor([starts, lengths], device=device)
    positions_T = tokens.position_ids_T + starts_B.repeat_interleave(lengths_B)
    # Dynamic RoPE depends on the context length, cached tokens included, so pass `contexts` too.
    rope = rope_table(
        positions_T, lengths, cfg.rope, head_dim=cfg.head_dim, dtype=compute.dtype,
        max_positions=cfg.max_position_embeddings, contexts=contexts,
    )  # fmt: skip
    x_TD = llama.embed(trainable, frozen, tokens.input_ids_T, compute)
    adapter, ratios = LoraContext(compute.lora_scaling, 0.0, None), dict(compute.lora_ratios)
    for i, stored in enumerate(cache):
        attend = partial(_cached_attention, stored, starts, tokens.documents)
        layer = llama.layer_view(trainable, frozen, i, ratios)
        x_TD = llama.block(x_TD, layer, rope, attend, adapter, cfg)
    # Apply the head, the largest matmul, to the last token of each document only.
    last = tokens.documents.cu_seqlens[1:].long() - 1
    norm_D = llama.leaf(trainable, frozen, "model.norm.weight")
    h_BD = rms_norm(x_TD[last], norm_D, cfg.rms_norm_eps)
    return F.linear(h_BD, llama.head_weight(trainable, frozen, cfg, compute.dtype)).float()


def _cached_attention(
    cache: list[Tensor], starts: list[int], documents: Documents, *qkv: Tensor
) -> Tensor:
    """Store the new keys and values in a layer's cache, then attend to all cached tokens."""
    (q_TNH, k_TKH, v_TKH), lengths = qkv, documents.lengths
    new = zip(k_TKH.split(lengths), v_TKH.split(lengths), strict=True)
    for stored, start, (k, v) in zip(cache, starts, new, strict=True):
        stored[0, start : start + len(k)], stored[1, start : start + len(v)] = k, v
    if not any(starts):  # the prompts themselves: ordinary causal attention
        return packed_attention(q_TNH, k_TKH, v_TKH, documents)
    out = []
    # After the first pass a document has one query, which attends to every cached key: no mask.
    for stored, start, q in zip(cache, starts, q_TNH.split(lengths), strict=True):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, *stored[:, : start + 1]))
        out.append(F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]))
    return torch.cat(out).squeeze(2)


def _choose(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> list[int]:
    """Choose the next token of each document, greedily or by sampling; returns their ids."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).tolist()
    p_BV = (logits_BV / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        sorted_BV, order = p_BV.sort(-1, descending=True)
        # Subtract the token's own probability, so that the most probable token is never removed.
        beyond = sorted_BV.cumsum(-1) - sorted_BV >= sampling.top_p
        p_BV = torch.zeros_like(p_BV).scatter(1, order, sorted_BV.masked_fill(beyond, 0))
    return torch.multinomial(p_BV, 1, generator=generator).squeeze(1).tolist()


def stop_ids(tokenizer: Tokenizer, cfg: ModelConfig) -> set[int]:
    """Returns the ids that end a turn: the EOS tokens of config.json and of the tokenizer, and the
    special token, if any, that the chat template writes after an assistant message."""
    ends = (*cfg.eos_token_ids, tokenizer.eos_token_id)
    stops = {end for end in ends if end is not None}
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    # A template that rejects these two roles raises UserError: then use the EOS tokens only.
    with suppress(UserError):
        text = render(tokenizer.chat_template or "", turn, special_tokens=tokenizer.special_tokens)
        after = encode(tokenizer, text[text.rfind("b") + 1 :].strip(), add_special_tokens=False)
        special = {t for t, a in tokenizer.backend.get_added_tokens_decoder().items() if a.special}
        stops |= set(after[:1]) & special
    return stops
