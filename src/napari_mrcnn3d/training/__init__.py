"""Training: the loop, its optimiser, checkpoints."""
