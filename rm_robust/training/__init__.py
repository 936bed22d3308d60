"""Training of SFT and of reward models: engines, the loop and exact resume."""
