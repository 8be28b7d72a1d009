"""What the hot paths cost when somebody last accepted it, and how that compares with what they cost now."""

from __future__ import annotations

import json
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
    """A name, and the growth that is too much: well above the spread of repeats, and well below 30 %."""

    name: str
    limit: float


INSTRUCTIONS = Measure("instructions", 1.1)
TIME = Measure("time / PyTorch's", 1.2)


@dataclass(frozen=True)
class Comparison:
    """A path now, and in the baseline; None where that has no such path."""

    path: str
    measure: Measure
    now: float
    before: float | None

    @property
    def change(self) -> float | None:
        """1 is no change."""
        return None if self.before is None else self.now / self.before

    @property
    def too_slow(self) -> bool:
        return self.change is not None and self.change > self.measure.limit


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
        return [Comparison(path, measure, value, before.get(path)) for path, value in now.items()]

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
