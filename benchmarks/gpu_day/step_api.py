"""What a step is made of: the cases that a process runs, and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Setting:
    """Where a step runs.

    Attributes:
        device: name of a torch device, such as ``"cuda"``.
        quick: few and small cases.
        folder: where files may be left.
    """

    device: str
    quick: bool
    folder: str


class Measurement(NamedTuple):
    """Something to be measured: ``run`` raises where it fails, and may give details for the record."""

    name: str
    run: Callable[[], dict[str, Any] | None]


class SkippedError(Exception):
    """A case, or a step, has no meaning here; the message says why."""
