"""compute-sanitizer finds nothing in a small call of each kind of launch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.processes import python_path

from on_gpu import kinds, small_calls
from on_gpu.kinds import small

TOOL = "compute-sanitizer"
FOUND = 86  # exit status where the tool finds something
PATIENCE = 300.0


@pytest.mark.patience(PATIENCE + 30)
@pytest.mark.parametrize("check", ["memcheck", "racecheck", "synccheck"])
def test_finds_nothing(device: str, by: str, check: str) -> None:
    if torch.device(device).type != "cuda":
        pytest.skip(f"{TOOL} is for CUDA; the CPU library has `make sanitize`")
    run_under(check, by, device)


def run_under(check: str, backend: str, device: str) -> None:
    tool = shutil.which(TOOL)
    if tool is None:
        pytest.skip(f"{TOOL} is not on the PATH; it comes with the CUDA toolkit")
    program = [sys.executable, "-m", "on_gpu.small_calls", backend, device]
    # Without PyTorch's cache of memory an access past a tensor is one past what the driver has given. Libraries ask the
    # driver for what it may not have: such errors of calls are none of ours.
    variables = {**os.environ, "PYTHONPATH": python_path(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ["--tool", check, "--error-exitcode", str(FOUND), "--print-limit", "20", "--report-api-errors", "no"]
    command = [tool, *options, *program]
    ended = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=False, timeout=PATIENCE)
    print(ended.stdout)
    assert ended.returncode != FOUND, f"{check} found something: see its output"
    assert ended.returncode == 0, f"{TOOL} --tool {check} ended with status {ended.returncode}"
    assert small_calls.DONE in ended.stdout, f"{TOOL} --tool {check} has not run the program"


# ---- is what it says understood? -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "says", "message"),
    [
        (0, small_calls.DONE, None),
        (0, "no program was run", "has not run the program"),
        (FOUND, small_calls.DONE, "racecheck found something"),
        (1, small_calls.DONE, "ended with status 1"),
    ],
)
def test_what_a_sanitizer_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, says: str, message: str | None
) -> None:
    tool = tmp_path / TOOL
    told = f'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" > {tmp_path}/arguments'
    tool.write_text(f"#!/bin/sh\n{told}\necho {says}\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    if message is None:
        run_under("memcheck", "cpu", "cpu")
        arguments = (tmp_path / "arguments").read_text()
        assert arguments.startswith("1 --tool memcheck --error-exitcode 86 ")
        assert arguments.endswith(f"{sys.executable} -m on_gpu.small_calls cpu cpu\n")
    else:
        with pytest.raises(AssertionError, match=message):
            run_under("racecheck", "cpu", "cpu")


def test_no_sanitizer_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(pytest.skip.Exception, match="compute-sanitizer is not on the PATH"):
        run_under("memcheck", "cpu", "cpu")


def test_what_runs_under_a_sanitizer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = {small(): {""}, small(columns=True, training=False, sums=False): {""}}
    monkeypatch.setattr(kinds, "planned", lambda *_: chosen)
    small_calls.main("cpu", "cpu")
    assert capsys.readouterr().out.splitlines() == [*(each.name for each in chosen), small_calls.DONE]
