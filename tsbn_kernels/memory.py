"""Control of the memory that large CPU outputs live in.

The CPU backend takes outputs of 1 MiB and more from a pool of huge-page blocks and keeps freed blocks for the next
output: the page faults of fresh memory cost more than the arithmetic. ``TSBN_POOL_LIMIT_MB`` sets the limit at start
(0 turns the pool off); without it, a quarter of the machine's memory.

The storage of such an output cannot be resized: ``resize_`` to more, ``out=`` of another size, and
``untyped_storage().resize_(0)``, by which some programs free activations, are errors of PyTorch ("Trying to resize
storage that is not resizable"). Programs that do this turn the pool off: ``set_cache_limit(0)``.
"""

from __future__ import annotations

import torch

from tsbn_kernels.backends import cpu
from tsbn_kernels.operator import checks


def empty_cache() -> int:
    """Gives all idle blocks back to the system; returns how many bytes that were."""
    return int(torch.ops.tsbn._pool_trim(0)) if cpu.available else 0


def cached_bytes() -> int:
    """Tells how many bytes of idle blocks wait for the next output."""
    return int(torch.ops.tsbn._pool_idle_bytes()) if cpu.available else 0


def cache_limit() -> int:
    """Tells how many bytes may lie idle at most."""
    return int(torch.ops.tsbn._pool_limit()) if cpu.available else 0


def set_cache_limit(num_bytes: int) -> None:
    """Sets the most bytes that may lie idle and frees what is above; 0 turns the pool off.

    Raises:
        ValueError: ``num_bytes`` is negative, or above what 64 bits hold.
        TypeError: it is no integer.
    """
    num_bytes = checks.index("num_bytes", num_bytes)
    if not 0 <= num_bytes < 1 << 63:
        raise ValueError(f"num_bytes must be 0 or more, and below 2**63, got {num_bytes}")
    if cpu.available:
        torch.ops.tsbn._pool_set_limit(num_bytes)
