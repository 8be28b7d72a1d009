"""The check of a GPU: what becomes of steps that crash, hang or are wrong, what a later call does, and the verdict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import ROOT
from typer.testing import CliRunner

from benchmarks import cli, cli_gpu_check
from benchmarks.gpu_check import check, results, supervise, verdict
from benchmarks.gpu_check.case import Setting
from benchmarks.gpu_check.check import Check
from benchmarks.gpu_check.results import StepResult
from benchmarks.gpu_check.steps import STEPS, Step, for_backends
from benchmarks.gpu_check.supervise import Limits, run_step

ENVIRONMENT = Step("environment", "gpu_check_steps:environment", 1.0, always=True)
LIMITS = Limits(60.0, 60.0, 30.0)


def step(name: str, **options: Any) -> Step:
    return Step(name, f"gpu_check_steps:{name}", 1.0, **options)


def run_one(folder: Path, name: str, limits: Limits = LIMITS) -> StepResult:
    setting = Setting("cpu", False, str(folder))
    return run_step(f"gpu_check_steps:{name}", setting, StepResult(name), limits, folder, lambda *_: None)


def run_all(folder: Path, *steps: Step, seconds: float = 60.0, **options: Any) -> Check:
    setting = Setting("cpu", False, str(folder))
    nothing = lambda *_: None  # noqa: E731
    return check.run(setting, seconds, nothing, nothing, steps=[ENVIRONMENT, *steps], **options)


def statuses(result: StepResult) -> dict[str, str]:
    return {name: case.status for name, case in result.cases.items()}


# ---- one step --------------------------------------------------------------------------------------------------------


def test_a_good_step(tmp_path):
    result = run_one(tmp_path, "good")
    assert (result.status, result.summary) == ("passed", "2 cases, as they should be")
    assert "printed" in (tmp_path / "good.log").read_text()
    assert json.loads((tmp_path / "good.json").read_text())["status"] == "passed"


def test_a_crash_is_a_failed_case_and_the_others_go_on(tmp_path):
    result = run_one(tmp_path, "crashes")
    assert statuses(result) == {"before": "passed", "abort": "failed", "after": "passed"}
    assert result.status == "failed"
    assert result.cases["abort"].message == "was ended by SIGABRT"
    assert "Fatal Python error: Aborted" in result.cases["abort"].output
    assert "before" not in result.cases["abort"].output  # the log of that case alone


def test_a_hang_is_a_failed_case_and_the_others_go_on(tmp_path):
    result = run_one(tmp_path, "hangs", replace(LIMITS, case=0.4))
    assert statuses(result) == {"before": "passed", "hang": "failed", "after": "passed"}
    assert result.cases["hang"].message == "no answer within 0 s"
    assert "gpu_check_steps.py" in result.cases["hang"].output or "worker.py" in result.cases["hang"].output


def test_a_wrong_result_is_a_failed_case_with_its_traceback(tmp_path):
    result = run_one(tmp_path, "differs")
    assert statuses(result) == {"right": "passed", "dx": "failed", "after": "passed"}
    assert result.summary == "dx: AssertionError: dx differs in 3 of 9 values"
    assert 'raise AssertionError("dx differs' in result.cases["dx"].output


def test_a_lost_device_gets_a_new_process(tmp_path):
    result = run_one(tmp_path, "loses_the_device")
    assert statuses(result) == {"illegal": "failed", "after": "passed"}
    assert (tmp_path / "loses_the_device.log").read_text().count("---") == 2


def test_a_step_that_only_crashes_is_given_up(tmp_path):
    result = run_one(tmp_path, "always_crashes")
    assert len(result.cases) == supervise.MOST_LOSSES
    assert result.problem == "given up after 5 crashes, 15 cases were not tried"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("broken", "ended with status 1: ValueError: the step itself is broken"),
        ("dies_at_its_end", "ended with status 7"),
    ],
)
def test_a_process_that_fails_outside_of_a_case(tmp_path, name, problem):
    result = run_one(tmp_path, name)
    assert result.status == "failed"
    assert result.problem.startswith(f"the step's process {problem}")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_stays_behind_where_the_check_is_killed(tmp_path):
    program = f"""
from pathlib import Path
from test_gpu_check import run_one
run_one(Path({str(tmp_path)!r}), "lingers")
"""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    check = subprocess.Popen([sys.executable, "-c", program], env=variables)
    try:
        numbers = [int(_content(tmp_path / name)) for name in ("worker", "child")]
    finally:
        check.kill()
        check.wait()
    for _ in range(100):
        if not any(_lives(number) for number in numbers):
            return
        time.sleep(0.1)
    raise AssertionError(f"of {numbers} some live")


def _content(path: Path) -> str:
    """Of a file that is about to be written."""
    for _ in range(600):
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.1)
    raise AssertionError(f"no {path}")


def _lives(number: int) -> bool:
    """Whether there is such a process, and not only what init has not yet taken note of."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_step_that_has_no_meaning_here(tmp_path):
    result = run_one(tmp_path, "left_out")
    assert (result.status, result.summary) == ("skipped", "the tool is missing")


def test_time_that_is_over_cuts_what_need_not_be_done(tmp_path):
    cut = run_one(tmp_path, "extras", Limits(enough=60.0, step=0.8, case=30.0))
    assert cut.status == "passed"
    assert 2 <= len(cut.cases) < 8
    assert f"{8 - len(cut.cases)} more had no time" in cut.summary
    hopeless = run_one(tmp_path, "hangs", Limits(enough=0.5, step=0.0, case=30.0))
    assert (hopeless.status, hopeless.failures) == ("incomplete", {})
    assert hopeless.summary == "1 of 3 cases done: its time was over"


# ---- all steps -------------------------------------------------------------------------------------------------------


def test_each_step_of_each_backend(tmp_path):
    found = run_all(tmp_path, step("good", per_backend=True), step("differs"), step("left_out"))
    assert [(each.name, each.status) for each in found.steps] == [
        ("environment", "passed"), ("backend three", "skipped"), ("good-one", "passed"), ("good-two", "passed"),
        ("differs", "failed"), ("left_out", "skipped"),
    ]  # fmt: skip


def test_a_later_call_runs_what_failed_and_what_is_missing(tmp_path):
    runs = tmp_path / "runs"
    first = run_all(tmp_path, step("counted"))
    assert first.steps[-1].status == "failed"
    assert runs.read_text().split() == ["first", "second", "third"]
    (tmp_path / "mended").touch()
    stored = json.loads((tmp_path / "counted.json").read_text())
    del stored["cases"]["third"]  # as if the call had been cut off there
    (tmp_path / "counted.json").write_text(json.dumps(stored))
    second = run_all(tmp_path, step("counted"))
    assert runs.read_text().split()[3:] == ["second", "third"]
    assert (second.steps[-1].status, second.steps[-1].summary) == ("passed", "3 cases, 1 of them by an earlier call")
    third = run_all(tmp_path, step("counted"))
    assert len(runs.read_text().split()) == 5
    assert third.steps[-1].status == "passed"


def test_nothing_is_taken_from_other_sources_nor_by_a_fresh_call(tmp_path, monkeypatch):
    (tmp_path / "mended").touch()
    calls = [lambda: run_all(tmp_path, step("counted")) for _ in range(2)]
    for call in calls:
        call()
        monkeypatch.setattr(results, "SOURCES", ("Makefile",))
    run_all(tmp_path, step("counted"), fresh=True)
    assert (tmp_path / "runs").read_text().split() == ["first", "second", "third"] * 3


def test_a_step_that_failed_outside_of_its_cases_fails_again(tmp_path):
    for _ in range(2):
        found = run_all(tmp_path, step("dies_at_its_end"))
        assert statuses(found.steps[-1]) == {"registers": "passed"}
        assert found.steps[-1].status == "failed"


def test_a_broken_file_of_results_counts_for_nothing(tmp_path):
    (tmp_path / "counted.json").write_text('{"key": "')
    (tmp_path / "mended").touch()
    assert run_all(tmp_path, step("counted")).steps[-1].status == "passed"


def test_a_step_without_time_and_one_for_other_devices(tmp_path):
    only_gpus = step("good", kinds=("cuda",), otherwise="not on a CPU")
    found = run_all(tmp_path, only_gpus, step("hangs"), step("good", least=0.0), seconds=2.0)
    assert [(each.status, each.summary) for each in found.steps[-3:]] == [
        ("skipped", "not on a CPU"), ("incomplete", "1 of 3 cases done: its time was over"),
        ("incomplete", "no case done: no time was left"),
    ]  # fmt: skip


def test_time_is_left_to_the_steps_behind():
    assert sum(each.least for each in for_backends(STEPS, ["triton", "cuda"])) < 0.7


# ---- the verdict -----------------------------------------------------------------------------------------------------


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    def call(*steps: Step, arguments: tuple[str, ...] = ()) -> Any:
        monkeypatch.setattr(cli_gpu_check, "STEPS", [ENVIRONMENT, *steps])
        return CliRunner().invoke(cli.app, ["gpu-check", "--device", "cpu", "--out", str(tmp_path), *arguments])

    return call


def test_all_passed(invoke, tmp_path):
    result = invoke(step("good"), step("left_out"))
    assert result.exit_code == 0, result.output
    assert "All 2 steps passed on a device, 2 skipped for the reasons above." in result.output
    assert json.loads((tmp_path / "summary.json").read_text())["passed"] is True


def test_some_failed(invoke, tmp_path):
    result = invoke(step("crashes"), step("differs"), step("good"))
    assert result.exit_code == 1
    assert "2 of 5 steps FAILED on a device: crashes, differs. Please send us" in result.output
    summary = (tmp_path / "summary.md").read_text()
    assert "**abort**: was ended by SIGABRT" in summary
    assert "Fatal Python error: Aborted" in summary
    assert '"torch": "9.9"' in summary
    facts = json.loads((tmp_path / "summary.json").read_text())
    assert facts["passed"] is False
    assert [each["name"] for each in facts["steps"] if each["failures"]] == ["crashes", "differs"]


def test_some_had_no_time(invoke):
    result = invoke(step("hangs"), arguments=("--seconds", "2"))
    assert result.exit_code == 1
    assert "Nothing failed on a device, but there was no time for hangs." in result.output


def test_a_device_that_cannot_be_used(tmp_path):
    setting, nothing = Setting("cpu", False, str(tmp_path)), lambda *_: None
    steps = [Step("environment", "gpu_check_steps:no_backends", 1.0, always=True), step("good")]
    found = check.run(setting, 60.0, nothing, nothing, steps=steps)
    assert [each.status for each in found.steps] == ["failed"]
    assert "1 of 1 steps FAILED on a device: environment" in verdict.sentence(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--device", "nowhere"], "nowhere"), (["--device", "cpu", "--step", "speed"], "unknown 'speed'; known are")],
)
def test_bad_arguments(arguments, message):
    result = CliRunner().invoke(cli.app, ["gpu-check", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_without_an_accelerator_the_cpu_must_be_asked_for(monkeypatch):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: None)
    result = CliRunner().invoke(cli.app, ["gpu-check"])
    assert result.exit_code == 2
    assert "PyTorch finds no accelerator here" in " ".join(result.output.split())


# ---- the real steps --------------------------------------------------------------------------------------------------


def test_every_step_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads of small tensors wait for each other most of the time
    result = CliRunner().invoke(cli.app, ["gpu-check", "--device", "cpu", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    steps = {each["name"]: each["status"] for each in json.loads((tmp_path / "summary.json").read_text())["steps"]}
    left_out = {"large-cpu", "graphs-cpu", "sanitizer-cpu"}
    assert {name for name, status in steps.items() if status == "skipped"} == left_out
    names = {each.name for each in for_backends(STEPS, ["cpu"])}
    assert {name for name, status in steps.items() if status == "passed"} == names - left_out
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert "| forward+backward | bfloat16 |" in (tmp_path / "summary.md").read_text().partition("## Measured")[2]
