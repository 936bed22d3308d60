"""The kinds of model that a replica can serve: a reward-model checkpoint, and the embedded world's gold judge."""
