"""Steps: the benchmark against all peers, by its command, and the page that is made of what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import results
from benchmarks.gpu_check.case import Case, Cases, Setting, SkippedError
from benchmarks.gpu_check.steps import BENCHMARK

QUICK = ["--quick", "--tasks", "2", "--batch", "8", "--layers", "bn8", "--no-network", "--impl=fused", "--impl=loop"]
# One process for each: what is measured stays, whatever becomes of the next.
RUNS = {
    "overview": ["--quick"],
    "bn4": ["--layers", "bn4", "--no-network"],
    "bn1": ["--layers", "bn1", "--no-network"],
    "bn2": ["--layers", "bn2", "--no-network"],
    "bn8-and-network": ["--layers", "bn8"],
}
PAGE, TABLE = "report.html", "report.md"


def benchmark(setting: Setting) -> Cases:
    """An overview with all peers is enough; then layers at full size, as time allows."""
    runs = {"overview": QUICK} if setting.quick else RUNS
    return Cases([Case(name, partial(measure, name, options, setting)) for name, options in runs.items()], 1)


def measure(name: str, options: list[str], setting: Setting) -> dict[str, Any]:
    """Runs ``python -m benchmarks celeba40``, which compares before it measures.

    Raises:
        AssertionError: it failed; its output is in the log.
    """
    path = Path(setting.folder) / f"celeba40-{name}.json"
    _benchmarks(
        "celeba40", "--device", setting.device, *options, "--json", str(path), "--plot", str(path.with_suffix(".png"))
    )
    return {"file": path.name, "records": len(json.loads(path.read_text()))}


def report(setting: Setting) -> Cases:
    """One page.

    Raises:
        SkippedError: nothing was measured.
    """
    folder = Path(setting.folder)
    measured = results.load(folder, BENCHMARK)
    files = [folder / case.details["file"] for case in measured.cases.values() if case.status == "passed"]
    if not files:
        raise SkippedError("nothing was measured")
    return Cases([Case("page", partial(page, files, folder))], about=str(folder / PAGE))


def page(files: list[Path], folder: Path) -> None:
    """Runs ``python -m benchmarks report`` on what was measured.

    Raises:
        AssertionError: it failed; its output is in the log.
    """
    _benchmarks("report", *map(str, files), "--out", str(folder / PAGE), "--markdown", str(folder / TABLE))


def _benchmarks(*arguments: str) -> None:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    print(" ".join(command), flush=True)
    status = subprocess.run(command, check=False).returncode
    assert status == 0, f"`python -m benchmarks {arguments[0]}` ended with status {status}: see its output"
