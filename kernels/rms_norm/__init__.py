"""Residual sum and RMSNorm in one pass, forward and backward."""

from minisft.kernels.rms_norm.op import add_rms_norm, normalise, rms_norm_backward

__all__ = ["add_rms_norm", "normalise", "rms_norm_backward"]
