"""Measure this repository against other trainers and servers, by hand."""
