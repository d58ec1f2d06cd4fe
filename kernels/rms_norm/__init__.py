"""Residual sum and RMSNorm fused into one op, with its backward pass."""

from minisft.kernels.rms_norm.op import add_rms_norm, normalise, rms_norm_backward

__all__ = ["add_rms_norm", "normalise", "rms_norm_backward"]
