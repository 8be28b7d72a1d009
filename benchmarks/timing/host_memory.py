"""Memory that a step frees on the host: kept for the next step, as by accelerators' allocators, or given back."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # of <malloc.h>
# What glibc's own rule comes to once it has seen large blocks, and its limit of mapped ones.
RETURNING = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}
KEEPING = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}

_kept = False


def can_keep() -> bool:
    """Whether the C library can be told so: glibc can."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")


def will_keep(asked: bool) -> bool:
    """Whether :func:`keep_freed` keeps what is freed."""
    return asked and can_keep()


def policy() -> str:
    """``kept`` or ``returned``, what happens to freed memory now."""
    return "kept" if _kept else "returned"


@contextmanager
def keep_freed(keep: bool = True) -> Iterator[None]:
    """Within, blocks that this process frees are kept for its next ones, where the C library can; else as it likes.

    By itself glibc maps each tensor of more than 32 MiB anew and unmaps it, so that every step pays for page faults.
    What one costs depends on what the kernel did before, on a virtual machine also on its host: between next to nothing
    and 1.7 us on one machine, which changed the time of a step by a factor of three. Kept blocks are found again
    after some steps, once the small pieces between them are full: up to half more memory is taken.
    """
    global _kept
    _kept = will_keep(keep)
    if _kept:
        _set(KEEPING)
    try:
        yield
    finally:
        if _kept:
            _set(RETURNING)
        _kept = False
        release()


def release() -> None:
    """Gives all freed memory back now."""
    if can_keep():
        ctypes.CDLL(None).malloc_trim(0)


def _set(options: dict[int, int]) -> None:
    for option, value in options.items():
        ctypes.CDLL(None).mallopt(option, value)
