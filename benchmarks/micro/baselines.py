"""What the hot paths cost when somebody last accepted it, and how that compares with what they cost now."""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.environment import cpu_name
from tsbn_kernels.backends import cpu

FILE = Path(__file__).with_name("baselines.json")


class Measure(NamedTuple):
    """A name, the growth that is too much (above the spread of repeats, below 30 %), and the digits worth showing."""

    name: str
    limit: float
    digits: int

    def shown(self, value: float) -> str:
        """For people."""
        return f"{value:,.{self.digits}f}"


INSTRUCTIONS = Measure("instructions", 1.1, 0)
TIME = Measure("time / PyTorch's", 1.2, 3)


@dataclass(frozen=True)
class Comparison:
    """A path now, and in the baseline: NaN where that has no such path."""

    path: str
    measure: Measure
    now: float
    before: float

    @property
    def known(self) -> bool:
        return not math.isnan(self.before)

    @property
    def change(self) -> float:
        """1 is none, more is slower; NaN where the baseline is."""
        return self.now / self.before

    @property
    def too_slow(self) -> bool:
        return self.change > self.measure.limit


class Baselines:
    """A file of values, for each measure and machine: ``{measure: {machine: {path: value}}}``."""

    def __init__(self, file: Path = FILE) -> None:
        self._file = file
        self._values: dict[str, dict[str, dict[str, float]]] = json.loads(file.read_text()) if file.exists() else {}

    def of(self, measure: Measure, machine: str) -> dict[str, float]:
        """The values of the paths that this machine has a baseline of."""
        return self._values.get(measure.name, {}).get(machine, {})

    def compare(self, measure: Measure, machine: str, now: Mapping[str, float]) -> list[Comparison]:
        before = self.of(measure, machine)
        return [Comparison(path, measure, value, before.get(path, math.nan)) for path, value in now.items()]

    def accept(self, measure: Measure, machine: str, now: Mapping[str, float]) -> None:
        """Puts the values of a machine in place of those in the file."""
        digits = {path: float(f"{value:.4g}") for path, value in now.items()}
        self._values.setdefault(measure.name, {})[machine] = digits
        self._file.write_text(json.dumps(self._values, indent=1) + "\n")


def software() -> str:
    """What changes the instructions of a call: compiler, Python and PyTorch."""
    library = re.search(rb"GCC: \([^)]*\) (\d+)", cpu._LIBRARY.read_bytes()) if cpu.available else None
    compiler = f"GCC {library[1].decode()}" if library else "another compiler"
    python, pytorch = (".".join(version.split(".")[:2]) for version in (platform.python_version(), torch.__version__))
    return f"{compiler}, Python {python}, PyTorch {pytorch}"


def counting_machine(instruction_set: str) -> str:
    """What the instructions of a call depend on."""
    return f"{platform.machine()} {instruction_set}, {software()}"


def timing_machine() -> str:
    """What the time of a call in units of PyTorch's depends on."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        numbers = re.findall(r"^(?:cpu family|model)\s*: (\d+)", cpuinfo.read_text(), re.MULTILINE)[:2]
        model = f" {'/'.join(numbers)}" if numbers else ""
    return f"{cpu_name()}{model}, {counting_machine(cpu.instruction_set())}"
