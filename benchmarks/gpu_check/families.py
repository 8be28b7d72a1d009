"""Step: every kind of kernel launch that the rules choose on this device is run, seen to be run, and right."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_check import kinds
from benchmarks.gpu_check.calls import check
from benchmarks.gpu_check.case import Case, Cases, Setting
from benchmarks.gpu_check.kinds import Spec
from tsbn_kernels import layout
from tsbn_kernels.backends import cuda

MOST_QUICK = 3


def cases(setting: Setting) -> Cases:
    """The smallest call of each kind."""
    found = planned(setting)
    if setting.quick:
        found = dict(list(found.items())[:MOST_QUICK])
    about = f"{sum(map(len, found.values()))} kinds of launches"
    return Cases(
        [Case(spec.name, partial(reach, spec, wanted, setting)) for spec, wanted in found.items()], about=about
    )


def planned(setting: Setting) -> dict[Spec, set[str]]:
    """Calls, and the kinds that are to be reached by each."""
    if setting.backend == "triton":
        from tsbn_kernels.backends.triton import ops

        return kinds.smallest(partial(kinds.triton_kinds, device=ops._device(_index(setting.device))))
    if setting.backend == "cuda":
        index = _index(setting.device)
        return kinds.smallest(partial(kinds.cuda_kinds, device=cuda._device(index), clusters=cuda._clusters(index)))
    return kinds.smallest(kinds.layout_kinds)


def reach(spec: Spec, wanted: set[str], setting: Setting) -> dict[str, Any]:
    """Runs a call, compares it with the definition, and sees that its kinds are among those that ran.

    Raises:
        AssertionError: a result is wrong, or a kind was not reached.
    """
    observed = {"triton": _observe_triton, "cuda": _observe_cuda}.get(setting.backend, _observe_layouts)
    with observed(spec) as seen:
        check(spec.call(), setting.backend, setting.device, sums=spec.sums)
    reached = seen()
    missing = wanted - reached
    assert not missing, f"not reached: {', '.join(sorted(missing))}; reached: {', '.join(sorted(reached)) or 'none'}"
    return {"reached": sorted(wanted)}


Seen = Callable[[], set[str]]


@contextlib.contextmanager
def _observe_triton(spec: Spec) -> Iterator[Seen]:
    """By the passes that the backend has made for the call: it makes one where it has none."""
    from tsbn_kernels.backends.triton import ops

    ops._forwards.clear()
    ops._backwards.clear()

    def seen() -> set[str]:
        plans = [run.plan for run in (*ops._forwards.values(), *ops._backwards.values())]
        return {kinds.triton_kind(plan.work, plan.variant) for plan in plans}

    yield seen


@contextlib.contextmanager
def _observe_cuda(spec: Spec) -> Iterator[Seen]:
    """By the launches that the backend chooses for the call: it chooses where it has not yet."""
    choose, reached = cuda._choose, set()

    def observed(problem: Any, device: torch.device) -> Any:
        launch = choose(problem, device)
        reached.add(kinds.cuda_kind(problem, launch))
        return launch

    cuda._prepare.cache_clear()
    cuda._choose = observed
    try:
        yield lambda: reached
    finally:
        cuda._choose = choose


@contextlib.contextmanager
def _observe_layouts(spec: Spec) -> Iterator[Seen]:
    """By the strides, for a backend without plans."""
    family = layout.family(spec.call().p.x, "task_major")
    assert family == spec.works()[0].family, f"{spec.name} is read as {family}"
    yield lambda: kinds.layout_kinds(spec)


def _index(device: str) -> torch.device:
    """With an index, as tensors have it."""
    return torch.empty(0, device=device).device
