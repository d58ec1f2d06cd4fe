"""With one and the same adapter, minisft and PEFT compute the same float32 logits, bit for bit."""

import pytest
import torch
from test_adapter_peft import (
    KINDS,
    TOKENS_BT,
    base_model,
    model_config,
    peft_fields,
    random_peft_model,
    random_tensors,
)

from minisft.files.adapter import load_adapter, save_adapter
from minisft.llama import Compute, logits, make_tokens

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


@torch.no_grad()
def our_logits(base, cfg, lora, tensors):
    frozen = {n: p for n, p in base.state_dict().items() if n not in tensors}
    if cfg.tie_word_embeddings:
        frozen.pop("lm_head.weight", None)
    compute = Compute(cfg, torch.float32, lora_scaling=lora.scaling)
    return logits(tensors, frozen, make_tokens(TOKENS_BT.tolist()), compute).view(2, 11, -1)


@torch.no_grad()
def their_logits(model):
    return model.eval()(TOKENS_BT, use_cache=False).logits


@every_kind
def test_ours_in_peft(kind, tmp_path):
    lora, tied = kind
    cfg = model_config(base_model(tied))
    tensors = random_tensors(lora, cfg)
    save_adapter(tmp_path, tensors, lora, cfg, "org/base")
    theirs = their_logits(peft.PeftModel.from_pretrained(base_model(tied), tmp_path))
    ours = our_logits(base_model(tied), cfg, lora, tensors)
    assert torch.equal(ours, theirs)
    assert (ours - their_logits(base_model(tied))).abs().max() > 0.1


@every_kind
def test_theirs_here(kind, tmp_path):
    _, tied = kind
    cfg = model_config(base_model(tied))
    model = random_peft_model(base_model(tied), **peft_fields(kind))
    model.save_pretrained(tmp_path)
    read, tensors = load_adapter(tmp_path, cfg)
    assert torch.equal(our_logits(base_model(tied), cfg, read, tensors), their_logits(model))
