"""Every kind of kernel launch that the rules choose on the device is run, seen to be run, and right."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from on_gpu import kinds
from on_gpu.calls import check
from on_gpu.kinds import Spec
from tsbn_kernels.backends import cuda, triton
from tsbn_kernels.backends.plan import DEVICES, Work
from tsbn_kernels.backends.plan import triton as triton_rules
from tsbn_kernels.backends.plan.cuda import CudaPlan
from tsbn_kernels.backends.plan.slots import PASSES
from tsbn_kernels.definition import layout
from tsbn_kernels.operator import ops


def test_kind(device: str, by: str, spec: Spec, wanted: set[str]) -> None:
    """The smallest call of a kind gives what the definition gives in float64, and was of that kind."""
    reach(by, spec, wanted, device)


def reach(by: str, spec: Spec, wanted: set[str], device: str) -> None:
    observed = {"triton": _observe_triton, "cuda": _observe_cuda}.get(by, _observe_layouts)
    with observed(spec) as seen:
        check(spec.call(), by, device, sums=spec.sums)
    reached = seen()
    missing = wanted - reached
    assert not missing, f"not reached: {', '.join(sorted(missing))}; reached: {', '.join(sorted(reached)) or 'none'}"


Seen = Callable[[], set[str]]


@contextlib.contextmanager
def _observe_triton(spec: Spec) -> Iterator[Seen]:
    """By the passes that the backend has made for the call: it makes one where it has none."""
    from tsbn_kernels.backends.triton import ops

    ops.forwards.clear()
    ops.backwards.clear()

    def seen() -> set[str]:
        plans = [run.plan for run in (*ops.forwards.values(), *ops.backwards.values())]
        return {kinds.triton_kind(plan.work, plan.variant) for plan in plans}

    yield seen


@contextlib.contextmanager
def _observe_cuda(spec: Spec) -> Iterator[Seen]:
    """By the launches that the backend chooses for the call: it chooses where it has not yet."""
    choose, reached = cuda.batch_norm._choose, set()

    def observed(work: Work, dtype: torch.dtype, device: torch.device) -> CudaPlan:
        plan = choose(work, dtype, device)
        reached.add(kinds.cuda_kind(plan))
        return plan

    cuda.batch_norm._prepare.cache_clear()
    cuda.batch_norm._choose = observed
    try:
        yield lambda: reached
    finally:
        cuda.batch_norm._choose = choose


@contextlib.contextmanager
def _observe_layouts(spec: Spec) -> Iterator[Seen]:
    """By the strides, for a backend without plans."""
    family = layout.family(spec.call().p.x, "task_major")
    assert family == spec.works()[0].family, f"{spec.name} is read as {family}"
    yield lambda: kinds.layout_kinds(spec)


# ---- without a GPU: do the calls reach every kind, and is one that is not reached found? -----------------------------


@pytest.mark.parametrize("name", ["H100", "RTX4090", "MI300X"])
def test_the_calls_reach_every_kind_of_the_triton_rules(name: str) -> None:
    found = kinds.smallest(lambda each: kinds.triton_kinds(each, DEVICES[name]))
    variants = ("resident", "streaming", "split", "elementwise")
    both = list(itertools.product(("rows", "columns"), ("forward", "backward")))
    every = {f"{family} {direction} {variant}" for (family, direction), variant in itertools.product(both, variants)}
    shared = {
        f"{family} {direction} {variant}, fan-out" for (family, direction), variant in itertools.product(both, variants)
    }
    if DEVICES[name].clusters and triton_rules.compiles_clusters():
        every |= {"rows forward cluster", "rows backward cluster"}
    never = {kind for kind in shared if "streaming" in kind}  # a fan-out has no such plan
    if name == "MI300X":  # of so many multiprocessors, that slabs of these sizes are split to fill whole waves
        never |= {"columns forward streaming", "columns backward streaming"}
    assert set().union(*found.values()) == (every | shared) - never
    assert max(each.elements for each in found) <= kinds.MOST_ELEMENTS


@pytest.mark.parametrize("name", ["A100", "H100"])
def test_the_calls_reach_every_kind_of_the_cuda_rules(name: str) -> None:
    found = kinds.smallest(lambda each: kinds.cuda_kinds(each, DEVICES[name]))
    reached = {tuple(kind.split()) for kind in set().union(*found.values())}
    accesses = {(access, passes) for access, passes, _ in reached}
    of_equal_tasks = [passes for passes in PASSES if "mixed" not in passes]
    assert accesses == set(itertools.product(("rows", "columns", "scalar"), of_equal_tasks))
    for access, passes in accesses:
        variants = {variant for *which, variant in reached if tuple(which) == (access, passes)}
        on_chip = set() if passes == "backward_fan_out" else {"resident"}
        clusters = {"cluster"} if DEVICES[name].clusters and on_chip else set()
        whole = {"together"} if access == "columns" and on_chip else {"split"}
        assert variants >= {"evaluation"} | whole | on_chip | clusters, (access, passes)


@pytest.fixture
def without_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both GPU backends plan for an H100, launch nothing, and give the CPU's results."""
    h100 = DEVICES["H100"]
    native = ops.operators("cpu")
    monkeypatch.setattr(cuda.launches, "device_of", lambda _: h100)
    for name, does in (("_cuda_launch", lambda *_: None), ("_cuda_active_clusters", lambda *_: 8)):
        monkeypatch.setattr(torch.ops.tsbn, name, does, raising=False)

    def planned(by: Any) -> ops.Operators:
        def both(name: str) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                getattr(by, name)(*arguments)
                return getattr(native, name)(*arguments)

            return call

        return ops.Operators(*map(both, ops.Operators._fields))

    monkeypatch.setattr(ops.batch_norm, "cuda", planned(cuda))
    if triton.available:
        from tsbn_kernels.backends.triton import launch
        from tsbn_kernels.backends.triton import ops as triton_ops

        monkeypatch.setattr(triton_ops, "device_of", lambda _: h100)
        monkeypatch.setattr(launch.Launch, "__call__", lambda self, *_: None)
        monkeypatch.setattr(ops.batch_norm, "triton", lambda: planned(triton_ops))
        monkeypatch.setattr(triton_ops, "forwards", {})
        monkeypatch.setattr(triton_ops, "backwards", {})


@pytest.mark.usefixtures("without_launches")
@pytest.mark.parametrize("backend", ["cuda", *["triton"] * triton.available])
def test_the_backends_choose_what_the_calls_are_planned_for(backend: str) -> None:
    """They make the same work of tensors as the specs say."""
    planned = kinds.planned(backend, "cpu")
    small = {each: wanted for each, wanted in planned.items() if each.elements <= 2**14}
    assert len(small) >= 12
    for each, wanted in [*small.items(), *list(small.items())[:1]]:  # the first again: by then it is prepared
        reach(backend, each, wanted, "cpu")


@pytest.mark.usefixtures("without_launches")
@pytest.mark.parametrize("backend", ["cuda", *["triton"] * triton.available])
def test_a_kind_that_is_not_reached_is_found(backend: str) -> None:
    with pytest.raises(AssertionError, match=r"not reached: rows forward telepathy; reached: .*rows"):
        reach(backend, kinds.small(), {"rows forward telepathy"}, "cpu")
