"""What becomes of a kernel that does not run: the next backend of a chain takes over, at last the reference.

Whose fault an error is decides how much is given up:

- the process's (no memory, a lost context, a graph being captured): no other kernel fares better, it is raised;
- a kernel's (it does not compile, or needs more than the device has): the rest of the chain makes such calls;
- the backend's (no compiler, no driver), which shows before a kernel of it has run: it is not tried again;
- the caller's: the reference fails too, and its error is raised instead.

Where a backend was chosen, every error is raised.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

Operator = Callable[..., Any]

# In the messages of drivers. After most of these the context of the process is lost.
_FATAL = (
    "out of memory", "captur", "illegal memory access", "illegal instruction", "misaligned address",
    "global/shared address space", "invalid program counter", "hardware stack error", "unspecified launch failure",
    "launch timed out", "device-side assert", "uncorrectable", "context is destroyed", "device lost",
)  # fmt: skip


def is_fatal(error: Exception) -> bool:
    """Whether an error is the process's, which no other kernel mends."""
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _FATAL)


class KernelError(RuntimeError):
    """A kernel that does not compile or launch.

    Args:
        kernel: its name.
        reason: class and message of what it met, see :func:`summary`.
        own: whether the kernel is at fault for certain, rather than something that all kernels of the backend need.
    """

    def __init__(self, kernel: str, reason: str, own: bool) -> None:
        super().__init__(f"the kernel {kernel} does not run: {reason}")
        self.kernel, self.reason, self.own = kernel, reason, own


def summary(error: Exception) -> str:
    """Class and message of an error, as one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


class Health:
    """What is known of a backend.

    Attributes:
        name: of the backend, for people.
        proved: whether a kernel of it has run.
        broken: why it is not tried any more; empty while it is.
        failures: reasons by operator, kernel and class of error, where the backend as such works.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.proved = False
        self.broken = ""
        self.failures: dict[tuple[str, str, str], str] = {}

    def note(self, operator: str, error: Exception) -> None:
        """Remembers an error, and warns of each kind once."""
        if not isinstance(error, KernelError):  # a ValueError is a limit of the kernels
            error = KernelError(operator, summary(error), isinstance(error, ValueError))
        kind = operator, error.kernel, error.reason.partition(":")[0]
        if kind in self.failures:
            return
        if self.proved or error.own:
            self.failures[kind] = error.reason
            missing = f"the kernel {error.kernel} of {self.name}"
        else:
            self.broken = error.reason
            missing = self.name
        warnings.warn(f"tsbn-kernels runs without {missing}, more slowly: {error.reason}", stacklevel=3)


def guarded(health: Health, name: str, find: Callable[[str], Operator], otherwise: Operator) -> Operator:
    """The operator ``name`` of a backend, or ``otherwise``, that by the rest of the chain, where it does not run.

    ``find`` gives the operators of the backend; nothing is loaded before the first call.
    """

    def call(*arguments: Any) -> Any:
        if health.broken:
            return otherwise(*arguments)
        try:
            return find(name)(*arguments)
        except Exception as error:
            if is_fatal(error) or _is_forced():
                raise
            failure = error
        # The memory of the attempt is free again once nothing refers to its frames.
        failure.__traceback__ = failure.__cause__ = failure.__context__ = None
        try:
            result = otherwise(*arguments)
        except Exception as error:
            raise error from failure
        health.note(name, failure)
        return result

    return call


def _is_forced() -> bool:
    from tsbn_kernels import backends

    return backends.forced() is not None
