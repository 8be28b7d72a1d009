"""The steps of the check, in their order, and what each may take of its time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.gpu_check.case import Setting

ENVIRONMENT, BENCHMARK, REPORT = "environment", "benchmark", "report"


@dataclass(frozen=True)
class Step:
    """A step; one for each backend where ``per_backend`` is set.

    Attributes:
        name: also that of its files.
        cases: ``module:function`` that gives its cases for a setting.
        share: of the time of the whole check, after which nothing is begun that need not be done.
        least: of the same, what the steps before it leave to it.
        case_seconds: after which a case is taken to hang.
        kinds: of devices on which it has a meaning; all where there is none.
        otherwise: why it is left out on others.
        always: its results are never those of an earlier call.
        backend: where there is one for each.
    """

    name: str
    cases: str
    share: float
    least: float = 0.02
    case_seconds: float = 90.0
    per_backend: bool = False
    kinds: tuple[str, ...] = ()
    otherwise: str = ""
    always: bool = False
    backend: str = ""

    def why_not(self, setting: Setting) -> str:
        """Why the step is left out; empty where it is not."""
        return self.otherwise if self.kinds and setting.device.split(":")[0] not in self.kinds else ""


_HERE = "benchmarks.gpu_check"
STEPS = (
    Step(ENVIRONMENT, f"{_HERE}.facts:cases", 0.2, always=True),
    Step("correctness", f"{_HERE}.correctness:cases", 0.2, per_backend=True),
    Step("families", f"{_HERE}.families:cases", 0.2, per_backend=True),
    Step("large", f"{_HERE}.large:cases", 0.1, per_backend=True),
    Step("determinism", f"{_HERE}.repeats:cases", 0.1, per_backend=True),
    Step(
        "graphs", f"{_HERE}.graphs:cases", 0.1, per_backend=True, kinds=("cuda",),
        otherwise="CUDA graphs exist on CUDA devices alone",
    ),
    Step("streams", f"{_HERE}.concurrency:cases", 0.1, per_backend=True),
    Step(
        "sanitizer", f"{_HERE}.sanitizer:cases", 0.2, case_seconds=300.0, per_backend=True, kinds=("cuda",),
        otherwise="compute-sanitizer is for CUDA; the CPU library has `make sanitize`",
    ),
    Step(BENCHMARK, f"{_HERE}.measure:benchmark", 1.0, least=0.25, case_seconds=3600.0),
    Step(REPORT, f"{_HERE}.measure:report", 0.2, least=0.04, always=True),
)  # fmt: skip


def for_backends(steps: Sequence[Step], backends: Sequence[str]) -> list[Step]:
    """The steps, those that are run for each backend named ``correctness-triton`` and so on."""
    found = []
    for step in steps:
        if step.per_backend:
            found += [replace(step, name=f"{step.name}-{backend}", backend=backend) for backend in backends]
        else:
            found.append(step)
    return found
