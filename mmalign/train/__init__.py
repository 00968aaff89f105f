"""The training loop and its parts: order of rows, optimizer, backward, checkpoints, logs."""
