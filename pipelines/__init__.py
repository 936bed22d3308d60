"""The commands, and the stages of a run in their order."""
