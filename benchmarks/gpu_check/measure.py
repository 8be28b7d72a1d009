"""Steps: the benchmark against all peers, by its command, and the page that is made of what it measured."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import results
from benchmarks.gpu_check.case import Case, Cases, Setting, SkippedError
from benchmarks.gpu_check.steps import BENCHMARK

DTYPES, FORMATS, FULL_LAYERS = ("float32", "bfloat16"), ("contiguous", "channels_last"), ("bn4", "bn1", "bn2")
QUICK = ["--quick", "--tasks", "2", "--batch", "8", "--layers", "bn8", "--no-network", "--impl=fused", "--impl=loop"]
# One process for each: what is measured stays, whatever becomes of the next.
OVERVIEW = {
    f"{dtype}-{order}": ["--quick", "--no-network", "--dtype", dtype, "--memory-format", order]
    for dtype, order in itertools.product(DTYPES, FORMATS)
}
FULL = {
    f"{layer}-{dtype}": ["--no-network", "--layers", layer, "--dtype", dtype]
    for layer, dtype in itertools.product(FULL_LAYERS, DTYPES)
} | {"bn8-and-network": ["--layers", "bn8"]}
PAGE, TABLE = "report.html", "report.md"


def benchmark(setting: Setting) -> Cases:
    """An overview with all peers is enough; then layers at full size and the network, as time allows."""
    overview = {"overview": QUICK} if setting.quick else OVERVIEW
    runs = overview if setting.quick else overview | FULL
    cases = [Case(name, partial(measure, name, options, setting)) for name, options in runs.items()]
    return Cases(cases, len(overview))


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
