"""The Triton backend: kernels for GPUs. Neither Triton nor a driver is touched before the first call.

``TRITON_INTERPRET=1`` runs the kernels in Triton's interpreter, on CPU tensors: slow, and no GPU is needed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from tsbn_kernels.backends.fallback import Health
from tsbn_kernels.definition import reference

DISPATCH_KEYS = ("CUDA", "XPU")  # ROCm devices are CUDA devices to PyTorch

available = importlib.util.find_spec("triton") is not None
interpreted = available and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
device_types = ("cuda", "xpu", "cpu") if interpreted else ("cuda", "xpu")
_MODULES = "ops", "double_backward", "layer_norm", "mixed", "mixed_layer_norm"  # which have the operators

health = Health("Triton")


def detail() -> str:
    """One line: the version, or what is missing."""
    if not available:
        return "Triton is not installed (pip install triton)"
    if health.broken:
        return f"Triton failed: {health.broken}"
    version = f"Triton {importlib.metadata.version('triton')}"
    if interpreted:
        return f"{version}, interpreted on the CPU (TRITON_INTERPRET is set)"
    return version if torch.accelerator.is_available() else f"{version}, no GPU here"


@cache
def operator(name: str) -> Callable[..., Any]:
    """An operator by Triton's kernels, or the reference's where they have none."""
    modules = (importlib.import_module(f"tsbn_kernels.backends.triton.{module}") for module in _MODULES)
    found: Callable[..., Any] = next((getattr(m, name) for m in modules if hasattr(m, name)), getattr(reference, name))
    return found
