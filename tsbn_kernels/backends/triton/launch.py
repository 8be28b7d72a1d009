"""A kernel with all that does not change between calls, compiled at the first of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.errors import TritonError

from tsbn_kernels.backends import triton as backend
from tsbn_kernels.backends.fallback import KernelError, is_fatal, summary
from tsbn_kernels.backends.triton.again import launcher_of
from tsbn_kernels.backends.triton.kernels import (
    backward,
    cluster,
    double_backward,
    fan_out,
    forward,
    layer_norm,
    mixed,
    mixed_layer_norm,
)

MODULES = forward, backward, cluster, double_backward, fan_out, layer_norm, mixed, mixed_layer_norm  # of kernels


class Launch:
    """One kernel launch: which kernel, how many programs, the compiler's options, and the constants it is compiled for.

    A cluster is one program.

    Triton's own launcher looks at every argument on every call to find the compiled kernel. A ``Launch`` belongs to one
    shape, dtype, device and alignment, so it keeps the compiled kernel and only hands it the arguments.

    Raises:
        ValueError: there are more programs than a launch may have.
    """

    __slots__ = ("_failure", "_run", "constants", "kernel", "options", "programs")

    def __init__(self, kernel: str, programs: int, options: dict[str, int], *constants: Any) -> None:
        if programs >= 1 << 31:
            raise ValueError(f"{programs} programs are too many for one launch; the most are 2^31 - 1")
        self.kernel, self.programs, self.options, self.constants = kernel, programs, options, constants
        self._run: Callable[..., Any] | None = None
        self._failure: tuple[str, str, bool] | None = None

    @property
    def function(self) -> Any:
        """The ``triton.jit`` function."""
        return next(getattr(module, self.kernel) for module in MODULES if hasattr(module, self.kernel))

    def __call__(self, *arguments: Any) -> None:
        """Launches on the current device and stream.

        Raises:
            KernelError: the kernel does not compile or launch; it is not tried again.
        """
        if self._run is not None:
            self._run(*arguments, *self.constants)
            return
        if self._failure is not None:
            raise KernelError(*self._failure)
        try:
            compiled = self.function[self.programs, 1, 1](*arguments, *self.constants, **self.options)
        except Exception as error:
            if is_fatal(error):
                raise
            self._failure = self.kernel, summary(error), _is_of_kernel(error)
            raise KernelError(*self._failure) from error
        backend.health.proved = True
        if compiled is not None:  # the interpreter compiles nothing
            self._run = launcher_of(compiled, self.programs)


def _is_of_kernel(error: Exception) -> bool:
    """Whether an error is the kernel's, and not that of a missing compiler or driver."""
    return isinstance(error, TritonError) or str(error).startswith(("Triton Error [", "PassManager::run"))
