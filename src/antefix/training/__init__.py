"""Training: objectives, the loop, checkpoints, recipes."""
