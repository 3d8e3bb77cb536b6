"""Measurements behind every figure in README. Run from the repository: ``python -m benchmarks.layers --help``."""
