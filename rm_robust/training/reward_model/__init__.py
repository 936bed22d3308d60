"""Training of a reward model: objectives, one exact optimiser step, metrics and the stage."""
