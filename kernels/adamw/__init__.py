"""Ops on flat float32 buffers: gradient norm, and AdamW with gradient clipping."""

from minisft.kernels.adamw.op import adamw_, global_norm
from minisft.kernels.adamw.reference import AdamWStep

__all__ = ["AdamWStep", "adamw_", "global_norm"]
