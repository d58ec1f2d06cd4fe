"""The hand-written forward and backward pass for plain LoRA."""

from minisft.explicit.attention import flash_attention
from minisft.explicit.microbatch import ExplicitPass, explicit_loss_and_grads, prepare
from minisft.explicit.plan import Choice, choose

__all__ = [
    "Choice", "ExplicitPass", "choose", "explicit_loss_and_grads", "flash_attention", "prepare",
]  # fmt: skip
