"""Benchmarks of the fused layers against the ways to run T tasks without them: ``python -m benchmarks --help``."""
