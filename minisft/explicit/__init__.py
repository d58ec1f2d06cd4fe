"""The explicit pass: a hand-written forward and backward pass for plain LoRA, in CUDA graphs."""

from minisft.explicit.microbatch import explicit_loss_and_grads
from minisft.explicit.plan import Choice, choose
from minisft.explicit.prepare import ExplicitPass, prepare

__all__ = ["Choice", "ExplicitPass", "choose", "explicit_loss_and_grads", "prepare"]
