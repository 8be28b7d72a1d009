"""Ends what a process has started when a signal ends the process, or its parent is gone: nothing stays behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections import defaultdict
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1


def end_with_this_process() -> None:
    """Has SIGTERM and SIGHUP end all descendants too; the end of the parent counts as SIGTERM. Linux alone."""
    if sys.platform != "linux":
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def descendants(ancestor: int) -> list[int]:
    """Processes that a process has started, those that these have started, and so on; parents come first."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        try:
            status = (entry / "stat").read_text() if entry.name.isdigit() else ""
        except OSError:  # it has ended meanwhile
            continue
        if status:
            parent = int(status.rpartition(")")[2].split()[1])
            children[parent].append(int(entry.name))
    found = [ancestor]
    for process in found:  # grows on the way
        found += children[process]
    return found[1:]


def _end(number: int, _: FrameType | None) -> None:
    for process in descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    os._exit(128 + number)
