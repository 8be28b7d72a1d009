"""Steps: the tests of a GPU, run by pytest: each kind of launch, then what only a GPU shows, then memcheck."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu_day.sources import ROOT
from benchmarks.gpu_day.step_api import Measurement, Setting, SkippedError

SECONDS = {"launches": 60.0, "checks": 90.0, "memcheck": 120.0}  # of the steps
BEGIN = 0.75  # of them, after which no test begins
NEEDED = ("pytest", "xdist", "hypothesis")
CHECKS = "rows", "graphs", "streams", "repeats", "large"


def launches(setting: Setting) -> list[Measurement]:
    """The smallest call of every kind of launch of each backend, against float64."""
    return [Measurement("tests", partial(run, "launches", ("launch_kinds",), setting))]


def cases(setting: Setting) -> list[Measurement]:
    """Layer normalisation of every length, graphs, streams, the same bits again and again, large tensors."""
    return [Measurement("tests", partial(run, "checks", CHECKS, setting))]


def memcheck(setting: Setting) -> list[Measurement]:
    """compute-sanitizer's memcheck alone, over one small call of each kind of launch.

    Raises:
        SkippedError: the tool is not there.
    """
    if shutil.which("compute-sanitizer") is None:
        raise SkippedError("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    return [Measurement("tests", partial(run, "memcheck", ("sanitizer",), setting, "-k", "memcheck"))]


def run(name: str, files: tuple[str, ...], setting: Setting, *options: str) -> dict[str, Any]:
    """Runs files of tests/on_gpu; what has passed is recorded, from where a later call goes on.

    Raises:
        SkippedError: a package that the tests need is not installed.
        AssertionError: a test failed, or some had no time; the log has pytest's output.
    """
    if missing := [package for package in NEEDED if importlib.util.find_spec(package) is None]:
        raise SkippedError(f"the tests need {', '.join(missing)}, not installed here")
    record = Path(setting.folder) / f"{name}.jsonl"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n1",
        "--maxschedchunk=1",
        "--max-worker-restart=5",
        f"--device={setting.device}",
        f"--seconds={BEGIN * SECONDS[name]}",
        f"--record={record}",
        *options,
        *(str(ROOT / "tests" / "on_gpu" / f"test_{file}.py") for file in files),
    ]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    summary = record.with_suffix(".md")
    verdict = summary.read_text().splitlines()[2] if summary.exists() else f"pytest ended with status {status}"
    assert status == 0, verdict
    return {"verdict": verdict}
