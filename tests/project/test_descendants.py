"""Ranks and workers that tests start end with pytest, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.descendants import descendants
from support.processes import ROOT, python_path

STARTS_PROCESSES = """
import subprocess, sys, time
from support import ranks
import support

def wait():
    time.sleep(600)

def test_one():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    ranks.run(wait, 2, timeout=600.0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_behind(tmp_path: Path, workers: int, number: int):
    if number == signal.SIGKILL and not workers:
        pytest.skip("nothing of the process is left that could end another")
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_starts.py").write_text(STARTS_PROCESSES)
    command = sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--numprocesses={workers}", str(tmp_path)
    variables = {**os.environ, "PYTHONPATH": python_path(tmp_path)}
    with subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=subprocess.DEVNULL) as run:
        started = _wait_for(lambda: [one for one in descendants(run.pid) if _is_a_rank(one)], "ranks")
        everything = descendants(run.pid)
        assert len(everything) >= len(started) + 2  # the server of the ranks, and the process that sleeps
        os.kill(run.pid, number)
        run.wait(30)
    _wait_for(lambda: not any(map(_is_alive, everything)), "the end of all")


def _is_a_rank(process: int) -> bool:
    """Forks of the server have its command line, and gloo's threads."""
    try:
        return (
            "forkserver" in Path(f"/proc/{process}/cmdline").read_text()
            and len(list(Path(f"/proc/{process}/task").iterdir())) > 1
        )
    except OSError:
        return False


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_for(condition, what: str, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {seconds} s")
