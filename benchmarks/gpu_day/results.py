"""What has become of the cases of a step, as the lines of the journal tell it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu_day import journal

Status = Literal["passed", "failed", "skipped", "incomplete"]


@dataclass
class CaseResult:
    """A case; ``status`` is ``"begun"`` while it runs."""

    status: str
    message: str = ""
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class StepResult:
    """A step as far as it got.

    Attributes:
        planned: names of all cases.
        problem: why the step as a whole failed.
        reason: why it was left out, or did not get its time.
        kept: how many cases are an earlier call's.
    """

    name: str
    planned: list[str] = field(default_factory=list)
    cases: dict[str, CaseResult] = field(default_factory=dict)
    problem: str = ""
    reason: str = ""
    left_out: bool = False
    kept: int = 0

    @property
    def failures(self) -> dict[str, CaseResult]:
        return {name: case for name, case in self.cases.items() if case.status == "failed"}

    @property
    def running(self) -> str:
        """The case that has begun and not ended; empty where there is none."""
        return next((name for name, case in self.cases.items() if case.status == "begun"), "")

    @property
    def missing(self) -> list[str]:
        return [name for name in self.planned if name not in self.cases or name == self.running]

    @property
    def seconds(self) -> float:
        return sum(case.seconds for case in self.cases.values())

    @property
    def status(self) -> Status:
        if self.problem or self.failures:
            return "failed"
        if self.left_out:
            return "skipped"
        if self.missing or not self.planned:
            return "incomplete"
        return "skipped" if all(case.status == "skipped" for case in self.cases.values()) else "passed"

    @property
    def summary(self) -> str:
        """One line."""
        if self.status == "failed":
            lines = [self.problem] * bool(self.problem) + [f"{n}: {c.message}" for n, c in self.failures.items()]
            return lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")
        if self.status == "skipped":
            return self.reason or next(iter(self.cases.values())).message
        if self.status == "incomplete":
            all_, left = len(self.planned), len(self.missing)
            done = f"{all_ - left} of {all_} cases" if self.planned else "no case"
            return f"{done} done" + (f": {self.reason}" if self.reason else "")
        earlier = f", {self.kept} of them by an earlier call" if self.kept else ""
        return f"{len(self.cases)} case{'s' * (len(self.cases) != 1)}{earlier}"


def read(folder: str | Path, name: str, key: str) -> StepResult:
    """What this call has found of a step, and earlier ones under the same key: of theirs what passed counts."""
    result = StepResult(name)
    for line in journal.read(folder, "step", "case"):
        if (line["step"], line["key"]) != (name, key):
            continue
        if line["kind"] == "case":
            found = {field: line[field] for field in ("status", "message", "seconds", "details") if field in line}
            result.cases[line["case"]] = CaseResult(**found)
        elif "planned" in line:
            result.planned = line["planned"]
        elif "left_out" in line:
            result.left_out, result.reason = True, line["left_out"]
        else:  # another call begins
            result.cases = {case: found for case, found in result.cases.items() if found.status == "passed"}
            result.left_out, result.reason, result.kept = False, "", len(result.cases)
    return result
