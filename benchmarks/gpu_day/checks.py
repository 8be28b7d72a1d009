"""Steps made of those of the check of a GPU: graphs, streams, determinism and large tensors; and memcheck, last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.gpu_check import concurrency, graphs, large, repeats, sanitizer
from benchmarks.gpu_check.case import Case, Cases, Setting, SkippedError
from benchmarks.gpu_day import race
from benchmarks.gpu_day.ceilings import guarded

STEPS: dict[str, Callable[[Setting], Cases]] = {
    "graphs": graphs.cases,
    "streams": concurrency.cases,
    "determinism": repeats.cases,
    "large": large.cases,
}


def cases(setting: Setting) -> Cases:
    """All cases of a backend; a step that has no meaning here is one skipped case.

    Raises:
        SkippedError: the backend is not available.
    """
    _need(setting)
    return Cases(
        [
            guarded(case, setting, name)
            for name, of in STEPS.items()
            if name != "graphs" or setting.device != "cpu"
            for case in _cases(of, setting)
        ]
    )


def memcheck(setting: Setting) -> Cases:
    """compute-sanitizer's memcheck alone, over one small call of each kind of launch.

    Raises:
        SkippedError: the backend, or the tool, is not available.
    """
    _need(setting)
    return sanitizer.cases(replace(setting, quick=True))


def _need(setting: Setting) -> None:
    """The backend must be one of those that run here."""
    if setting.backend not in [entrant.backend for entrant in race.ours(torch.device(setting.device))]:
        raise SkippedError(f"the backend {setting.backend} is not available")


def _cases(of: Callable[[Setting], Cases], setting: Setting) -> list[Case]:
    try:
        return list(of(setting).cases)
    except SkippedError as error:
        return [Case("all", _skip(str(error)))]


def _skip(reason: str) -> Callable[[], None]:
    def skip() -> None:
        raise SkippedError(reason)

    return skip
