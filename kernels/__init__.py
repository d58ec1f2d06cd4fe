"""Triton ops of minisft, imported as `minisft.kernels`: one op, one folder, each with a plain-torch
reference. Imports torch and triton only."""
