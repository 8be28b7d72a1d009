"""A launch of a CUDA C++ kernel, and what is known of the backend's health and its devices."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tsbn_kernels.backends.fallback import Health, KernelError, is_fatal, summary
from tsbn_kernels.backends.plan import devices
from tsbn_kernels.backends.plan.cuda import DTYPE_CODES
from tsbn_kernels.definition.options import Running

health = Health("CUDA C++")


class Operands(NamedTuple):
    """The operands of a launch, in the order of the library's operator; csrc/cuda/params.h says what they are."""

    x: Tensor
    dy: Tensor | None = None
    residual: Tensor | None = None
    out: Tensor | None = None
    dresidual: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    first: Tensor | None = None
    second: Tensor | None = None
    partial: Tensor | None = None
    staged: Tensor | None = None
    mix: Tensor | None = None
    batches: Tensor | None = None
    rows: Tensor | None = None
    momentum: float | Tensor | None = None

    def tracking(self, running: Running) -> Operands:
        """A forward pass in training that updates these statistics, too."""
        mean, var, batches, momentum, rows = running
        return self._replace(mean=mean, var=var, batches=batches, rows=rows, momentum=momentum)


@lru_cache(maxsize=64)
def device_of(device: torch.device) -> devices.Device:
    """What plans need to know of a tensor's device."""
    return devices.of(device)


def code(dtype: torch.dtype) -> int:
    """The number of a dtype in csrc/cuda/params.h."""
    return DTYPE_CODES[str(dtype).removeprefix("torch.")]


def launch(name: str, kernel: list[int], numbers: list[int], eps: float, slope: float, operands: Operands) -> None:
    """Launches a kernel, which messages call ``name``.

    Raises:
        KernelError: it was not launched; what is the process's own error is raised as it is.
    """
    try:
        torch.ops.tsbn._cuda_launch(kernel, numbers, eps, slope, *operands)
    except RuntimeError as error:
        if is_fatal(error):
            raise
        own = "was not launched" in str(error) and "no kernel image" not in str(error)
        raise KernelError(name, summary(error), own) from error
    health.proved = True
