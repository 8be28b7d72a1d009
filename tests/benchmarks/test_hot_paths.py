"""The check of the hot paths' speed, on counts that only the test changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from support.processes import python_output

from benchmarks.hot_paths import check as command
from benchmarks.hot_paths.baselines import Baselines
from benchmarks.hot_paths.instructions import UncountableError, read
from benchmarks.hot_paths.paths import PATHS

MACHINE = "machine avx2"


@pytest.mark.parametrize(("factor", "too_much"), [(0.5, False), (1.0, False), (1.09, False), (1.11, True), (1.3, True)])
def test_limit(tmp_path: Path, factor: float, too_much: bool) -> None:
    Baselines(tmp_path / "baselines.json").accept("here", {"path": 200.0})
    (growth,) = Baselines(tmp_path / "baselines.json").compare("here", {"path": 200.0 * factor})
    assert growth.too_much == too_much
    assert growth.factor == pytest.approx(factor)


def test_accepting_leaves_other_machines_alone(tmp_path: Path) -> None:
    file = tmp_path / "baselines.json"
    Baselines(file).accept("there", {"path": 1.0})
    Baselines(file).accept("here", {"gone": 1.0})
    Baselines(file).accept("here", {"path": 2.00004})
    before = {where: Baselines(file).compare(where, {"path": 1.0, "gone": 1.0}) for where in ("here", "there", "new")}
    found = {where: [growth.before for growth in rows] for where, rows in before.items()}
    assert found == {"here": [2.0, None], "there": [1.0, None], "new": [None, None]}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs the command on counts that are given, and a file of baselines of its own."""
    file = tmp_path / "baselines.json"
    monkeypatch.setattr(command, "Baselines", lambda: Baselines(file))
    monkeypatch.setattr(command, "machine_of", lambda instruction_set: f"machine {instruction_set}")

    def run(counts: dict[str, float], accept: bool = False) -> None:
        monkeypatch.setattr(command, "count", lambda: ("avx2", counts))
        command.check(accept)

    return run


def test_what_is_as_fast_as_its_baseline_passes(run, capsys):
    run({"forward": 1000.0}, accept=True)
    run({"forward": 1050.0})
    run({"forward": 500.0})
    assert "without a baseline" not in capsys.readouterr().out


def test_what_is_slower_fails_and_says_what_to_do(run, capsys):
    run({"forward": 1000.0, "backward": 1000.0}, accept=True)
    slower = {"forward": 1300.0, "backward": 1000.0}
    with pytest.raises(typer.Exit) as ended:
        run(slower)
    assert ended.value.exit_code == 1
    message = capsys.readouterr().err
    said = "forward: 1,300 instructions, 1.30 times the baseline's 1,000; at most 1.1"
    assert said in message and "make speed-baselines" in message and "backward" not in message
    run(slower, accept=True)
    run(slower)


def test_what_has_no_baseline_is_reported_and_passes(run, capsys):
    run({"forward": 1e9})
    assert f"1 paths without a baseline for '{MACHINE}' are not checked" in capsys.readouterr().out


def test_what_cannot_be_counted_fails(monkeypatch, capsys):
    def count():
        raise UncountableError("valgrind is not installed")

    monkeypatch.setattr(command, "count", count)
    with pytest.raises(typer.Exit):
        command.check(False)
    assert "nothing is checked: valgrind is not installed" in capsys.readouterr().err


EVERY_PATH = """
from benchmarks.hot_paths.paths import PATHS
for path in PATHS:
    with path.within():
        path.make()()
print(len(PATHS))
"""


def test_every_path_runs() -> None:
    """In a process of its own: the launches that are stubbed leave plans behind."""
    assert int(python_output(EVERY_PATH)) == len(PATHS) > 20


def test_counts_are_read_from_callgrinds_files(tmp_path: Path) -> None:
    file = tmp_path / "counts.1"
    file.write_text("version: 1\ndesc: Trigger: Client Request: host: module, training\nevents: Ir\n\ntotals: 1234\n")
    assert read(file) == ("host: module, training", 1234)
    file.write_text("desc: Trigger: Program termination\ntotals: 1\n")
    with pytest.raises(UncountableError, match="no count"):
        read(file)
