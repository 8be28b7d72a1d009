"""What the steps say together: a table, a sentence, and the summary to be sent."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.gpu_check import facts, measure
from benchmarks.gpu_check.check import Check
from benchmarks.gpu_check.results import StepResult
from benchmarks.gpu_check.steps import REPORT

COLOURS = {"passed": "green", "failed": "red", "skipped": "dim", "incomplete": "yellow"}
SUMMARY = "summary.md"


def device_name(check: Check) -> str:
    """As the driver calls it; as it was asked for where that is not known."""
    return str(check.facts.get(facts.DEVICE, {}).get("name", check.setting.device))


def with_status(check: Check, status: str) -> list[StepResult]:
    """The steps that ended so."""
    return [step for step in check.steps if step.status == status]


def is_good(check: Check) -> bool:
    """Whether nothing failed or was left undone."""
    return not with_status(check, "failed") and not with_status(check, "incomplete")


def sentence(check: Check) -> str:
    """The verdict in plain words, and what to do next."""
    where, folder = device_name(check), check.setting.folder
    failed, incomplete, passed, skipped = (
        with_status(check, status) for status in ("failed", "incomplete", "passed", "skipped")
    )
    if failed:
        return (
            f"{len(failed)} of {len(check.steps)} steps FAILED on {where}: {_names(failed)}. Please send us "
            f"{Path(folder) / SUMMARY}; the folder has the whole logs. The same command runs again what failed."
        )
    if incomplete:
        return (
            f"Nothing failed on {where}, but there was no time for {_names(incomplete)}. The same command goes on "
            f"where this one stopped."
        )
    alone = f", {len(skipped)} skipped for the reasons above" if skipped else ""
    about = "Every step works; a CPU says nothing about a GPU." if where == "cpu" else "The kernels are right here."
    return f"{_count(passed)} passed on {where}{alone}. {about}"


def _count(steps: list[StepResult]) -> str:
    return f"All {len(steps)} steps" if len(steps) > 1 else "The only step"


def page(check: Check) -> Path | None:
    """The report, where one was written."""
    written = any(step.name == REPORT and step.status == "passed" for step in check.steps)
    return Path(check.setting.folder) / measure.PAGE if written else None


def _names(steps: list[StepResult]) -> str:
    return ", ".join(step.name for step in steps)


def table(check: Check) -> Table:
    """A line for each step."""
    result = Table(title=f"gpu-check of {device_name(check)}, {check.seconds:.0f} s")
    for name in ("step", "result"):
        result.add_column(name, no_wrap=True)
    result.add_column("time", justify="right", no_wrap=True)
    result.add_column("", overflow="fold")
    for step in check.steps:
        colour = COLOURS[step.status]
        result.add_row(step.name, f"[{colour}]{step.status}[/]", f"{step.seconds:.1f} s", _escaped(step.summary))
    return result


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


def markdown(check: Check) -> str:
    """The summary: verdict, steps, what failed with its last lines, the machine."""
    lines = [
        f"# gpu-check: {device_name(check)}",
        "",
        sentence(check),
        "",
        "| step | result | time | |",
        "|---|---|---|---|",
    ]
    for step in check.steps:
        summary = step.summary.replace("|", r"\|")
        lines.append(f"| {step.name} | {step.status} | {step.seconds:.1f} s | {summary} |")
    for step in with_status(check, "failed"):
        lines += ["", f"## {step.name}"]
        if step.problem:
            lines += ["", step.problem, "", "```", step.output, "```"]
        for name, case in step.failures.items():
            lines += ["", f"**{name}**: {case.message}", "", "```", case.output, "```"]
    lines += ["", "## The machine", "", "```", json.dumps(check.facts, indent=1), "```"]
    if page(check):
        lines += ["", "## Measured", "", (Path(check.setting.folder) / measure.TABLE).read_text()]
    return "\n".join(lines) + "\n"


def write(check: Check) -> None:
    """``summary.md`` and ``summary.json``, without the details of cases, which their steps' files have."""
    folder = Path(check.setting.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY).write_text(markdown(check))
    steps = [_brief(step) for step in check.steps]
    brief = {
        "device": device_name(check), "passed": is_good(check), "verdict": sentence(check), "seconds": check.seconds,
        "facts": check.facts, "steps": steps,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(brief, indent=1) + "\n")


def _brief(step: StepResult) -> dict[str, Any]:
    return {
        "name": step.name, "status": step.status, "summary": step.summary, "seconds": step.seconds,
        "failures": {name: asdict(case) for name, case in step.failures.items()},
    }  # fmt: skip
