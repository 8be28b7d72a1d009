"""A kernel with all that does not change between calls, compiled at the first of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tsbn_kernels.backends.triton import backward, fan_out, forward


class Launch:
    """One kernel launch: which kernel, how many programs, the compiler's options, and the constants it is compiled for.

    Triton's own launcher looks at every argument on every call to find the compiled kernel. A ``Launch`` belongs to one
    shape, dtype, device and alignment, so it keeps the compiled kernel and only hands it the arguments.
    """

    __slots__ = ("_run", "constants", "kernel", "options", "programs")

    def __init__(self, kernel: str, programs: int, options: dict[str, int], *constants: Any) -> None:
        self.kernel, self.programs, self.options, self.constants = kernel, programs, options, constants
        self._run: Callable[..., Any] | None = None

    @property
    def function(self) -> Any:
        """The ``triton.jit`` function."""
        modules = {"forward": forward, "backward": backward, "fan": fan_out}
        return getattr(modules[self.kernel.partition("_")[0]], self.kernel)

    def __call__(self, *arguments: Any) -> None:
        """Launches on the current device and stream."""
        if self._run is not None:
            self._run(*arguments, *self.constants)
            return
        grid = (self.programs, 1, 1)
        compiled = self.function[grid](*arguments, *self.constants, **self.options)
        if compiled is not None:  # the interpreter compiles nothing
            self._run = compiled[grid]
