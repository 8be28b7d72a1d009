"""Programs that run in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(
    program: str, *, path: Path = ROOT, fresh: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program, in the folder ``path`` and with the package that is there.

    Its interpreter has imported PyTorch, and nothing else; a ``fresh`` one has not: for programs that change what
    PyTorch finds, or what is loaded before it.
    """
    variables = {key: value for key, value in os.environ.items() if not key.startswith("TSBN_")}
    variables.update(environment, PYTHONPATH=python_path(path))
    command = [sys.executable, "-c", program]
    if fresh:
        return subprocess.run(
            command, cwd=path, env=variables, capture_output=True, text=True, timeout=240, check=False
        )
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder, "stdout"), Path(folder, "stderr")
        for file in printed:
            file.touch()
        stdout, stderr = map(str, printed)
        request = {"folder": str(path), "environment": variables, "stdout": stdout, "stderr": stderr}
        print(json.dumps({"program": program, **request}), file=server.stdin, flush=True)
        status = server.stdout.readline()
        assert status, "the server of programs has ended"
        return subprocess.CompletedProcess(command, int(status), *(file.read_text() for file in printed))


def python_output(program: str, *, path: Path = ROOT, fresh: bool = False, **environment: str) -> str:
    """What a program prints; fails with its errors where it fails."""
    done = python(program, path=path, fresh=fresh, **environment)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    return done.stdout


def python_path(*folders: Path) -> str:
    """The ``PYTHONPATH`` of a program: some folders, the tests', and ours, by which another PyTorch may be found."""
    own = filter(None, [os.environ.get("PYTHONPATH")])
    return os.pathsep.join([*map(str, folders), str(ROOT / "tests"), str(ROOT), *own])


@cache
def _server() -> subprocess.Popen[str]:
    """It ends with its standard input, which ends with this process."""
    command = [sys.executable, "-m", "support.program_server"]
    variables = os.environ | {"PYTHONPATH": python_path()}
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
