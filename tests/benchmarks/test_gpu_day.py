"""The command for a rented GPU: what lies in the archive whenever it is ended, and what each part of it finds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import python_output, python_path
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.gpu_day import (
    archive,
    checks,
    clocks,
    day,
    journal,
    kernels,
    ready,
    results,
    sources,
    speed,
    table,
)
from benchmarks.gpu_day.results import StepResult
from benchmarks.gpu_day.risky import forget, risky
from benchmarks.gpu_day.step_api import Setting, SkippedError
from benchmarks.gpu_day.steps import STEPS, Step
from benchmarks.layers.cases import Case
from benchmarks.network.model import task_specific_network
from benchmarks.profile import ncu
from benchmarks.profile.compile_offline import compile_call, specialize
from benchmarks.records.workloads import Layer
from tsbn_kernels.backends.plan import DEVICES

CPU = torch.device("cpu")
LAYER = Case(Layer.of(8, (6, 5)), 3, 4, "float32", "contiguous", CPU, workload="celeba40")


def setting(folder: Path) -> Setting:
    return Setting("cpu", True, str(folder))


def members(folder: Path) -> dict[str, bytes]:
    """The files of an archive, read to their ends."""
    with tarfile.open(folder / archive.NAME) as found:
        return {Path(one.name).name: found.extractfile(one).read() for one in found.getmembers()}


# ---- the day ---------------------------------------------------------------------------------------------------------


WITHIN_ONE_PROCESS = """
import json
from dataclasses import asdict
from benchmarks.commands import app
from benchmarks.gpu_day import day, worker

def run_worker(step, setting, key, deadline, log, keep):
    worker.main(step.name, step.cases, key, "170", json.dumps(asdict(setting)))
    return 0

worker._end_with_the_caller = lambda: None
day._run_worker = run_worker
app.app(["gpu-day", "--device", "cpu", "--seconds", "500", "--out", {folder!r}])
"""


def test_all_of_it_on_the_cpu(tmp_path):
    """Its steps in one process, for each would import all again; that each has its own is seen in the tests below."""
    said = python_output(WITHIN_ONE_PROCESS.format(folder=str(tmp_path)), TORCHINDUCTOR_COMPILE_THREADS="1")
    found = members(tmp_path)
    lines = [json.loads(line) for line in found["records.jsonl"].splitlines()]
    for step in ("ready", "ceilings", "speed", "network", "launches", "float32"):
        cases = {line["case"]: line["status"] for line in lines if line["kind"] == "case" and line["step"] == step}
        assert "passed" in cases.values(), step
        assert {*cases.values()} <= {"passed", "skipped"}, step
    assert "tests passed on cpu" in found["launches.md"].decode()
    assert {line["kind"] for line in lines} >= {"ceiling", "host", "speed", "layers", "network"}
    assert {line["entrant"] for line in lines if line["kind"] == "speed"} >= {"cpu", "loop", "folded"}
    assert said.rstrip().endswith("MiB")
    assert "bn4,bn5 bfloat16 contiguous: " in found["table.txt"].decode()


PROGRAM = """
import sys
from pathlib import Path
from benchmarks.commands import gpu_day
from benchmarks.gpu_day.steps import Step
gpu_day.STEPS = [Step(name, f"support.day_steps:{name}", 60.0) for name in ("good", "hangs")]
gpu_day.gpu_day(Path(sys.argv[1]), float(sys.argv[2]), "cpu", None)
"""


def started(folder: Path, seconds: float, program: str = PROGRAM) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, str(folder), str(seconds)]
    variables = {**os.environ, "PYTHONPATH": python_path(), "TMPDIR": str(folder)}
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_whenever_it_is_ended_the_archive_is_whole_and_a_later_call_goes_on(tmp_path, how):
    process = started(tmp_path, 300)
    while not any("--- hang" in log.read_text() for log in tmp_path.glob("*/hangs.log")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, how)
    said, _ = process.communicate(timeout=60)
    found = members(tmp_path)
    done = [json.loads(line) for line in found["records.jsonl"].splitlines()]
    assert {line["case"] for line in done if line.get("status") == "passed"} >= {"a", "b"}
    assert (f"{archive.NAME}: 0.00 MiB" in said) == ("table.txt" in found) == (how == signal.SIGTERM)
    said, _ = started(tmp_path, day.LEAST + 2).communicate(timeout=60)
    assert "passed     good: 2 cases, 2 of them by an earlier call" in said
    assert "incomplete hangs: 1 of 3 cases done: its time was over" in said


def run(folder: Path, *steps: Step) -> list[StepResult]:
    return day.run(setting(folder), folder / archive.NAME, 100.0, steps, lambda _: None)


def step(name: str, seconds: float = 60.0, case_seconds: float = 30.0) -> Step:
    return Step(name, f"support.day_steps:{name}", seconds, case_seconds)


def statuses(result: StepResult) -> dict[str, str]:
    return {name: case.status for name, case in result.cases.items()}


def test_what_has_a_meaning_on_a_gpu_alone_is_named(tmp_path):
    steps = [step for step in STEPS if step.gpu]
    assert [step.name for step in steps] == ["sweep-kernels", "checks", "counters", "memcheck"]
    for found in run(tmp_path, *steps):
        assert (found.status, found.summary) == ("skipped", f"{found.name} has a meaning on a GPU alone")
    assert [step.name for step in STEPS[:4]] == ["ready", "ceilings", "speed", "network"]
    assert sum(step.seconds for step in STEPS[:4]) < 480


def test_crashes_hangs_and_errors_are_failed_cases_and_the_others_go_on(tmp_path):
    names = "good", "crashes", "hangs", "differs", "loses_the_device", "always_crashes", "broken", "dies_at_its_end"
    steps = [step(name, case_seconds=0.2 if name == "hangs" else 30.0) for name in (*names, "left_out")]
    found = {result.name: result for result in run(tmp_path, *steps)}
    assert [result.status for result in found.values()] == ["passed"] + ["failed"] * 7 + ["skipped"]
    assert "printed" in (tmp_path / "good.log").read_text()
    for name, case, message in (
        ("crashes", "abort", "was ended by SIGABRT: Fatal Python error: Aborted"),
        ("hangs", "hang", "ended with status 1: Timeout (0:00:00.800000)!"),
        ("differs", "dx", "AssertionError: dx differs in 3 of 9 values"),
        ("loses_the_device", "illegal", "RuntimeError: an illegal memory access was encountered"),
    ):
        assert set(statuses(found[name]).values()) == {"passed", "failed"}
        assert {each: result.message for each, result in found[name].failures.items()} == {case: message}
        assert list(found[name].cases)[-1] == "after"
    assert 'raise AssertionError("dx differs' in (tmp_path / "differs.log").read_text()
    assert "in attempt" in (tmp_path / "hangs.log").read_text()  # where it hung
    assert len(found["always_crashes"].cases) == day.MOST_LOSSES
    assert found["always_crashes"].problem == "given up after 5 crashes, 15 cases were not tried"
    wrong = "the step's process ended with status"
    assert found["broken"].problem == f"{wrong} 1: ValueError: the step itself is broken"
    assert found["dies_at_its_end"].problem.startswith(f"{wrong} 7")
    assert found["left_out"].summary == "the tool is missing"


def test_a_step_is_ended_with_all_that_it_has_started(tmp_path):
    lingering = run(tmp_path, step("lingers", seconds=1.5), step("good"))
    assert [result.status for result in lingering] == ["incomplete", "passed"]
    assert lingering[0].summary == "0 of 1 cases done: its time was over"
    assert not any(_lives(int((tmp_path / name).read_text())) for name in ("worker", "child"))


def test_what_runs_when_the_time_of_its_step_is_over_has_ended_no_process(tmp_path, monkeypatch):
    """Else a backend that two steps had no time for would be left alone by all that follow."""

    within = []  # and never left, as where the process is ended

    def cut_off(*_: Any) -> None:
        within.append(risky("cuda", tmp_path, CPU))
        within[-1].__enter__()

    monkeypatch.setattr(day, "_run_worker", cut_off)
    for _ in range(3):
        assert day.run_step(step("good"), setting(tmp_path), "key", 1.0, lambda: None).reason == "its time was over"
    with risky("cuda", tmp_path, CPU):
        pass


@pytest.mark.parametrize("damage", ["cut off", "changed", "no archive"])
def test_a_damaged_archive_is_put_aside_and_the_day_goes_on(tmp_path, capsys, damage):
    assert run(tmp_path, step("counted"))[0].status == "failed"
    home = tmp_path / archive.NAME
    content = home.read_bytes()
    middle = len(content) // 2
    changed = content[:middle] + bytes(255 - byte for byte in content[middle : middle + 99]) + content[middle + 99 :]
    damaged = {"cut off": content[:middle], "changed": changed, "no archive": b"something else"}[damage]
    home.write_bytes(damaged)
    with tempfile.TemporaryDirectory() as folder:
        archive.unpack(home, Path(folder))
    assert "the archive of an earlier call is damaged" in capsys.readouterr().out
    assert (tmp_path / f"damaged-{archive.NAME}").read_bytes() == damaged
    assert run(tmp_path, step("good"))[0].status == "passed"
    assert "records.jsonl" in members(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_stays_behind_where_the_day_is_killed(tmp_path):
    program = PROGRAM.replace('("good", "hangs")', '("lingers",)')
    process = started(tmp_path, 300, program)
    found: list[Path] = []
    while len(found) < 2:
        time.sleep(0.05)
        found = [path for name in ("worker", "child") for path in tmp_path.glob(f"*/{name}") if path.read_text()]
    numbers = [int(path.read_text()) for path in found]
    process.kill()  # it alone
    process.wait()
    end = time.monotonic() + 10
    while any(map(_lives, numbers)):
        assert time.monotonic() < end, f"of {numbers} some live"
        time.sleep(0.1)


def _lives(number: int) -> bool:
    """Whether there is such a process, and not only what init has not yet taken note of."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_later_call_runs_what_failed_and_what_is_missing_and_all_of_other_sources(tmp_path, monkeypatch):
    def runs() -> list[str]:
        return (tmp_path / "runs").read_text().split()

    assert run(tmp_path, step("counted"))[0].status == "failed"
    assert runs() == ["first", "second", "third"]
    (tmp_path / "mended").touch()
    (found,) = run(tmp_path, step("counted"))
    assert runs()[3:] == ["second"]
    assert (found.status, found.summary) == ("passed", "3 cases, 2 of them by an earlier call")
    assert run(tmp_path, step("counted"))[0].summary == "3 cases, 3 of them by an earlier call"
    assert len(runs()) == 4
    monkeypatch.setattr(sources, "SOURCES", ("Makefile",))
    assert run(tmp_path, step("counted"))[0].summary == "3 cases"
    assert len(runs()) == 7


def test_a_case_that_was_cut_off_runs_again(tmp_path):
    note = {"step": "good", "key": "k"}
    journal.note(tmp_path, "step", **note)
    journal.note(tmp_path, "step", **note, planned=["a", "b"])
    journal.note(tmp_path, "case", **note, case="a", status="passed")
    journal.note(tmp_path, "case", **note, case="b", status="begun")
    found = results.read(tmp_path, "good", "k")
    assert (found.status, found.summary, found.running) == ("incomplete", "1 of 2 cases done", "b")
    journal.note(tmp_path, "step", **note)
    assert statuses(results.read(tmp_path, "good", "k")) == {"a": "passed"}
    assert results.read(tmp_path, "good", "other").cases == {}


WITHOUT_PYTEST = """
import sys
sys.modules["pytest"] = sys.modules["hypothesis"] = sys.modules["xdist"] = None
from benchmarks.commands import app
from benchmarks.gpu_day import ceilings, checks, counters, kernels, network, ready, speed, sweeping, worker
from on_gpu import calls, kinds, steps
print("imported")
"""


def test_measuring_needs_no_pytest():
    assert python_output(WITHOUT_PYTEST).split() == ["imported"]


def test_the_tests_of_a_gpu_need_pytest_and_say_what_failed(tmp_path, monkeypatch):
    with monkeypatch.context() as change:
        change.setattr(checks.importlib.util, "find_spec", lambda name: None if name == "xdist" else 1)
        with pytest.raises(SkippedError, match="the tests need xdist, not installed here"):
            checks.cases(setting(tmp_path))[0].run()

    def ended(command: list[str], status: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        (tmp_path / "memcheck.md").write_text("# The check\n\nWhat it says.\n")
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(checks.shutil, "which", lambda _: None)
    with pytest.raises(SkippedError, match="compute-sanitizer is not on the PATH"):
        checks.memcheck(setting(tmp_path))
    monkeypatch.setattr(checks.shutil, "which", lambda name: name)
    (memcheck,) = checks.memcheck(setting(tmp_path))
    monkeypatch.setattr(checks.subprocess, "run", ended)
    assert memcheck.run() == {"verdict": "What it says."}
    monkeypatch.setattr(checks.subprocess, "run", partial(ended, status=1))
    with pytest.raises(AssertionError, match="What it says"):
        memcheck.run()


def test_the_archive_stays_small(tmp_path):
    noise = torch.randint(0, 256, (20 << 20,), dtype=torch.uint8).numpy().tobytes()
    (tmp_path / "step.log").write_bytes(noise[: 2 << 20])
    for name in ("other", "third", "fourth"):
        (tmp_path / f"{name}.csv").write_bytes(noise)
    journal.note(tmp_path, "ceiling", copy=1.0)
    home = tmp_path / archive.NAME
    archive.write(tmp_path, home)
    assert home.stat().st_size < 16 << 20
    found = members(tmp_path)
    assert found["records.jsonl"] == (tmp_path / "records.jsonl").read_bytes()
    assert found["other.csv"] == noise[-archive.MOST_OF_A_FILE :]
    (tmp_path / "fourth.csv").unlink()
    archive.write(tmp_path, home)
    assert members(tmp_path)["step.log"] == noise[: 2 << 20][-archive.MOST_OF_A_LOG :]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    journal.note(tmp_path, "a", value=1)
    journal.note(tmp_path, "b", value=2)
    with (tmp_path / journal.FILE).open("a") as file:
        file.write('{"kind": "a", "va')
    assert journal.read(tmp_path, "a") == [{"kind": "a", "value": 1}]


def test_what_ends_processes_is_left_alone_after_the_second(tmp_path):
    for _ in range(3):
        with risky("good", tmp_path, CPU):
            pass
    with pytest.raises(ValueError, match="bad"), risky("good", tmp_path, CPU):
        raise ValueError("bad")
    within = [risky("cuda", tmp_path, CPU) for _ in range(2)]
    for each in within:
        each.__enter__()  # and never left, as where the process ends
    with pytest.raises(SkippedError, match="has ended 2 processes"):
        risky("cuda", tmp_path, CPU).__enter__()
    forget(tmp_path)
    with risky("cuda", tmp_path, CPU):
        pass


# ---- what is built, and the tools ------------------------------------------------------------------------------------


def test_a_failed_build_is_loud(tmp_path, monkeypatch):
    ran = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        ran.append((command[1:], {key: options["env"][key] for key in variables}))
        return subprocess.CompletedProcess(command, 0)

    variables = {"TORCH_CUDA_ARCH_LIST": "9.0", "TSBN_BUILD_CPU": "0", "TSBN_BUILD_CUDA": "1"}
    gpu = replace(setting(tmp_path), device="cuda")
    damaged = tmp_path / "tsbn_kernels" / "_cuda.so"
    damaged.parent.mkdir()
    damaged.touch()
    monkeypatch.setattr(ready, "ROOT", tmp_path)
    monkeypatch.setattr(ready.subprocess, "run", run)
    monkeypatch.setattr(ready, "capability", lambda _: (9, 0))
    monkeypatch.setattr(ready, "_missing", lambda names: ["_cuda"])
    with pytest.raises(AssertionError, match="not built: _cuda"):
        ready.build(gpu)
    assert ran == [(["setup.py", "build_ext", "--inplace"], variables)]
    assert not damaged.exists()  # else it would be newer than its sources
    monkeypatch.setattr(ready, "_missing", lambda names: [])
    assert ready.build(gpu) == {"carried": ("_native", "_cuda")}


def test_a_library_that_does_not_load_is_missing(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", python_path())
    assert ready._missing(("_native",)) == []
    (tmp_path / "other.so").write_text("of another machine")
    monkeypatch.setenv("TSBN_NATIVE_LIBRARY", str(tmp_path / "other.so"))
    assert ready._missing(("_native",)) == ["_native"]
    assert "_native: the native library does not load: " in capfd.readouterr().out


def test_ncu_counts_between_the_marks_and_leaves_the_clocks_alone(tmp_path):
    words = ncu.command(None, tmp_path / "x.csv", ["python"]).split()
    assert words[words.index("--profile-from-start") + 1] == "off"
    assert words[words.index("--clock-control") + 1] == "none"
    assert "--kernel-name" not in words


# ---- the table -------------------------------------------------------------------------------------------------------


def test_the_table_tells_shares_of_the_copys_rate(tmp_path):
    case = {"workload": "celeba40", "layer": "bn1", "dtype": "bfloat16", "memory_format": "contiguous", "copy_ms": 3.0}
    for by, forward, both in (("eager", 9.0, 90.0), ("graph", 4.0, 10.0)):
        for pass_, ms in (("forward", forward), ("forward+backward", both)):
            journal.note(
                tmp_path, "speed", **case, entrant="triton", by=by, median_ms=ms, verified=True, **{"pass": pass_}
            )
    journal.note(tmp_path, "ceiling", copy=3.01e12, read=3.1e12, write=3.2e12)
    journal.note(tmp_path, "left out", **case, entrant="folded", why="out of memory")
    said = table.text(tmp_path, [StepResult("speed", problem="it failed")]).splitlines()
    assert said[0] == "TB/s: copy 3.01, read 3.1, write 3.2"
    assert said[2] == "bn1 bfloat16 contiguous: 3; triton 0.75/0.75 10"
    assert said[3] == "left out: folded of bn1 bfloat16 contiguous: out of memory"
    assert said[4] == "speed: failed, 0 s, it failed"


def test_the_table_names_plans_that_beat_the_rules(tmp_path):
    case = {"layer": "bn1", "dtype": "bfloat16", "format": "contiguous", "pass": "forward", "backend": "cuda"}
    plan = {"variant": "cluster", "tile": [1, 64], "resident": 9, "cluster": 8}
    measured = [("bn1", True, 1.0), ("bn1", False, 0.9), ("bn1", False, 1.1), ("bn2", True, 1.0), ("bn2", False, 0.99)]
    found = [
        case | {"layer": layer, "by_rule": rule, "ms": ms, "plan": plan | {"warps": round(100 * ms)}}
        for layer, rule, ms in measured
    ]
    found.append(case | {"by_rule": False, "failure": "it does not fit"})
    found.append(case | {"by_rule": False, "ms": 0.1, "plan": plan, "stand_in": "the operator of the CPU"})
    (tmp_path / "sweep.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    (said,) = table.text(tmp_path, []).splitlines()
    assert said.startswith("sweep: bn1 bfloat16 contiguous forward cuda: rule 1 ms, 0.9 by cluster")
    assert "90 warps" in said


def test_the_table_tells_what_was_counted(tmp_path):
    values = dict.fromkeys(ncu.METRICS, 4.0) | {ncu.SECONDS: 2e-3, ncu.READ: 3e9, ncu.WRITTEN: 1e9}
    journal.note(
        tmp_path, "counters", entrant="cuda", layer="bn4", memory_format="contiguous", kernel="slab" * 20, **values
    )
    wanted = f"ncu: cuda bn4 contiguous {'slab' * 10}: 4 GB, 2000 us, dram 4 %, 4 registers\n"
    assert table.text(tmp_path, []) == wanted


def test_a_record_that_is_not_understood_costs_no_other(tmp_path):
    journal.note(tmp_path, "counters", entrant="cuda")
    journal.note(tmp_path, "ceiling", copy=3e12, read=3e12, write=3e12)
    said = table.text(tmp_path, []).splitlines()
    assert said == ["the rest of this is not told: KeyError: 'layer'", "TB/s: copy 3, read 3, write 3"]


# ---- what runs beside ------------------------------------------------------------------------------------------------


def test_the_clocks_are_asked_for_until_the_end(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 1980 MHz\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(clocks, "SECONDS", 0.02)
    with clocks.Clocks(tmp_path):
        while (tmp_path / clocks.FILE).read_text().count("1980 MHz") < 2:
            time.sleep(0.02)
    assert (tmp_path / clocks.FILE).read_text().startswith("timestamp,name,pstate,clocks.sm")


class Driver:
    """Of an H100 that is not there."""

    def get_current_device(self) -> int:
        return 90  # Triton keeps what it learns of a device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)


def test_what_is_compiled_beforehand_is_what_a_launch_asks_for(tmp_path, monkeypatch):
    """Triton finds a kernel in its cache by this hash."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with kernels.on_paper(DEVICES["H100"]) as calls:
        kernels._layer(replace(LAYER, dtype="bfloat16"))
    assert [call.launch.kernel for call in calls] == ["forward_slab", "backward_slab"]
    compiled, _ = compile_call(calls[0], "sm_90")
    monkeypatch.setattr(driver, "_active", Driver())
    function, constants = calls[0].launch.function, calls[0].launch.constants
    asked = function.warmup(*calls[0].arguments, *constants, grid=(1,), **calls[0].launch.options)
    assert asked.hash == compiled.hash


def test_every_kernel_of_the_steps_is_planned():
    planned = {specialize(call, "sm_90").key for call in kernels.planned(DEVICES["H100"])}
    with kernels.on_paper(DEVICES["H100"]) as calls:
        for names, dtype in (("bn1", "bfloat16"), ("bn8,bn9", "float32"), ("384@1024 x25", "bfloat16")):
            (case,) = [case for case in speed.planned() if (case.layer.name, case.dtype) == (names, dtype)][:1]
            kernels._layer(case)
        network_step = task_specific_network("fused, ReLU inside", 40).to("meta").to(memory_format=torch.channels_last)
        x = torch.empty((40 * 512, 256, 16, 16), dtype=torch.bfloat16, device="meta")
        network_step.norms[3](x.to(memory_format=torch.channels_last))
    assert calls
    assert {specialize(call, "sm_90").key for call in calls} <= planned
    assert len(planned) > 150
