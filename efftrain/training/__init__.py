"""The training loop, its metrics and checkpoints."""
