"""The check of the hot paths' speed, on a clock and on counts that only the test changes."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import typer

from benchmarks.micro import check as command
from benchmarks.micro.baselines import INSTRUCTIONS, TIME, Baselines
from benchmarks.micro.instructions import UncountableError, read
from benchmarks.micro.paths import HotPath, Pair
from benchmarks.micro.ratios import Shortest, ratios, shortest

COUNTED, TIMED = "counting machine avx2", "timing machine"


class Clock:
    """Seconds that pass only where a step says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def step(self, seconds: float, held_up: float = 0.0, every: int = 1):
        """A step of this length that the machine often holds up."""
        calls = 0

        def run() -> None:
            nonlocal calls
            calls += 1
            self.now += seconds + (0 if calls % every == 0 else held_up)

        return run


def path_of(name: str) -> HotPath:
    @contextmanager
    def ready():
        yield name

    return HotPath(name, ready)


def test_what_holds_a_step_up_does_not_count():
    clock = Clock()
    pair = Pair(clock.step(3e-3, held_up=1.0, every=4), clock.step(1e-3, held_up=0.1, every=3))
    assert shortest(pair, rounds=12, clock=clock) == pytest.approx((3e-3, 1e-3))


def test_short_steps_are_timed_together():
    clock = Clock()
    times = shortest(Pair(clock.step(1e-6), clock.step(1e-5)), rounds=2, clock=clock)
    assert times.ratio == pytest.approx(0.1)
    assert clock.now - 100 >= 2 * 2 * 2e-4


def test_a_slow_path_gets_other_chances_that_add_up():
    """Neither time is short in the same attempt; a path that stays slow is slow in the end."""
    attempts = {"busy": [(9.0, 2.0), (1.0, 9.0), (9.0, 9.0)], "slow": [(3.0, 2.0)] * 3, "fine": [(1.0, 2.0)]}
    measured = iter([*("busy", "slow", "fine"), *("busy", "slow"), "slow"])

    def measure(name):
        assert name == next(measured)
        return Shortest(*attempts[name].pop(0))

    found = ratios(map(path_of, attempts), lambda _, ratio: ratio > 1, measure, attempts=3)
    assert found == {"busy": 0.5, "slow": 1.5, "fine": 0.5}
    assert next(measured, None) is None


@pytest.mark.parametrize(("measure", "limit"), [(INSTRUCTIONS, 1.1), (TIME, 1.2)])
def test_limits(tmp_path, measure, limit):
    stored = Baselines(tmp_path / "baselines.json")
    stored.accept(measure, "here", {"path": 200.0})
    for factor, too_slow in ((0.5, False), (1.0, False), (limit - 0.01, False), (limit + 0.01, True), (1.3, True)):
        (entry,) = Baselines(tmp_path / "baselines.json").compare(measure, "here", {"path": 200.0 * factor})
        assert entry.too_slow == too_slow
        assert entry.change == pytest.approx(factor)


def test_accepting_leaves_other_machines_alone(tmp_path):
    file = tmp_path / "baselines.json"
    Baselines(file).accept(TIME, "there", {"path": 1.0})
    Baselines(file).accept(TIME, "here", {"gone": 1.0})
    Baselines(file).accept(TIME, "here", {"path": 2.00004})
    assert Baselines(file).of(TIME, "there") == {"path": 1.0}
    assert Baselines(file).of(TIME, "here") == {"path": 2.0}
    assert Baselines(file).of(INSTRUCTIONS, "here") == {}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command on measurements that are given, and a file of baselines of its own."""
    file = tmp_path / "baselines.json"
    monkeypatch.setattr(command, "Baselines", lambda: Baselines(file))
    monkeypatch.setattr(command, "counting_machine", lambda instruction_set: f"counting machine {instruction_set}")
    monkeypatch.setattr(command, "timing_machine", lambda: TIMED)

    def run(counts, times, accept=False):
        def count():
            if counts is None:
                raise UncountableError("valgrind is not installed")
            return "avx2", counts

        monkeypatch.setattr(command, "count", count)
        monkeypatch.setattr(command, "ratios", lambda *_: times)
        command.check(accept)

    return run


def test_what_is_as_fast_as_its_baseline_passes(run, capsys):
    run({"forward": 1000.0}, {"forward": 0.5}, accept=True)
    run({"forward": 1050.0}, {"forward": 0.55})
    run({"forward": 500.0}, {"forward": 0.25})
    assert "without a baseline" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("counts", "times", "said"),
    [
        ((1300.0, 1000.0), (0.5, 0.5), ["forward: instructions 1,300, 1.30 times the baseline's 1,000", "at most 1.1"]),
        ((1000.0, 1000.0), (0.5, 0.65), ["backward: time / PyTorch's 0.650, 1.30 times the baseline's 0.500"]),
    ],
)
def test_what_is_slower_fails_and_says_what_to_do(run, capsys, counts, times, said):
    names = "forward", "backward"
    run(dict.fromkeys(names, 1000.0), dict.fromkeys(names, 0.5), accept=True)
    with pytest.raises(typer.Exit) as ended:
        run(dict(zip(names, counts, strict=True)), dict(zip(names, times, strict=True)))
    assert ended.value.exit_code == 1
    message = capsys.readouterr().err
    for text in (*said, "make speed-baselines"):
        assert text in message
    assert sum(name + ":" in message for name in names) == 1
    run(dict(zip(names, counts, strict=True)), dict(zip(names, times, strict=True)), accept=True)
    run(dict(zip(names, counts, strict=True)), dict(zip(names, times, strict=True)))


def test_what_has_no_baseline_is_reported_and_passes(run, capsys):
    run({"forward": math.inf}, {"forward": math.inf})
    text = capsys.readouterr().out
    assert f"instructions: 1 paths without a baseline for '{COUNTED}' are not checked" in text
    assert f"time / PyTorch's: 1 paths without a baseline for '{TIMED}' are not checked" in text


def test_without_valgrind_times_are_checked(run, capsys):
    run(None, {"forward": 0.5}, accept=True)
    assert "instructions are not counted, and not checked: valgrind is not installed" in capsys.readouterr().out
    with pytest.raises(typer.Exit):
        run(None, {"forward": 0.65})


def test_a_slow_path_is_measured_again(tmp_path, monkeypatch):
    """The command asks for another attempt where, and only where, one could change the verdict."""
    stored = Baselines(tmp_path / "baselines.json")
    stored.accept(TIME, TIMED, {"path": 1.0})
    monkeypatch.setattr(command, "ratios", lambda _, again: again)
    again = command.times(TIMED, stored, accept=False)
    assert again("path", 1.25)
    assert not again("path", 1.15)
    assert not again("new", 9.0)
    assert command.times(TIMED, stored, accept=True)("path", 0.5)


def test_counts_are_read_from_callgrinds_files(tmp_path):
    file = tmp_path / "counts.1"
    file.write_text("version: 1\ndesc: Trigger: Client Request: host: module, training\nevents: Ir\n\ntotals: 1234\n")
    assert read(file) == ("host: module, training", 1234)
    file.write_text("desc: Trigger: Program termination\ntotals: 1\n")
    with pytest.raises(UncountableError, match="no count"):
        read(file)
