"""The decisive figures in short lines, for a terminal of which only the end may be kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_day import journal, sweep
from benchmarks.gpu_day.results import StepResult
from benchmarks.profile import ncu
from benchmarks.records.record import FORWARD, FORWARD_BACKWARD
from benchmarks.records.workloads import CELEBA

FILE = "table.txt"
MOST_FAILURES, MOST_OF_A_LINE = 12, 240
NOISE = 0.97

Line = dict[str, Any]


def text(folder: Path, steps: Sequence[StepResult]) -> str:
    """Sweep, counters, ceilings, layers, network, what was left out, steps, failures: what decides comes last."""
    parts = (
        _sweep(folder),
        _counters(folder),
        _ceilings(folder),
        _layers(folder),
        _network(folder),
        _left_out(folder),
        _steps(steps),
    )
    return "".join(f"{line[:MOST_OF_A_LINE]}\n" for part in parts for line in _told(part))


def _told(part: Iterator[str]) -> Iterator[str]:
    """The lines of a part; a record that it does not understand costs the rest of it, and no other."""
    try:
        yield from part
    except Exception as error:
        yield f"the rest of this is not told: {type(error).__name__}: {error}"


def _ceilings(folder: Path) -> Iterator[str]:
    found: Line = {}
    for line in journal.read(folder, "ceiling"):
        found |= line
    if "copy" in found:
        yield "TB/s: " + ", ".join(f"{way} {found[way] / 1e12:.3g}" for way in ("copy", "read", "write"))
    kernels = [f"{key.replace('_', ' ')} {1e6 * value:.2f}" for key, value in found.items() if key.startswith("kernel")]
    if kernels:
        yield "us: " + ", ".join(kernels)
    for line in {line["entrant"]: line for line in journal.read(folder, "host")}.values():
        forward, both = (1e6 * line[pass_] for pass_ in (FORWARD, FORWARD_BACKWARD))
        yield f"host us, {line['entrant']}: forward {forward:.0f}, both {both:.0f}"
    for line in journal.read(folder, "case"):
        if line["case"] == "clusters" and line["status"] == "passed":
            yield f"clusters: {line['details']['clusters']}"


def _layers(folder: Path) -> Iterator[str]:
    """A line for each layer: the copy's ms; each entrant's share of its rate forward and backward, and ms of both.

    What decides comes last, since of a long output the end is kept.
    """
    cases: dict[tuple[str, ...], dict[str, dict[str, Line]]] = {}
    lines = [*journal.read(folder, "layers"), *journal.read(folder, "speed")]
    for line in sorted(lines, key=lambda line: (line["workload"] == CELEBA.name, line["dtype"] == "bfloat16")):
        entrants = cases.setdefault(tuple(line[key] for key in ("workload", "layer", "dtype", "memory_format")), {})
        ways = entrants.setdefault(line["entrant"], {})
        ways[f"{line['by']} {line['pass']}"] = line
    if cases:
        yield "layer: copy ms; each: share of its rate forward/backward, ms of both (e: called by the host)"
    for names, entrants in cases.items():
        parts, copy = [], 0.0
        for entrant, ways in entrants.items():
            for by in ("graph", "eager"):
                forward, both = (ways.get(f"{by} {pass_}") for pass_ in (FORWARD, FORWARD_BACKWARD))
                if forward and both:
                    copy, ahead, all_ = forward["copy_ms"], forward["median_ms"], both["median_ms"]
                    back = max(all_ - ahead, 1e-9)
                    mark = " e" * (by == "eager") + " WRONG" * (not both["verified"])
                    parts.append(f"{entrant} {copy / ahead:.2f}/{1.5 * copy / back:.2f} {all_:.3g}{mark}")
                    break
        yield f"{' '.join(names[1:])}: {copy:.3g}; " + "; ".join(parts)


def _network(folder: Path) -> Iterator[str]:
    lines = {(n["variant"], n["entrant"], n["memory_format"], n["batch"]): n for n in journal.read(folder, "network")}
    if lines:
        yield "network: images, ms a step, peak GiB, images/s"
    for (variant, entrant, memory_format, batch), line in lines.items():
        yield (
            f"{variant}, {entrant}, {memory_format}: {batch}, {line['ms']:.1f}, {line['peak_bytes'] / 2**30:.2f}, "
            f"{1e3 * batch / line['ms']:.0f}"
        )


def _sweep(folder: Path) -> Iterator[str]:
    """Where a plan is faster than the rule's by more than the noise."""
    keys = "layer", "dtype", "format", "pass", "backend"
    groups: dict[tuple[str, ...], list[Line]] = {}
    for line in journal.lines(folder / sweep.FILE):
        if "ms" in line and "stand_in" not in line:
            groups.setdefault(tuple(line[key] for key in keys), []).append(line)
    for names, found in groups.items():
        by_rule = min((line["ms"] for line in found if line["by_rule"]), default=0.0)
        best = min(found, key=lambda line: line["ms"])
        if best["ms"] < NOISE * by_rule:
            plan = sweep.describe(best["plan"])
            yield f"sweep: {' '.join(names)}: rule {by_rule:.3g} ms, {best['ms']:.3g} by {plan}"


def _counters(folder: Path) -> Iterator[str]:
    for line in journal.read(folder, "counters"):
        where = f"{line['entrant']} {line['layer']} {line['memory_format']} {line['kernel'][:40]}"
        moved, share = (line[ncu.READ] + line[ncu.WRITTEN]) / 1e9, line[ncu.MEMORY_SHARE]
        seconds, registers = line[ncu.SECONDS], line[ncu.REGISTERS]
        yield f"ncu: {where}: {moved:.3g} GB, {1e6 * seconds:.0f} us, dram {share:.0f} %, {registers:.0f} registers"


def _left_out(folder: Path) -> Iterator[str]:
    for line in journal.read(folder, "left out"):
        case = " ".join(line[key] for key in ("layer", "dtype", "memory_format"))
        yield f"left out: {line['entrant']} of {case}: {line['why'].splitlines()[0]}"


def _steps(steps: Sequence[StepResult]) -> Iterator[str]:
    for step in steps:
        yield f"{step.name}: {step.status}, {step.seconds:.0f} s, {step.summary}"
        for name, case in list(step.failures.items())[:MOST_FAILURES]:
            yield f"  {name}: {case.message}"
