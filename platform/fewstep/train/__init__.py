"""Training on Ray: recipes, the workers' loop, sharding, checkpoints, and estimates of a run's cost."""
