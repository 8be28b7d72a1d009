"""The steps of a GPU day, in the order of their value, and the seconds that each may take at most."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu_day import checks
from benchmarks.gpu_day.step_api import Setting


@dataclass(frozen=True)
class Step:
    """A step, run in a process of its own.

    Attributes:
        name: also that of its files.
        cases: ``module:function`` that gives its cases for a setting.
        seconds: after which its process is ended, with all that it has started.
        case_seconds: after which a case is taken to hang.
        gpu: it has a meaning on a GPU alone.
    """

    name: str
    cases: str
    seconds: float
    case_seconds: float = 40.0
    gpu: bool = False

    def why_not(self, setting: Setting) -> str:
        """Why the step is left out; empty where it is not."""
        return f"{self.name} has a meaning on a GPU alone" if self.gpu and setting.device == "cpu" else ""


_HERE = "benchmarks.gpu_day"
STEPS = (
    Step("ready", f"{_HERE}.ready:cases", 200.0, case_seconds=170.0),
    Step("ceilings", f"{_HERE}.ceilings:cases", 60.0, case_seconds=25.0),
    Step("speed", f"{_HERE}.speed:celeba", 100.0, case_seconds=30.0),
    Step("network", f"{_HERE}.network:cases", 110.0),
    Step("launches", f"{_HERE}.checks:launches", checks.SECONDS["launches"], checks.SECONDS["launches"]),
    Step("float32", f"{_HERE}.speed:float32", 80.0, case_seconds=30.0),
    Step("compiled", f"{_HERE}.speed:compiled", 45.0, case_seconds=45.0),
    Step("layers", f"{_HERE}.speed:others", 30.0, case_seconds=20.0),
    Step("sweep-kernels", f"{_HERE}.ready:sweep", 60.0, case_seconds=60.0, gpu=True),
    Step("sweep", f"{_HERE}.sweeping:cases", 90.0, case_seconds=20.0),
    Step("checks", f"{_HERE}.checks:cases", checks.SECONDS["checks"], checks.SECONDS["checks"], gpu=True),
    Step("counters", f"{_HERE}.counters:cases", 60.0, gpu=True),
    Step("memcheck", f"{_HERE}.checks:memcheck", checks.SECONDS["memcheck"], checks.SECONDS["memcheck"], gpu=True),
)
