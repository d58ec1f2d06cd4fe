"""Norm, clipping and AdamW over flat buffers."""

from minisft.kernels.adamw.op import adamw_, global_norm

__all__ = ["adamw_", "global_norm"]
