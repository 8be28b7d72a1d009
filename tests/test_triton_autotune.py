"""Tuning of the Triton plans, with the clock stubbed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tsbn_kernels.backends.triton import autotune
from tsbn_kernels.plan import DEVICES, Plan, Work
from tsbn_kernels.plan.triton import alternatives, plan

PLAN = plan(Work(40, 256, 64, 4096, 2), DEVICES["H100"])


class Clock:
    """Tells that the n-th alternative is the fastest, and remembers what was timed."""

    def __init__(self, fastest: int) -> None:
        self.fastest = alternatives(PLAN)[fastest]
        self.timed: list[Plan] = []

    def prepare(self, candidate: Plan) -> Callable[[], None]:
        self.timed.append(candidate)
        return lambda: None

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
    assert len(clock.timed) == timed
    (name,) = json.loads((tmp_path / "cache" / "autotune.json").read_text())
    assert "H100" in name


def test_batches_of_one_class_share_a_result(clock: Clock) -> None:
    autotune.choose(PLAN, clock.prepare)
    timed = len(clock.timed)
    near = plan(dataclasses.replace(PLAN.work, samples=210), DEVICES["H100"])
    assert autotune.choose(near, clock.prepare).warps == clock.fastest.warps
    assert len(clock.timed) == timed
    autotune.choose(plan(dataclasses.replace(PLAN.work, samples=600), DEVICES["H100"]), clock.prepare)
    autotune.choose(plan(PLAN.work, DEVICES["A100"]), clock.prepare)
    assert len(clock.timed) > 2 * timed


def test_damaged_or_outdated_results_are_replaced(clock: Clock, tmp_path: Path) -> None:
    file = tmp_path / "cache" / "autotune.json"
    for damaged in ("{", "[]", json.dumps({autotune._name(PLAN): "tile 3x3, 5 warps"})):
        file.parent.mkdir(exist_ok=True)
        file.write_text(damaged)
        assert autotune.choose(PLAN, clock.prepare) == clock.fastest
        assert json.loads(file.read_text())[autotune._name(PLAN)].endswith(f"{clock.fastest.warps} warps")


def test_nothing_is_timed_while_a_graph_is_recorded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "is_capturing", lambda: True)
    assert autotune.choose(PLAN, clock.prepare) is PLAN
    assert clock.timed == []
