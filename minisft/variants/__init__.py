"""Optional parts of LoRA, embedding and optimizer: one idea, one file, tensors in and out."""
