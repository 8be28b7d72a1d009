"""Counts the instructions of the hot paths with valgrind's callgrind: the same on a busy machine as on a quiet one.

Valgrind has no AVX-512, so the kernels for AVX2 run, which are made of the same sources.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.hot_paths.counted import CALLS, NOTHING

ROOT = Path(__file__).parents[2]
# PyTorch brings callgrind.h along.
HEADERS = Path(torch.__file__).parent / "utils" / "benchmark" / "utils" / "valgrind_wrapper"


class UncountableError(RuntimeError):
    """There is no counting on this machine."""


def count() -> tuple[str, dict[str, float]]:
    """The instruction set under valgrind, and the instructions of one call of each path that is checked.

    Raises:
        UncountableError: valgrind or a C compiler is missing, or the program does not run under valgrind.
    """
    for program in ("valgrind", "cc"):
        if shutil.which(program) is None:
            raise UncountableError(f"{program} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/count.so"
        source = Path(__file__).with_name("count.c")
        _run(["cc", "-shared", "-fPIC", "-O1", f"-I{HEADERS}", str(source), "-o", library])
        valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/counts"]
        instruction_set = _run([*valgrind, sys.executable, "-m", "benchmarks.hot_paths.counted", library])
        files = sorted(Path(folder).glob("counts.*"), key=lambda file: int(file.suffix[1:]))
        counts = dict(map(read, files))
    nothing = counts.pop(NOTHING)
    return instruction_set, {name: (total - nothing) / CALLS for name, total in counts.items()}


def _run(command: list[str]) -> str:
    environment = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    if done.returncode != 0:
        raise UncountableError(f"{command[0]} failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout.strip()


def read(path: Path) -> tuple[str, int]:
    """The mark at which callgrind wrote a file, and the instructions up to it."""
    text = path.read_text()
    mark = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
    total = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
    if mark is None or total is None:
        raise UncountableError(f"callgrind wrote no count: {text[:500]}")
    return mark[1], int(total[1])
