"""Bytes in and out: safetensors, base models, checkpoints, adapters, exports."""
