"""Optional LoRA, embedding and optimizer methods, one per file, as functions on tensors."""
