"""Kernels of minisft: one op, one folder, each with a reference in plain torch. Imports torch and
triton only, never minisft."""

MINISFT_KERNELS = True  # tells this package from the one of the same name on PyPI
