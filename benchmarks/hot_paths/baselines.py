"""The instructions of the hot paths when somebody last accepted them, and how they compare with those of now."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tsbn_kernels.backends import cpu

FILE = Path(__file__).with_name("baselines.json")
LIMIT = 1.1  # times a baseline: above the spread of repeats


@dataclass(frozen=True)
class Growth:
    """The instructions of a path now, and in the baseline: None where that has no such path."""

    path: str
    now: float
    before: float | None

    @property
    def factor(self) -> float | None:
        """How many times as many instructions there are now."""
        return None if self.before is None else self.now / self.before

    @property
    def too_much(self) -> bool:
        """Whether the path has become slower by more than is accepted."""
        return self.factor is not None and self.factor > LIMIT


class Baselines:
    """A file of instructions, for each machine: ``{"instructions": {machine: {path: count}}}``."""

    def __init__(self, file: Path = FILE) -> None:
        self._file = file
        self._counts: dict[str, dict[str, float]] = (
            json.loads(file.read_text())["instructions"] if file.exists() else {}
        )

    def compare(self, machine: str, now: Mapping[str, float]) -> list[Growth]:
        """Puts each path's count beside that of the machine's baseline."""
        before = self._counts.get(machine, {})
        return [Growth(path, count, before.get(path)) for path, count in now.items()]

    def accept(self, machine: str, now: Mapping[str, float]) -> None:
        """Puts the counts of a machine, to four digits, in place of those in the file."""
        self._counts[machine] = {path: float(f"{count:.4g}") for path, count in now.items()}
        self._file.write_text(json.dumps({"instructions": self._counts}, indent=1) + "\n")


def machine_of(instruction_set: str) -> str:
    """What the instructions of a call depend on: processor, instruction set, compiler, Python and PyTorch."""
    library = re.search(rb"GCC: \([^)]*\) (\d+)", cpu._LIBRARY.read_bytes()) if cpu.available else None
    compiler = f"GCC {library[1].decode()}" if library else "another compiler"
    python, pytorch = (".".join(version.split(".")[:2]) for version in (platform.python_version(), torch.__version__))
    return f"{platform.machine()} {instruction_set}, {compiler}, Python {python}, PyTorch {pytorch}"
