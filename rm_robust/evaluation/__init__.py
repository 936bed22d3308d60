"""Evaluation of reward models: suites of benchmarks with bootstrap intervals, and the four-scenario table of a run."""
