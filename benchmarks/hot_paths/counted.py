"""The program that runs under valgrind: it calls each hot path between two marks, see instructions.py."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Sequence

import torch

from benchmarks.hot_paths.paths import PATHS, HotPath
from tsbn_kernels.backends import cpu

WARM_UP = 20  # Python's instructions adapt to what they see
CALLS = 5
NOTHING = "nothing"


def _call(step: Callable[[], object], times: int) -> None:
    for _ in range(times):
        step()


def main(library: str, paths: Sequence[HotPath] = PATHS) -> None:
    """``library`` is count.c, compiled."""
    marks = ctypes.PyDLL(library)

    def count(name: str, step: Callable[[], object]) -> None:
        _call(step, 2)
        marks.start()
        _call(step, CALLS)
        marks.stop(name.encode())

    gc.disable()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for path in paths:  # until the first mark the program is not slowed down by counting
        with path.within():
            _call(path.make(), WARM_UP)
    count(NOTHING, lambda: None)
    for path in paths:
        with path.within():
            count(path.name, path.make())
    print(cpu.instruction_set(), flush=True)
    os._exit(0)  # an interpreter under valgrind takes seconds to clear up


if __name__ == "__main__":
    main(sys.argv[1])
