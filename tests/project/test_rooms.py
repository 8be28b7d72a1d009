"""The structure of the code: its rooms, who may import whom, and how long a file may be."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from support.processes import ROOT

# From the ground up. A room imports from lower floors alone, and not from its neighbours.
FLOORS = [
    ["tsbn_kernels.definition"],
    ["tsbn_kernels.backends"],
    ["tsbn_kernels.operator"],
    ["tsbn_kernels.functional", "tsbn_kernels.memory"],
    ["tsbn_kernels.layers"],
    ["tsbn_kernels.models"],
    ["tsbn_kernels.sharding"],
    ["tsbn_kernels.analysis", "tsbn_kernels.regularizers"],
    ["tsbn_kernels"],
    ["tsbn_kernels.plots"],
    ["tsbn_kernels.__main__"],
    ["benchmarks.records"],
    ["benchmarks.timing"],
    ["benchmarks.layers"],
    ["benchmarks.network", "benchmarks.profile"],
    ["benchmarks.report"],
    ["benchmarks.gpu_day", "benchmarks.hot_paths"],
    ["benchmarks.commands"],
    ["experiments.training"],
    ["benchmarks.__main__", "experiments.dense_tasks", "experiments.forty_tasks", "tools.compile_gate"],
    ["tools.triton_matrix"],
]
ALONE = ["tools.build_matrix", "tools.ptxvm", "tools.sanitize", "tools.site"]  # these import none of the others
MOST_ROOMS = {"tsbn_kernels": 13, "benchmarks": 13}
MOST_LINES = 500
FEWER_MARKS = 60  # that keep the formatter off: for tables, and parameters of kernels


def modules() -> dict[str, Path]:
    """All modules by their names, apart from tests."""
    found = {}
    for top in ("tsbn_kernels", "benchmarks", "experiments", "tools"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if "tests" not in parts:
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(module: str) -> Iterator[str]:
    """What a module imports, at its top or within a function."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            known = next(
                (".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in MODULES), None
            )
            if known not in (None, module):
                yield known


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_every_room_has_its_floor() -> None:
    rooms = {room(module) for module in MODULES}
    assert rooms - {"benchmarks", "experiments", "tools"} == {*ALONE, *(name for floor in FLOORS for name in floor)}
    for top, most in MOST_ROOMS.items():
        assert len([name for name in rooms if name.split(".")[0] == top]) <= most


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_lead_down(module: str) -> None:
    height = {name: level for level, floor in enumerate(FLOORS) for name in floor} | dict.fromkeys(ALONE, -1)
    own = room(module)
    for other in map(room, imported(module)):
        assert other == own or height[other] < height[own], f"{module} imports from {other}"


def test_no_circles() -> None:
    packages = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    order = TopologicalSorter({module: set(imported(module)) - packages for module in MODULES})
    order.prepare()  # raises CycleError, which names them


@pytest.mark.parametrize("top", ["tsbn_kernels", "benchmarks", "experiments", "tools", "tests", "examples", "csrc"])
def test_files_are_short(top: str) -> None:
    sources = [
        path for path in (ROOT / top).rglob("*") if path.suffix in {".py", ".h", ".cuh", ".cpp", ".hpp", ".cu", ".c"}
    ]
    long = {
        str(path.relative_to(ROOT)): lines
        for path in sources
        if (lines := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert not long


def test_few_lines_are_laid_out_by_hand() -> None:
    tops = ("tsbn_kernels", "benchmarks", "experiments", "tools", "tests", "examples")
    sources = [ROOT / "setup.py", *(path for top in tops for path in (ROOT / top).rglob("*.py"))]
    mark = "# fmt: " + "skip"
    texts = {path.relative_to(ROOT): path.read_text() for path in sources}
    assert sum(text.count(mark) for text in texts.values()) < FEWER_MARKS
    calls = re.compile(rf"^ +\)  {mark}", re.MULTILINE)  # tables end with other brackets, or at the margin
    assert [str(path) for path, text in texts.items() if calls.search(text)] == []
