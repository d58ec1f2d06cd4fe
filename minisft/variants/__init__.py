"""Variants of LoRA and of the optimizer: one idea, one file, tensors in and out."""
