"""The compile gate: all kernels of known networks' layers for every kind of GPU, held to what the plans promise.

The figures are those of benchmarks/compiled_kernels.csv: ``python -m benchmarks compiled-kernels`` writes it.
"""

from __future__ import annotations

import csv
from collections import defaultdict

import pytest
from typer.testing import CliRunner

from benchmarks import cli, compiled_kernels
from benchmarks.compiled_kernels import COMPILER, TABLE, TARGETS, Row

ITEM = {"float32": 4, "bfloat16": 2}
FULL = 8  # values that a thread holds at least where its tile is no tiny one


def values(row: Row) -> int:
    """Values of an activation that a thread holds."""
    a, b = map(int, row.tile.split("x"))
    return a * b // (row.warps * (64 if row.target.startswith("gfx") else 32))


@pytest.fixture(scope="module")
def measured() -> list[Row]:
    return compiled_kernels.rows(compiled_kernels.everything())


def test_the_table_is_true(measured):
    table = {row.key: row for row in compiled_kernels.read()}
    assert list(table) == [row.key for row in measured], "run python -m benchmarks compiled-kernels"
    if {row.compiler for row in table.values()} != {COMPILER}:
        pytest.skip(f"the table is of another compiler than {COMPILER}")
    assert list(table.values()) == measured, "run python -m benchmarks compiled-kernels"


def test_activations_move_sixteen_bytes_at_a_time(measured):
    for row in measured:
        width = str(min(16, max(1, values(row)) * ITEM[row.dtype]))
        assert row.load_bytes == width, row
        assert row.store_bytes == ("" if row.kernel.endswith("partial") else width), row


def test_nothing_spills_and_budgets_hold(measured):
    assert [row for row in measured if not row.within_budget] == []


def test_the_budgets_are_tight(measured):
    """Some kernel of each kind takes four fifths of its budget: else plans count on fewer programs than there are."""
    most: dict[tuple[object, ...], float] = defaultdict(float)
    for row in measured:
        if row.even and values(row) >= FULL:
            amd = row.target.startswith("gfx")
            variant = "tiles" if row.variant in ("streaming", "split") else row.variant
            kind = variant, row.family, row.pass_ == "backward", row.register_budget, amd
            most[kind] = max(most[kind], row.registers / row.register_budget)
    assert {kind: share for kind, share in most.items() if share < 0.8} == {}


def test_every_kind_of_kernel_is_compiled_for_every_target(measured):
    for target in TARGETS:
        kinds = {(row.family, row.variant, row.pass_) for row in measured if row.target == target}
        reached = {(family, variant) for family, variant, _ in kinds}
        assert reached >= {("rows", v) for v in ("resident", "streaming", "split", "elementwise")}, target
        assert reached >= {("columns", v) for v in ("resident", "split", "elementwise")}, target


def test_the_command_writes_the_table(monkeypatch, tmp_path):
    chosen = [("gfx942", 0)]
    monkeypatch.setattr(compiled_kernels, "everything", lambda: chosen)
    path = tmp_path / "table.csv"
    result = CliRunner().invoke(cli.app, ["compiled-kernels", "--csv", str(path)])
    assert result.exit_code == 0, result.output
    (row,) = compiled_kernels.read(path)
    assert (row.target, row.spills) == ("gfx942", 0)
    with path.open() as made, TABLE.open() as kept:
        assert next(csv.reader(made)) == next(csv.reader(kept))
