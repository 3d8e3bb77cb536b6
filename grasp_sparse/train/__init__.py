"""Training: recipes, data, models, the loop, checkpoints, and the comparison with the dense step."""
