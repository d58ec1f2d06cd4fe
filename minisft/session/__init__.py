"""Around the training loop: evaluation, logs, resuming, signals, the final report."""
