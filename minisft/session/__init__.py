"""Everything around the training loop: evaluation, logs, resuming, signals, final report."""
