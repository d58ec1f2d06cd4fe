"""Read and write files: safetensors, base models, checkpoints, adapters, exports."""
