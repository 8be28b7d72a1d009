"""Runs programs, each in a fork of a process that has imported PyTorch and nothing of ours: to import it takes 2 s.

A request is a line of JSON on standard input, its answer the exit status on a line: see :mod:`support.processes`.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import warnings
from types import ModuleType
from typing import Any

import torch

MOST_SECONDS = 240


def serve() -> dict[str, Any]:
    """Answers until standard input ends; returns a request in the process that is to fulfil it."""
    gc.freeze()  # else each of them would look for garbage in all of PyTorch
    for line in sys.stdin:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # NumPy has threads, and ends them where it is forked
            process = os.fork()
        if process == 0:
            request: dict[str, Any] = json.loads(line)
            return request
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


def prepare(folder: str, environment: dict[str, str], stdout: str, stderr: str) -> ModuleType:
    """Makes of this process what ``python -c`` starts with; returns the module in which its program runs."""
    signal.alarm(MOST_SECONDS)
    for number, name in enumerate((os.devnull, stdout, stderr)):
        os.dup2(os.open(name, os.O_RDWR), number)
    os.chdir(folder)
    ours = ["", *os.environ["PYTHONPATH"].split(os.pathsep)]  # what the server's path begins with
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = ["-c"]
    sys.path[: len(ours)] = ["", *environment["PYTHONPATH"].split(os.pathsep)]
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    sys.modules["__main__"] = main = ModuleType("__main__")
    return main


if __name__ == "__main__":
    asked = serve()
    exec(asked.pop("program"), vars(prepare(**asked)))
