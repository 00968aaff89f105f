"""The training loop and its parts: order of rows, optimiser, backward, checkpoints, logs."""
