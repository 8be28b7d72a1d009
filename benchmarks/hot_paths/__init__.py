"""Micro-benchmarks of the hot paths, and the check that none of them has become slower."""
