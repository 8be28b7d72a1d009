"""What may end the process that runs it is tried twice, so that the rest of a step gets its turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.gpu_day.step_api import SkippedError

MOST = 2


@contextmanager
def risky(name: str, folder: str | Path, device: torch.device) -> Iterator[None]:
    """Notes on disk that something runs, and takes the note back where the device still works afterwards.

    Raises:
        SkippedError: it has lost as many processes as it may.
    """
    path = Path(folder) / f"lost-{name.replace(' ', '-')}"
    lost = path.stat().st_size if path.exists() else 0
    if lost >= MOST:
        raise SkippedError(f"{name} has ended {lost} processes, and is not tried again")
    path.write_text("x" * (lost + 1))
    try:
        yield
    finally:
        if device.type != "cpu":
            torch.accelerator.synchronize()  # raises where the device is lost, and the note stays
        path.write_text("x" * lost)


def losses(folder: str | Path) -> dict[Path, int]:
    """How many processes each has ended so far, what runs now counted as if it did."""
    return {path: path.stat().st_size for path in Path(folder).glob("lost-*")}


def take_back(folder: str | Path, before: dict[Path, int]) -> None:
    """What was running when a step's time was over has ended no process."""
    for path in losses(folder):
        path.write_text("x" * before.get(path, 0))


def forget(folder: str | Path) -> None:
    """A new call tries all again."""
    for path in losses(folder):
        path.unlink()
