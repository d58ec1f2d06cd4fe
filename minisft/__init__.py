"""Supervised fine-tuning of Llama models as pure functions.

`train(TrainConfig(...))` is the whole program; `minisft.llama` is the forward pass to read.
"""

from minisft.config import TrainConfig, UserError
from minisft.run import TrainOutput, train

__all__ = ["TrainConfig", "TrainOutput", "UserError", "train"]
