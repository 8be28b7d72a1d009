"""The native CPU backend: loads the library built from ``csrc``, which implements the operators for CPU tensors."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_LIBRARY = Path(os.environ.get("TSBN_NATIVE_LIBRARY") or Path(__file__).parent.parent / "_native.so")

available = False
_problem = ""


def load() -> None:
    """Registers the native kernels with PyTorch's dispatcher; what is missing is remembered, not raised."""
    global available, _problem
    if not _LIBRARY.exists():
        _problem = "the native library was not built (no C++ compiler when the package was installed)"
        return
    try:
        torch.ops.load_library(str(_LIBRARY))
        available = True
    except (OSError, RuntimeError) as error:
        _problem = f"the native library does not load: {error}"


def detail() -> str:
    """One line: the instruction set in use, or what is missing."""
    return f"native C++, {instruction_set()}" if available else _problem


def instruction_set() -> str:
    """``"avx512_bf16"``, ``"avx512"``, ``"avx2"`` or ``"portable"``."""
    return str(torch.ops.tsbn._cpu_instruction_set())


def set_instruction_set(name: str) -> None:
    """Runs the kernels of another instruction set, for tests and comparisons; ``""`` is the best one.

    Raises:
        ValueError: this processor does not run ``name``.
    """
    if not torch.ops.tsbn._set_cpu_instruction_set(name):
        raise ValueError(f"this processor does not run {name!r} kernels; it chose {instruction_set()!r}")


def set_stream_bytes(num_bytes: int) -> int:
    """Writes outputs of so many bytes and more by streaming stores, for tests; returns how many it was (8 MiB)."""
    return int(torch.ops.tsbn._set_cpu_stream_bytes(num_bytes))
