"""Triton's kernels: what runs on the GPU."""
