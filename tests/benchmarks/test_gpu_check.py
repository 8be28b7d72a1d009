"""The check of a device by pytest: what becomes of tests that crash, hang or are wrong, later calls, the verdict."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gpu_check
import pytest
import torch
from support.processes import ROOT, python_path

from benchmarks.gpu_day import facts

pytest_plugins = ["pytester"]

GOOD = """
def test_a(device):
    print("printed")

def test_b(device):
    assert device == "cpu"
"""
TROUBLE = """
import os, time
import gpu_check, pytest

lost = []  # in this process

@pytest.fixture(autouse=True)
def _works():
    assert not lost

def test_before(device): pass

def test_aborts(device): os.abort()

@pytest.mark.patience(0.1)
def test_hangs(device): time.sleep(600)

def test_differs(device):
    print("on the way")
    raise AssertionError("dx differs in 3 of 9 values")

def test_loses_the_device(device):
    lost.append(1)
    gpu_check.is_usable = lambda _: not lost
    raise RuntimeError("an illegal memory access was encountered")

def test_needs_a_tool(device): pytest.skip("the tool is missing")

@pytest.mark.facts
def test_fact(device, record_property): record_property("driver", {"version": "9.9"})

def test_elsewhere(): raise AssertionError("it takes no device")

@pytest.mark.parametrize("device", ["a name"])
def test_of_another_device(device): raise AssertionError("it is no fixture")

def test_after(device): pass
"""


class Said(NamedTuple):
    status: int
    output: str
    folder: Path

    @property
    def verdict(self) -> str:
        return self.summary.splitlines()[2]

    @property
    def summary(self) -> str:
        return (self.folder / "record.md").read_text()

    @property
    def passed(self) -> list[str]:
        """Tests that are recorded, without their files."""
        lines = (self.folder / "record.jsonl").read_text().splitlines()[1:]
        return [json.loads(line).partition("::")[2] for line in lines]


@pytest.fixture(autouse=True)
def _found_by_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", python_path())


def run(pytester: pytest.Pytester, program: str, *options: str, workers: int = 0) -> Said:
    """Runs a file of tests as the check does, in this process or one of its own."""
    pytester.makepyfile(test_it=program)
    folder = pytester.path
    ended = pytester.runpytest_inprocess(
        "-ra", "-pgpu_check", f"-n{workers}", "--device=cpu", f"--record={folder}/record.jsonl", *options, "test_it.py"
    )
    return Said(int(ended.ret), ended.stdout.str() + ended.stderr.str(), folder)


# ---- one call --------------------------------------------------------------------------------------------------------


REASONS = {
    "test_aborts": ["crashed while running", "Fatal Python error: Aborted", "in test_aborts"],
    "test_hangs": ["crashed while running", "Timeout (0:00:00.400000)!", "in test_hangs"],
    "test_differs": ["AssertionError: dx differs in 3 of 9 values", "on the way"],
    "test_loses_the_device": ["an illegal memory access was encountered"],
}


def test_a_crash_a_hang_and_a_lost_device_are_failed_tests_and_the_others_go_on(pytester: pytest.Pytester) -> None:
    said = run(pytester, TROUBLE, "--max-worker-restart=4", "--maxschedchunk=1", workers=1)
    assert said.status == 1
    assert sorted(said.passed) == ["test_after", "test_before", "test_fact"]
    assert said.verdict.startswith("4 of 8 tests FAILED on cpu: test_aborts; ")
    send = f" Please send us {said.folder}/record.md. The same command runs again what failed."
    assert said.verdict.endswith(send)
    assert said.verdict in said.output
    assert "| test_it.py | 3 | 4 | 1 | 0 |" in said.summary
    assert '{\n "driver": {\n  "version": "9.9"\n }\n}\n```\n' in said.summary
    assert "the tool is missing" in said.output
    told = dict(part.split("**", 1) for part in said.summary.partition("## The")[0].split("**test_it.py::")[1:])
    assert told.keys() == REASONS.keys()
    for name, words in REASONS.items():
        assert [word for word in words if word not in told[name]] == []
        others = [word for other in REASONS if other != name for word in REASONS[other]]
        assert [word for word in others if word in told[name] and word not in words] == []


def test_what_only_crashes_is_given_up(pytester: pytest.Pytester) -> None:
    program = """
        import os, pytest
        @pytest.mark.parametrize("i", range(20))
        def test_it(device, i): os.abort()
    """
    said = run(pytester, program, "--max-worker-restart=1", workers=1)
    assert said.status == 1
    assert said.verdict.startswith("2 of 20 tests FAILED on cpu: test_it[0]; test_it[")
    assert "| test_it.py | 0 | 2 | 0 | 18 |" in said.summary


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_read_is_no_success(pytester: pytest.Pytester, workers: int) -> None:
    said = run(pytester, "raise ValueError('the file itself is broken')", workers=workers)
    assert said.status != 0
    assert "1 of 0 tests FAILED on cpu: test_it.py." in said.verdict
    assert "the file itself is broken" in said.summary


def test_no_tests_are_no_success(pytester: pytest.Pytester) -> None:
    said = run(pytester, "def test_elsewhere(): pass")
    assert (said.status, said.verdict) == (1, "No test was run on cpu: nothing is known.")


def test_all_passed_and_nothing_runs_again_but_facts(pytester: pytest.Pytester) -> None:
    fact = "import pytest\n@pytest.mark.facts\ndef test_fact(device, record_property): record_property('a', 1)\n"
    verdict = "All 3 tests passed on cpu. Every test works; a CPU says nothing about a GPU."
    for passed in ("3 passed", "1 passed"):
        said = run(pytester, fact + GOOD)
        assert (said.status, said.verdict) == (0, verdict)
        assert passed in said.output
        assert '"a": 1' in said.summary
    assert said.passed == ["test_a", "test_b", "test_fact"]


# ---- later calls -----------------------------------------------------------------------------------------------------

COUNTED = """
import pathlib, pytest
FOLDER = pathlib.Path(__file__).parent

@pytest.mark.parametrize("name", ["first", "second", "third"])
def test_it(device, name):
    with (FOLDER / "runs").open("a") as file:
        file.write(name + "\\n")
    assert name != "second" or (FOLDER / "mended").exists()
"""


def test_a_later_call_runs_what_failed_and_what_is_missing(pytester: pytest.Pytester) -> None:
    def runs() -> list[str]:
        path = pytester.path / "runs"
        found = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return found

    first = run(pytester, COUNTED)
    assert (first.status, runs()) == (1, ["first", "second", "third"])
    (pytester.path / "mended").touch()
    record = pytester.path / "record.jsonl"
    head, done, _ = record.read_text().splitlines()
    record.write_text(f'{head}\n{done}\n"test_it.py::te')  # as if the call had been cut off there
    second = run(pytester, COUNTED, workers=1)
    assert (second.status, runs()) == (0, ["second", "third"])
    assert second.verdict.startswith("All 3 tests passed on cpu")
    third = run(pytester, COUNTED)
    assert (third.status, runs()) == (0, [])
    assert third.verdict == second.verdict
    run(pytester, COUNTED, "--fresh")
    assert runs() == ["first", "second", "third"]
    record.write_text(record.read_text().replace('"key": "', '"key": "of other sources '))
    run(pytester, COUNTED)
    assert runs() == ["first", "second", "third"]


SLOW = """
import time, pytest

@pytest.mark.parametrize("i", range(8))
def test_it(device, i): time.sleep(0.3 * (i > 0))
"""


def test_time_that_is_over_is_told_and_a_later_call_goes_on(pytester: pytest.Pytester) -> None:
    goes_on = "The same command goes on where this one stopped."
    said = run(pytester, SLOW, "--seconds=0", workers=1)
    assert (said.status, said.verdict) == (1, f"Nothing failed on cpu, but 8 of 8 tests had no time. {goes_on}")
    said = run(pytester, SLOW, "--seconds=1")
    assert said.status == 1
    left = 8 - len(said.passed)
    assert 0 < left < 8
    assert said.verdict == f"Nothing failed on cpu, but {left} of 8 tests had no time. {goes_on}"
    assert run(pytester, SLOW).verdict.startswith("All 8 tests passed")


def test_what_decides_comes_first_and_what_only_adds_to_it_is_not_missed(pytester: pytest.Pytester) -> None:
    wait = "def test_it(device): import time; time.sleep(1.1)"
    pytester.makepyfile(test_random_options="def test_it(device): assert False", test_options=wait, test_machine=GOOD)
    files = "test_random_options.py", "test_options.py", "test_machine.py"
    said = run(pytester, "", "--seconds=1", *files)
    assert said.status == 0, said.output
    assert "| test_random_options.py | 0 | 0 | 0 | 1 |" in said.summary
    assert said.passed == ["test_a", "test_b", "test_it"]


# ---- devices ---------------------------------------------------------------------------------------------------------


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(name: str | None) -> Callable[..., torch.device | None]:
        return lambda **_: None if name is None else torch.device(name)

    monkeypatch.setattr("torch.accelerator.current_accelerator", here(None))
    assert gpu_check.device_named("cpu") == "cpu"
    for name, message in (
        ("auto", "PyTorch finds no accelerator here; --device cpu"),
        ("nowhere", "nowhere"),
        ("cuda", "PyTorch finds no such device here, but the CPU"),
    ):
        with pytest.raises(pytest.UsageError, match=message):
            gpu_check.device_named(name)
    monkeypatch.setattr("torch.accelerator.current_accelerator", here("cuda"))
    assert [gpu_check.device_named(name) for name in ("auto", "cuda:1", "cpu")] == ["cuda", "cuda:1", "cpu"]


def test_a_device_that_raises_is_unusable() -> None:
    assert gpu_check.is_usable(torch.device("cpu"))
    assert not gpu_check.is_usable(torch.device("meta"))


def test_a_device_without_kernels_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert facts.usable_backends("cpu")["usable"]
    monkeypatch.setattr(facts, "KERNELS", ())
    with pytest.raises(AssertionError, match="no kernels for cpu"):
        facts.usable_backends("cpu")
    with pytest.raises(ValueError, match="cannot be used here"):
        facts.device("cuda:77")


def test_every_test_of_a_gpu_runs_on_the_cpu(tmp_path: Path) -> None:
    """Some of those that take a device, by the command of the Makefile; a GPU day runs each kind of launch."""
    command = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "--device=auto" in line)
    words = command.replace("$(GPU_CHECK_ARGS)", "").split()[1:]
    options = ["--device=cpu", f"--record={tmp_path}/record.jsonl", "--seconds=40", "-p", "no:cacheprovider"]
    few = ["-k", "machine or (at_once and rows) or finds_nothing or (halves and contiguous) or replay"]
    ended = subprocess.run(
        [sys.executable, *words, *options, *few], cwd=ROOT, capture_output=True, text=True, check=False
    )
    said = Said(ended.returncode, ended.stdout + ended.stderr, tmp_path)
    assert said.status == 0, said.output
    assert "tests passed on cpu" in said.verdict
    for file in ("machine", "options", "streams"):
        assert f"on_gpu/test_{file}.py::" in (tmp_path / "record.jsonl").read_text()
    assert '"usable"' in said.summary
