"""The embedded world: tasks, response models and a gold judge made from a seed, so that a run needs no data set."""
