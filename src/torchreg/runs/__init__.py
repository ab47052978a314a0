"""One training run: configuration, set-up, loop, logs, checkpoints, record."""
