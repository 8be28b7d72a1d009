"""The Triton backend: kernels for GPUs. Neither Triton nor a driver is touched before the first call.

``TRITON_INTERPRET=1`` runs the kernels in Triton's interpreter, on CPU tensors: slow, and no GPU is needed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

DISPATCH_KEYS = ("CUDA", "XPU")  # ROCm devices are CUDA devices to PyTorch

available = importlib.util.find_spec("triton") is not None
interpreted = available and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
device_types = ("cuda", "xpu", "cpu") if interpreted else ("cuda", "xpu")

_proved = False  # whether a kernel has run: only then is a failure an error, and not a reason to do without Triton
_broken = ""


def detail() -> str:
    """One line: the version, or what is missing."""
    if not available:
        return "Triton is not installed (pip install triton)"
    if _broken:
        return f"Triton failed: {_broken}"
    version = f"Triton {importlib.metadata.version('triton')}"
    if interpreted:
        return f"{version}, interpreted on the CPU (TRITON_INTERPRET is set)"
    return version if torch.accelerator.is_available() else f"{version}, no GPU here"


@cache
def operator(name: str) -> Callable[..., Any]:
    """The operator ``forward_training``, ``forward_eval`` or ``backward`` by Triton's kernels."""
    function: Callable[..., Any] = getattr(importlib.import_module("tsbn_kernels.backends.triton.ops"), name)
    return function


def operator_or(name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """The same, or ``otherwise`` for good if Triton does not get its first kernel to run; one warning says why."""

    def call(*arguments: Any) -> Any:
        global _proved, _broken
        if _broken:
            return otherwise(*arguments)
        try:
            result = operator(name)(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if _proved:
                raise
            _broken = f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(f"tsbn-kernels runs without Triton, more slowly: {_broken}", stacklevel=2)
            return otherwise(*arguments)
        _proved = True
        return result

    return call
