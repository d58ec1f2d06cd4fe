"""Gradient norm, clipping and AdamW over flat float32 buffers."""

from minisft.kernels.adamw.op import adamw_, global_norm
from minisft.kernels.adamw.reference import AdamWStep

__all__ = ["AdamWStep", "adamw_", "global_norm"]
