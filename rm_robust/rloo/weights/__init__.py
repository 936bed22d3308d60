"""Bring the trainer's weights to every vLLM engine, and confirm that the engine computes with them."""
