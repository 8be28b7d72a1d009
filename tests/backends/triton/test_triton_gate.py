"""The compile gate: the kernels of known networks' layers for every kind of GPU, held to what the plans promise.

The figures are those of tools/compile_gate/compiled_kernels.csv: ``python -m benchmarks compiled-kernels`` writes it.
Compiled here is what has changed since, by its fingerprint, and one kernel of each name, for one GPU after the other;
``make gate`` compiles all.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from dataclasses import replace
from itertools import product

import pytest
from typer.testing import CliRunner

from benchmarks.commands import app
from benchmarks.profile import compile_offline
from benchmarks.profile.compile_offline import COMPILER, fingerprint, instructions, specialize
from tools import triton_matrix
from tools.compile_gate import table as compiled_kernels
from tools.compile_gate.table import NARROW, OTHERS, PLAIN, RELU, TABLE, TARGETS, LaidOut, Row, asked
from tsbn_kernels.backends.plan import DEVICES
from tsbn_kernels.backends.plan import triton as rules
from tsbn_kernels.backends.triton.kernels import activations

ITEM = {"float32": 4, "bfloat16": 2}
FULL = 8  # values that a thread holds at least where its tile is no tiny one


def values(row: Row) -> int:
    """Values of an activation that a thread holds."""
    a, b = map(int, row.tile.split("x"))
    return a * b // (row.cluster * row.warps * (64 if row.target.startswith("gfx") else 32))


@pytest.fixture(scope="module")
def measured() -> list[Row]:
    chosen, table = compiled_kernels.everything(), compiled_kernels.read()
    known = compiled_kernels.by_fingerprint(table)
    last: dict[str, dict[str, int]] = defaultdict(dict)  # of each kernel and target
    for target, index in chosen:
        last[asked(target)[index].call.launch.kernel][target] = index
    assert len(last) >= len(TARGETS)
    for k, name in enumerate(sorted(last)):
        target, index = list(last[name].items())[k % len(last[name])]
        known[fingerprint(asked(target)[index].call, target)] = compiled_kernels.compiled(target, index)
    return compiled_kernels.rows(chosen, known)


def test_the_table_is_true(measured):
    table = {row.key: row for row in compiled_kernels.read()}
    if {row.compiler for row in table.values()} != {COMPILER}:
        pytest.skip(f"the table is of another compiler than {COMPILER}, by which plans may be others")
    assert list(table) == [row.key for row in measured], "run python -m benchmarks compiled-kernels"
    assert list(table.values()) == measured, "run python -m benchmarks compiled-kernels"


def test_activations_are_moved_as_widely_as_they_are_aligned(measured):
    for row in measured:
        if "layer_norm" in row.kernel or row.kernel.startswith("mixed"):
            continue
        widest = max(1, values(row)) * ITEM[row.dtype]
        if tuple(map(int, row.shape.split("x"))) in NARROW:  # as widely as the planes are aligned
            widest = ITEM[row.dtype] * math.gcd(16, math.prod(map(int, row.shape.split("x")[3:])))
        width = str(min(16, widest))
        sums = row.kernel == "fan_out_sums"
        writes_dresidual = row.kernel == "backward_partial" and row.fused.endswith("residual")
        assert row.load_bytes == ("" if sums else width), row
        nothing = sums or (row.kernel.endswith("partial") and not writes_dresidual)
        assert row.store_bytes == ("" if nothing else width), row


@pytest.mark.parametrize("shape", NARROW)
def test_narrow_planes_take_few_instructions(shape):
    """Those of the whole kernel by the values that a thread holds: 19 to 22 of them."""
    layer = LaidOut("resnet50", shape, "bfloat16", "contiguous", "task_major", PLAIN)
    for pass_ in ("forward", "backward"):
        plan = layer.plan(pass_, DEVICES["H100"])
        (call,) = layer.calls(plan)
        kernel, _ = compile_offline.compile_call(call, "sm_90")
        assert instructions(kernel) <= 25 * plan.tile[0] * plan.tile[1] / plan.threads, pass_


def test_rows_are_read_as_widely_as_they_are_aligned(measured):
    for row in measured:
        if "layer_norm" not in row.kernel:
            continue
        size, block = int(row.shape.split("x")[-1]), int(row.tile.split("x")[-1])
        width = str(min(16, ITEM[row.dtype] * math.gcd(size, 8)))
        merges, whole = row.kernel.endswith("_parameters"), row.pass_ == "forward" or block >= size
        assert row.load_bytes == ("" if merges else width), row
        assert row.store_bytes == (width if whole and not merges else ""), row


def test_samples_are_read_as_widely_as_they_are_aligned(measured):
    """Of a mixed batch: sixteen bytes at a time, but in runs of 25 positions; keys by words of eight bytes at least."""
    for row in measured:
        if row.kernel == "mixed_keys":
            assert row.load_bytes in ("4", "8", "16"), row
            assert row.store_bytes == "", row
        elif row.kernel.startswith("mixed") and "layer_norm" not in row.kernel:
            width = "16" if row.family == "columns" else "4"
            assert row.load_bytes == ("" if row.kernel in ("mixed_statistics", "mixed_sums") else width), row
            assert row.store_bytes == (width if row.kernel in ("mixed_forward", "mixed_gradient") else ""), row


def test_nothing_spills_and_budgets_hold(measured):
    assert [row for row in measured if not row.within_budget] == []


def test_the_budgets_are_tight(measured):
    """Some kernel of each kind takes four fifths of its budget: else plans count on fewer programs than there are."""
    most: dict[tuple[object, ...], float] = defaultdict(float)
    for row in measured:
        if row.even and values(row) >= FULL:
            amd = row.target.startswith("gfx")
            variant = "tiles" if row.variant in ("streaming", "split") else row.variant
            fan_out = row.fused.startswith("fan-out")
            layer_norm = "layer_norm" in row.kernel
            kind = layer_norm, fan_out, variant, row.family, row.pass_ == "backward", row.register_budget, amd
            most[kind] = max(most[kind], row.registers / row.register_budget)
    assert {kind: share for kind, share in most.items() if share < 0.8} == {}


@pytest.mark.parametrize("target", TARGETS)
def test_every_kind_of_kernel_is_compiled_for_every_target(measured, target):
    reached = {(row.fused, row.family, row.variant) for row in measured if row.target == target}
    few = "split", "elementwise"
    for fused in map(str, (PLAIN, RELU, *OTHERS)):
        assert reached >= {(fused, "rows", variant) for variant in ("resident", "streaming", *few)}, fused
        assert reached >= {(fused, "columns", variant) for variant in ("resident", *few)}, fused
        clusters = DEVICES[TARGETS[target]].clusters and rules.compiles_clusters()
        assert ((fused, "rows", "cluster") in reached) == bool(clusters), fused
    for fused in ("fan-out+relu", "fan-out+gelu+residual"):
        assert reached >= {(fused, *kind) for kind in product(("rows", "columns"), few)}, fused
    assert reached >= {("relu+residual", "rows", "resident"), ("relu+residual", "columns", "split")}


def test_what_no_epilogue_ends_is_compiled_once():
    keys = []
    for fused in (PLAIN, RELU):
        layer = LaidOut("segnet", (3, 4, 64, 288, 384), "float32", "channels_last", "task_major", fused)
        calls = layer.calls(layer.plan("forward", DEVICES["H100"]))
        assert [call.launch.kernel for call in calls] == ["forward_partial", "forward_apply"]
        keys.append([(specialize(call, "sm_90").key, fingerprint(call, "sm_90")) for call in calls])
    (plain, other), (same, relu) = keys
    assert plain == same
    assert other[0] != relu[0]
    assert other[1] != relu[1]


def test_what_changed_is_compiled_again(monkeypatch):
    """A row whose fingerprint is of another source, target or compiler does not speak for the kernel."""
    layer = LaidOut("segnet", (3, 4, 64, 288, 384), "float32", "contiguous", "task_major", PLAIN)
    (call, *_) = layer.calls(layer.plan("backward", DEVICES["H100"]))
    prints = [fingerprint(call, target) for target in ("sm_90", "sm_90", "sm_100")]
    monkeypatch.setattr(compile_offline, "COMPILER", "another")
    prints.append(fingerprint(call, "sm_90"))
    monkeypatch.undo()
    monkeypatch.setattr(call.launch.function, "hash", "of another source")
    prints.append(fingerprint(call, "sm_90"))
    assert prints[0] == prints[1]
    assert len(set(prints[1:])) == 4


def test_a_kernel_has_the_source_of_its_own_activation_alone(monkeypatch):
    def prints(fused):
        layer = LaidOut("segnet", (3, 4, 64, 288, 384), "float32", "contiguous", "task_major", fused)
        calls = [call for pass_ in ("eval", "backward") for call in layer.calls(layer.plan(pass_, DEVICES["H100"]))]
        return {fingerprint(call, "sm_90") for call in calls}

    plain, relu = prints(PLAIN), prints(RELU)
    assert not plain & relu
    for changed, same in (("silu", True), ("relu", False)):
        for function in activations.TABLE[changed]:
            monkeypatch.setattr(function, "hash", "of another source")
        assert (prints(PLAIN), prints(RELU) & relu) == (plain, relu if same else set())


def test_the_command_writes_the_table(monkeypatch, tmp_path):
    chosen = [("gfx942", 0)]
    monkeypatch.setattr(compiled_kernels, "everything", lambda: chosen)
    path = tmp_path / "table.csv"
    result = CliRunner().invoke(app.app, ["compiled-kernels", "--csv", str(path)])
    assert result.exit_code == 0, result.output
    (row,) = compiled_kernels.read(path)
    assert (row.target, row.spills) == ("gfx942", 0)
    with path.open() as made, TABLE.open() as kept:
        assert next(csv.reader(made)) == next(csv.reader(kept))


def test_earlier_compilers_are_held_to_the_plans(monkeypatch):
    """Each fault alone fails; four times the planned bytes of shared memory do not, where as many programs fit."""
    row = compiled_kernels.read()[0]
    most = 4 * row.shared_budget
    faults = {"spills": 8}, {"registers": row.register_budget + 1}, {"shared": most + 1}, {"resident_programs": 0}
    made = [replace(row, **changed) for changed in ({}, {"shared": most}, *faults)]
    monkeypatch.setattr(compiled_kernels, "asked", lambda _: [])
    monkeypatch.setattr(compiled_kernels, "rows", lambda *_: made)
    assert triton_matrix.compile_here() == len(faults)
