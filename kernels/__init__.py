"""Triton ops of minisft, imported as `minisft.kernels`. Each folder holds one op with a plain-torch
reference. The package imports only torch and triton."""
