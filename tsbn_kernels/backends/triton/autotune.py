"""Tuning, for those who ask for it: ``TSBN_AUTOTUNE=1`` times a few plans near the rule's and remembers the fastest.

Results are kept in ``$TSBN_CACHE/autotune.json`` (``~/.cache/tsbn_kernels`` by default) by device, Triton version and
shape class: all of the work but its number of samples, which counts by powers of two.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch

from tsbn_kernels.backends.capture import is_capturing
from tsbn_kernels.backends.fallback import KernelError
from tsbn_kernels.backends.plan import Plan
from tsbn_kernels.backends.plan import triton as rules

Prepare = Callable[[Plan], Callable[[], None]]
Clock = Callable[[Callable[[], None]], float]


def choose(plan: Plan, prepare: Prepare) -> Plan:
    """The plan itself; with ``TSBN_AUTOTUNE=1`` the fastest of its alternatives that run here.

    ``prepare`` makes of a plan a function that runs it: the kernels write nothing but their outputs, so running them
    many times changes nothing.
    """
    if os.environ.get("TSBN_AUTOTUNE", "0") in ("", "0") or is_capturing():
        return plan
    file, name = _file(), _name(plan)
    known = _read(file)
    alternatives = {_choice(other): other for other in rules.alternatives(plan)}
    chosen = alternatives.get(str(known.get(name)))
    if chosen is not None:  # by another size of the class, perhaps
        return chosen if chosen == plan or _time(chosen, prepare, _once) < math.inf else plan
    times = {choice: _time(other, prepare, _milliseconds) for choice, other in alternatives.items()}
    known[name] = min(times, key=lambda choice: times[choice])
    if times[known[name]] == math.inf:
        return plan
    try:
        _write(file, known)
    except OSError as error:
        warnings.warn(f"tsbn-kernels tunes again in the next process: {error}", stacklevel=2)
    return alternatives[known[name]]


def _time(plan: Plan, prepare: Prepare, clock: Clock) -> float:
    """The time of a plan; infinite if it needs more than there is: registers, shared memory, programs or memory."""
    try:
        return clock(prepare(plan))
    except (KernelError, ValueError, torch.OutOfMemoryError):
        return math.inf


def _once(run: Callable[[], None]) -> float:
    run()
    return 0.0


def _milliseconds(run: Callable[[], None]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=5, rep=30, return_mode="median"))


def _file() -> Path:
    return Path(os.environ.get("TSBN_CACHE") or Path.home() / ".cache" / "tsbn_kernels") / "autotune.json"


def _name(plan: Plan) -> str:
    work = replace(plan.work, samples=1 << (plan.work.samples - 1).bit_length())
    version = importlib.metadata.version("triton")
    return " ".join(map(str, (plan.device.name, version, plan.variant, *astuple(work))))


def _choice(plan: Plan) -> str:
    return f"tile {plan.tile[0]}x{plan.tile[1]}, {plan.warps} warps"


def _read(file: Path) -> dict[str, str]:
    """What is known; nothing where the file is missing or damaged."""
    try:
        known: Any = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(file: Path, known: dict[str, str]) -> None:
    """Replaces the file whole: another process may read it meanwhile."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as fresh:
        json.dump(known, fresh, indent=1, sort_keys=True)
    Path(fresh.name).replace(file)
