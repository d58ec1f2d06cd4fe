"""Kernels of minisft: one op, one folder, each with a reference in plain torch. Imports torch and
triton only. The import name is `minisft.kernels`."""
