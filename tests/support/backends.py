"""The backends and instruction sets that tests run on, threads, and the limit of the pool."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tsbn_kernels import memory
from tsbn_kernels.backends import cpu, triton

BACKENDS = ("native", "triton") if triton.available else ("native",)

# The pool hands memory with a deleter to PyTorch, which takes it from 2.11 on.
HAS_POOL = cpu.available and sys.platform == "linux" and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


@contextmanager
def on_backend(name: str) -> Iterator[None]:
    """Runs the operators on Triton's kernels where ``name`` is "triton": on CPU tensors, interpreted, slowly.

    The plans are those of a device on which a slab of more than 2048 values is read in tiles of 256.
    """
    if name != "triton":
        yield
        return
    from support import interpreter

    with interpreter.dispatched(interpreter.device(threads=64)):
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def cache_limit(num_bytes: int) -> Iterator[None]:
    before = memory.cache_limit()
    memory.set_cache_limit(num_bytes)
    try:
        yield
    finally:
        memory.set_cache_limit(before)


@contextmanager
def streaming_from(num_bytes: int) -> Iterator[None]:
    """Writes outputs of so many bytes and more by streaming stores, else those of 8 MiB and more."""
    before = cpu.set_stream_bytes(num_bytes)
    try:
        yield
    finally:
        cpu.set_stream_bytes(before)


def instruction_sets() -> list[str]:
    """Those that this processor runs."""
    if not cpu.available:
        return []
    return [name for name in ("avx512_bf16", "avx512", "avx2", "portable") if _runs(name)]


def _runs(name: str) -> bool:
    try:
        cpu.set_instruction_set(name)
    except ValueError:
        return False
    finally:
        cpu.set_instruction_set("")
    return True
