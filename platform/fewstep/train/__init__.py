"""Training on Ray: recipes, the worker's loop, sharding, checkpoints."""
