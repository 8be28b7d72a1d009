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


def forget(folder: str | Path) -> None:
    """A new call tries all again."""
    for path in Path(folder).glob("lost-*"):
        path.unlink()
