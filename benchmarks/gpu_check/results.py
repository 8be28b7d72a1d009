"""What steps have found, on disk: each case is kept as soon as it is done, so that a later call goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parent.parent.parent
SOURCES = ("tsbn_kernels/**/*.py", "tsbn_kernels/*.so", "benchmarks/**/*.py", "tests/support.py", "tests/epilogues.py")

Status = Literal["passed", "failed", "skipped", "incomplete"]


@dataclass
class CaseResult:
    """``output`` are the last lines that were written while a case that failed was running."""

    status: Status
    message: str = ""
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)
    output: str = ""


@dataclass
class StepResult:
    """A step as far as it got.

    Attributes:
        key: of all that the results depend on; results of another key are not used.
        planned: names of all cases, the first ``enough`` of which must be done.
        problem: why the step as a whole failed; ``output`` are the last lines that it wrote.
        reason: why it was left out, or did not get its time.
        kept: how many cases are an earlier call's.
    """

    name: str
    key: str = ""
    planned: list[str] = field(default_factory=list)
    enough: int = 0
    about: str = ""
    cases: dict[str, CaseResult] = field(default_factory=dict)
    problem: str = ""
    output: str = ""
    reason: str = ""
    left_out: bool = False
    kept: int = 0

    @property
    def failures(self) -> dict[str, CaseResult]:
        return {name: case for name, case in self.cases.items() if case.status == "failed"}

    @property
    def missing(self) -> list[str]:
        return [name for name in self.planned if name not in self.cases]

    @property
    def has_enough(self) -> bool:
        """Whether all is done that must be."""
        return bool(self.planned) and all(name in self.cases for name in self.planned[: self.enough])

    @property
    def seconds(self) -> float:
        return sum(case.seconds for case in self.cases.values())

    @property
    def status(self) -> Status:
        if self.problem or self.failures:
            return "failed"
        if self.left_out:
            return "skipped"
        if not self.has_enough:
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
            done = f"{len(self.cases)} of {self.enough} cases" if self.planned else "no case"
            return f"{done} done" + (f": {self.reason}" if self.reason else "")
        count = len(self.cases)
        more = [f"{len(self.missing)} more had no time"] if self.missing else []
        earlier = [f"{self.kept} of them by an earlier call"] if self.kept else []
        return ", ".join([f"{count} case{'s' * (count != 1)}", *[self.about] * bool(self.about), *more, *earlier])


def save(folder: Path, result: StepResult) -> None:
    """Writes ``<step>.json`` in one go, with its status and summary for readers."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}.json"
    beside = path.with_suffix(".json.new")
    beside.write_text(json.dumps({"status": result.status, "summary": result.summary, **asdict(result)}, indent=1))
    os.replace(beside, path)


def load(folder: Path, name: str, key: str | None = None) -> StepResult:
    """The step's earlier results that count: the cases that passed, under the key where one is given.

    None do where all passed and the step failed nevertheless.
    """
    nothing = StepResult(name, key or "")
    try:
        stored = json.loads((folder / f"{name}.json").read_text())
        cases = {case: CaseResult(**result) for case, result in stored["cases"].items()}
        passed = {case: result for case, result in cases.items() if result.status == "passed"}
        rest = {field: stored[field] for field in ("key", "planned", "enough", "about")}
        found = StepResult(name, cases=passed, kept=len(passed), **rest)
        counts = (key is None or found.key == key) and (found.missing or not stored["problem"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return nothing
    return found if counts else nothing


def key_of(**facts: object) -> str:
    """A digest of the sources, compiled libraries included, and of what else the results depend on."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
