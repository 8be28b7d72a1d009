"""Tuning of the Triton plans, with the clock stubbed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tsbn_kernels.backends.fallback import KernelError
from tsbn_kernels.backends.plan import DEVICES, Plan, Work
from tsbn_kernels.backends.plan.triton import alternatives, plan
from tsbn_kernels.backends.triton import autotune
from tsbn_kernels.definition.options import Needs, Options, Saved

PLAN = plan(Work(40, 256, 64, 4096, 2), DEVICES["H100"])


class Clock:
    """Tells that the n-th alternative is the fastest, and remembers what was timed; lets some of them fail."""

    def __init__(self, fastest: int) -> None:
        self.fastest = alternatives(PLAN)[fastest]
        self.timed: list[Plan] = []
        self.fails: Callable[[Plan], bool] = lambda candidate: False
        self.error: Exception = KernelError("forward_slab", "OutOfResources: shared memory", own=True)
        self.early = False

    def prepare(self, candidate: Plan) -> Callable[[], None]:
        def run() -> None:
            if self.fails(candidate):
                raise self.error

        self.timed.append(candidate)
        if self.early:
            run()
        return run

    def milliseconds(self, run: Callable[[], None]) -> float:
        run()
        return 1.0 if (self.timed[-1].tile, self.timed[-1].warps) == (self.fastest.tile, self.fastest.warps) else 2.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    clock = Clock(fastest=2)
    monkeypatch.setattr(autotune, "_milliseconds", clock.milliseconds)
    monkeypatch.setenv("TSBN_AUTOTUNE", "1")
    monkeypatch.setenv("TSBN_CACHE", str(tmp_path / "cache"))
    return clock


def test_off_by_default(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("0", "", None):
        if value is None:
            monkeypatch.delenv("TSBN_AUTOTUNE")
        else:
            monkeypatch.setenv("TSBN_AUTOTUNE", value)
        assert autotune.choose(PLAN, clock.prepare) is PLAN
    assert clock.timed == []


def test_the_fastest_is_remembered_on_disk(clock: Clock, tmp_path: Path) -> None:
    assert len(alternatives(PLAN)) > 2
    assert autotune.choose(PLAN, clock.prepare) == clock.fastest
    timed = len(clock.timed)
    assert timed == len(alternatives(PLAN))
    assert autotune.choose(PLAN, clock.prepare) == clock.fastest
    assert len(clock.timed) == timed + 1  # once, to see that it runs
    (name,) = json.loads((tmp_path / "cache" / "autotune.json").read_text())
    assert "H100" in name


def test_batches_of_one_class_share_a_result(clock: Clock) -> None:
    autotune.choose(PLAN, clock.prepare)
    timed = len(clock.timed)
    near = plan(dataclasses.replace(PLAN.work, samples=210), DEVICES["H100"])
    assert autotune.choose(near, clock.prepare).warps == clock.fastest.warps
    assert len(clock.timed) == timed + 1
    autotune.choose(plan(dataclasses.replace(PLAN.work, samples=600), DEVICES["H100"]), clock.prepare)
    autotune.choose(plan(PLAN.work, DEVICES["A100"]), clock.prepare)
    assert len(clock.timed) > 2 * timed


def test_damaged_or_outdated_results_are_replaced(clock: Clock, tmp_path: Path) -> None:
    file = tmp_path / "cache" / "autotune.json"
    for damaged in (
        "{",
        "[]",
        json.dumps({autotune._name(PLAN): "tile 3x3, 5 warps"}),
        json.dumps({autotune._name(PLAN): [1]}),
    ):
        file.parent.mkdir(exist_ok=True)
        file.write_text(damaged)
        assert autotune.choose(PLAN, clock.prepare) == clock.fastest
        assert json.loads(file.read_text())[autotune._name(PLAN)].endswith(f"{clock.fastest.warps} warps")


def test_nothing_is_timed_while_a_graph_is_recorded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "is_capturing", lambda: True)
    assert autotune.choose(PLAN, clock.prepare) is PLAN
    assert clock.timed == []


TOO_MUCH = [
    KernelError("forward_slab", "OutOfResources: shared memory", own=True),
    ValueError("4294967296 programs are too many for one launch"),
    torch.OutOfMemoryError("80 GiB"),
]


@pytest.mark.parametrize("error", TOO_MUCH, ids=str)
@pytest.mark.parametrize("early", [False, True])
def test_neighbours_that_do_not_fit_are_left_out(clock: Clock, error: Exception, early: bool) -> None:
    clock.error, clock.early = error, early
    clock.fails = lambda candidate: candidate.warps > PLAN.warps or candidate == alternatives(PLAN)[-1]
    assert clock.fastest.warps > PLAN.warps  # the fastest is among them
    chosen = autotune.choose(PLAN, clock.prepare)
    assert not clock.fails(chosen)
    assert len(clock.timed) == len(alternatives(PLAN))


@pytest.mark.parametrize("early", [False, True])
def test_where_nothing_fits_the_rule_stays(clock: Clock, early: bool, tmp_path: Path) -> None:
    """So that its error is the one that is told; nothing is remembered."""
    clock.early, clock.fails = early, lambda candidate: True
    assert autotune.choose(PLAN, clock.prepare) is PLAN
    assert not (tmp_path / "cache" / "autotune.json").exists()


def test_what_was_remembered_for_another_batch_may_not_fit(clock: Clock) -> None:
    """Batches of one class share a choice; one that needs masks needs more registers."""
    assert autotune.choose(PLAN, clock.prepare) == clock.fastest
    uneven = plan(dataclasses.replace(PLAN.work, samples=255), DEVICES["H100"])
    assert autotune.choose(uneven, clock.prepare).warps == clock.fastest.warps
    clock.fails = lambda candidate: candidate.warps != uneven.warps
    assert autotune.choose(uneven, clock.prepare) is uneven


def test_a_lost_context_is_no_matter_of_size(clock: Clock) -> None:
    clock.error, clock.fails = RuntimeError("Triton Error [CUDA]: an illegal memory access"), lambda candidate: True
    with pytest.raises(RuntimeError, match="illegal memory access"):
        autotune.choose(PLAN, clock.prepare)


def test_a_folder_that_cannot_be_written(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TSBN_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="tunes again in the next process: "):
        assert autotune.choose(PLAN, clock.prepare) == clock.fastest


def test_plans_are_timed_on_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be the current one."""
    from support.interpreter import device, interpreted
    from support.problems import problem

    from tsbn_kernels.backends import triton as backend
    from tsbn_kernels.backends.triton import ops

    inside: list[torch.device] = []
    timed: list[Plan] = []

    @contextmanager
    def on(where: torch.device) -> Iterator[None]:
        inside.append(where)
        yield
        inside.pop()

    def choose(plan: Plan, prepare: Callable[[Plan], Callable[[], None]]) -> Plan:
        assert inside
        timed.append(plan)
        return plan

    p = problem(2, 2, 1, (2,))
    with interpreted(device(threads=64)):
        monkeypatch.setattr(ops, "on_device", on)
        monkeypatch.setattr(ops, "choose", choose)
        _, mean, var = backend.operator("forward_training")(p.x, p.weight, p.bias, None, Options(*p.options))
        saved, needs = Saved(p.x, p.weight, None, None, mean, var), Needs(True, True, True, False)
        backend.operator("backward")(p.dy, saved, True, needs, Options(*p.options))
    assert len(timed) == 2
