"""Which backends exist, which are usable here, and which one runs.

The dispatcher picks a backend by the device of ``x``; between Triton and CUDA C++ the plan of each call decides, see
:mod:`tsbn_kernels.backends.choice`. ``TSBN_BACKEND`` or :func:`use_backend` override it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tsbn_kernels.backends import cpu, cuda, triton


@dataclass(frozen=True)
class Availability:
    """Where a backend runs: the device types (empty: any), and whether it is usable here and why."""

    name: str
    device_types: tuple[str, ...]
    available: bool
    detail: str

    def runs_on(self, device_type: str) -> bool:
        return not self.device_types or device_type in self.device_types


def backends() -> tuple[Availability, ...]:
    """All backends, the preferred ones first."""
    return (
        Availability("triton", triton.device_types, triton.available and not triton.health.broken, triton.detail()),
        Availability("cuda", ("cuda",), cuda.available and not cuda.health.broken, cuda.detail()),
        Availability("cpu", ("cpu",), cpu.available, cpu.detail()),
        Availability("reference", (), True, "eager PyTorch, any device"),
    )


def _available(name: str) -> Availability:
    known = {backend.name: backend for backend in backends()}
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"unknown backend {name!r}; known are {', '.join(known)}")
    if not known[name].available:
        raise RuntimeError(f"backend {name!r} is not available: {known[name].detail}")
    return known[name]


_override: Availability | None = None


def force_from_environment() -> None:
    """Obeys ``TSBN_BACKEND``; to be called once the backends are loaded, for only then is it known which are usable."""
    global _override
    _override = _available(os.environ["TSBN_BACKEND"]) if os.environ.get("TSBN_BACKEND") else None


def forced() -> str | None:
    """Name of the backend that ``TSBN_BACKEND`` or :func:`use_backend` chose."""
    return None if _override is None else _override.name


def override(device_type: str) -> str | None:
    """Name of the backend forced by ``TSBN_BACKEND`` or :func:`use_backend`; None where the dispatcher chooses.

    Raises:
        RuntimeError: the forced backend does not run on ``device_type``.
    """
    if _override is None:
        return None
    if not _override.runs_on(device_type):
        raise RuntimeError(
            f"backend {_override.name!r} was chosen by TSBN_BACKEND or use_backend, but it runs on "
            f"{', '.join(_override.device_types)} and the input is on {device_type}; move the input or choose another"
        )
    return _override.name


def plans_decide(device_type: str) -> bool:
    """Whether the plan of each call chooses between two backends that run tensors of ``device_type``."""
    usable = [b.name for b in backends() if b.available and b.runs_on(device_type)]
    return override(device_type) is None and device_type == "cuda" and usable[:2] == ["triton", "cuda"]


def select(device_type: str) -> str:
    """Name of the backend that runs tensors of ``device_type``, the preferred one where the plan of a call decides.

    Raises:
        RuntimeError: as :func:`override`.
    """
    return override(device_type) or next(b.name for b in backends() if b.available and b.runs_on(device_type))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs everything inside on the backend ``name``, in all threads of the process.

    A backward pass runs on the backend of its forward pass, wherever it is called.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: it is not available here; the message says why.
    """
    global _override
    previous, _override = _override, _available(name)
    try:
        yield
    finally:
        _override = previous
