"""What a step is made of: the cases that a worker runs, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Setting:
    """Where a step runs.

    Attributes:
        device: name of a torch device, such as ``"cuda"``.
        quick: few and small cases.
        folder: where files may be left.
        backend: whose kernels are checked, in steps that are run for each.
    """

    device: str
    quick: bool
    folder: str
    backend: str = ""


class Case(NamedTuple):
    """Something that must hold: ``run`` raises where it does not, and may give details for the record."""

    name: str
    run: Callable[[], dict[str, Any] | None]


@dataclass(frozen=True)
class Cases:
    """Those of a step.

    Attributes:
        cases: in the order in which they run.
        enough: how many of the first must be done; the others are run as time allows. None: all.
        about: what all have in common, for the table.
    """

    cases: Sequence[Case] = field(default_factory=list)
    enough: int | None = None
    about: str = ""


class SkippedError(Exception):
    """A case, or a step, has no meaning here; the message says why."""
