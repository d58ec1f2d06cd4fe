"""The explicit pass: hand-written forward and backward passes for plain LoRA, in CUDA graphs."""

from minisft.explicit.buffers import ExplicitPass, prepare
from minisft.explicit.microbatch import explicit_loss_and_grads
from minisft.explicit.plan import Choice, choose

__all__ = ["Choice", "ExplicitPass", "choose", "explicit_loss_and_grads", "prepare"]
