"""The CUDA C++ backend: kernels of csrc/cuda, chosen by :mod:`tsbn_kernels.backends.plan`.

The fallback where Triton is missing or broken, and the backend that keeps slabs in the shared memory of clusters. No
driver is touched on import. What has no values is left to the reference.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tsbn_kernels.backends.cuda.batch_norm import (
    backward,
    forward_eval,
    forward_tracked,
    forward_training,
    input_gradient,
    moments,
)
from tsbn_kernels.backends.cuda.launches import health
from tsbn_kernels.backends.cuda.mixed import (
    mixed_backward,
    mixed_forward_eval,
    mixed_forward_tracked,
    mixed_forward_training,
)
from tsbn_kernels.backends.cuda.rows import layer_norm, layer_norm_backward
from tsbn_kernels.backends.plan.cuda import ACTIVATION_CODES

__all__ = [
    "backward", "detail", "forward_eval", "forward_tracked", "forward_training", "health", "input_gradient",
    "layer_norm", "layer_norm_backward", "load", "mixed_backward", "mixed_forward_eval", "mixed_forward_tracked",
    "mixed_forward_training", "moments",
]  # fmt: skip

DISPATCH_KEY = "CUDA"
_LIBRARY = Path(__file__).parent.parent.parent / "_cuda.so"

available = False
_problem = ""


def load() -> None:
    """Loads the kernels; what is missing is remembered, not raised."""
    global available, _problem
    if not _LIBRARY.exists():
        _problem = "the CUDA library was not built (no nvcc or no CUDA PyTorch when the package was installed)"
    elif torch.version.cuda is None:
        _problem = "this PyTorch has no CUDA"
    else:
        try:
            torch.ops.load_library(str(_LIBRARY))
            available = torch.ops.tsbn._cuda_activations().split() == list(ACTIVATION_CODES)
            _problem = "the CUDA library was built from other sources: build it again"
        except (OSError, RuntimeError, AttributeError) as error:
            _problem = f"the CUDA library does not load: {error}"


def detail() -> str:
    """One line: what it is, or what is missing."""
    if not available:
        return _problem
    if health.broken:
        return f"CUDA C++ failed: {health.broken}"
    return "CUDA C++" if torch.cuda.is_available() else "CUDA C++, no GPU here"
