"""Responses of named models to prompts: generation with vLLM under Ray Data, and labelling with gold scores."""
