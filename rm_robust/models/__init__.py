"""The models that are trained and served: packed batches, attention, policy, reward models and checkpoints."""
