"""Programs run in fresh interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(program: str, *, path: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in a fresh interpreter that finds the package in ``path``."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("TSBN_")}
    variables.update(environment, PYTHONPATH=os.pathsep.join((str(path), str(ROOT / "tests"), str(ROOT))))
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=path, env=variables, capture_output=True, text=True, timeout=240, check=False)


def python_output(program: str, *, path: Path = ROOT, **environment: str) -> str:
    """What a program prints; fails with its errors where it fails."""
    done = python(program, path=path, **environment)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    return done.stdout
