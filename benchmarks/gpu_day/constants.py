"""The constants of the plans' rules that a measurement may change, and the values that are tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from unittest import mock

from tsbn_kernels.backends.plan import cuda, expect, triton


@dataclass(frozen=True)
class Constant:
    """A module's number."""

    module: ModuleType
    name: str
    values: tuple[float, ...]

    @property
    def value(self) -> float:
        """What it is now."""
        return float(getattr(self.module, self.name))

    def __str__(self) -> str:
        return f"{self.module.__name__}.{self.name}"


def _times(name: str) -> Constant:
    """Seconds of the expected time, up to four times longer or shorter."""
    value = getattr(expect, name)
    return Constant(expect, name, tuple(factor * value for factor in (0.25, 0.5, 1.0, 2.0, 4.0)))


OF_PROGRAMS = tuple(map(_times, ("EXCHANGE_SECONDS", "LATENCY_SECONDS", "RANK_SECONDS")))


CONSTANTS = {
    "triton": (
        Constant(triton, "WAVES", (2, 4, 8, 16)),
        Constant(triton, "MAX_SPLITS", (16, 32, 64, 128, 256)),
        Constant(triton, "TILES_PER_PROGRAM", (1, 2, 4, 8)),
        Constant(triton, "TILE_OVERHEAD", (0, 256, 512, 1024, 2048)),
        *OF_PROGRAMS,
    ),
    "cuda": (_times("LAUNCH_SECONDS"), *OF_PROGRAMS, _times("MEETING_SECONDS")),
}


@contextmanager
def changed(values: Mapping[Constant, float]) -> Iterator[None]:
    """The rules with other constants."""
    with ExitStack() as stack:
        for constant, value in values.items():
            kind = type(getattr(constant.module, constant.name))
            stack.enter_context(mock.patch.object(constant.module, constant.name, kind(value)))
        cuda.plan.cache_clear()
        try:
            yield
        finally:
            cuda.plan.cache_clear()
