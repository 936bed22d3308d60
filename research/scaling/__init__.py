"""Predict memory, time, traffic and cost on GPUs by formulas, and compare them with measured runs."""
