"""The Triton kernels as compiled: their PTX runs on the CPU, and does and moves what the plans say.

For each variant (resident, streaming, split, elementwise), family and evenness, forward and backward, every dtype runs
once; targets, schedules, stackings, gates and bias go round with them, so that each variant meets each of these.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from support import compiled
from support.problems import (
    DTYPES,
    FORMATS,
    GATES,
    STACKINGS,
    Problem,
    Results,
    assert_matches_definition,
    defined,
    definition,
    in_double,
    in_memory_format,
    problem,
)
from support.tolerances import BACKWARD, FORWARD, assert_within
from torch import Tensor

from benchmarks.records.workloads import CELEBA40
from tools.ptxvm.launch import Violation
from tsbn_kernels.backends.plan import DEVICES, Device, Plan, Work
from tsbn_kernels.backends.plan import triton as rules
from tsbn_kernels.backends.triton import ops as triton_ops
from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.operator.ops import flat

ops = flat(triton_ops)

TARGETS = {"sm_80": "A100", "sm_90": "H100", "sm_100": "B200"}
SCHEDULES = ("forward", "reversed", 1, 2)
VARIANTS = ("resident", "streaming", "split", "elementwise")


class Apart(Device):
    """A GPU whose blocks do not meet."""

    clusters = ()


def toy(variant: str, target: str) -> Device:
    """A GPU whose plans have the variant at small sizes."""
    device = DEVICES[TARGETS[target]]
    if variant == "resident":
        return device
    device = replace(device, block_threads=256)
    if variant == "cluster":
        return device
    device = Apart(**vars(device))
    return replace(device, multiprocessors=16) if variant == "split" else replace(device, multiprocessors=1, threads=64)


# T, N, C and space. What is even fills every tile; what is not ends in the midst of one, in every direction.
SIZES = {
    ("resident", "rows", True): (2, 4, 3, (16, 16)),
    ("resident", "rows", False): (2, 5, 3, (9, 11)),
    ("resident", "columns", True): (2, 8, 32, (4, 4)),
    ("resident", "columns", False): (2, 5, 19, (5, 3)),
    ("streaming", "rows", True): (2, 9, 2, (32, 32)),
    ("streaming", "rows", False): (2, 3, 2, (53, 61)),
    ("streaming", "columns", True): (2, 32, 32, (8, 8)),
    ("streaming", "columns", False): (2, 5, 19, (23, 21)),
    ("split", "rows", True): (2, 9, 2, (32, 32)),
    ("split", "rows", False): (2, 3, 2, (53, 61)),
    ("split", "columns", True): (2, 32, 32, (8, 8)),
    ("split", "columns", False): (2, 5, 19, (23, 21)),
    ("elementwise", "rows", True): (2, 8, 3, (16, 16)),
    ("elementwise", "rows", False): (2, 5, 3, (19, 21)),
    ("elementwise", "columns", True): (2, 32, 32, (8, 8)),
    ("elementwise", "columns", False): (2, 5, 19, (9, 11)),
}


def cases() -> list[object]:
    rounds = zip(
        cycle(TARGETS), cycle(SCHEDULES), cycle(STACKINGS), cycle(GATES), cycle((True, True, False)), strict=False
    )
    found = []
    for variant, family, even in SIZES:
        for dtype in DTYPES:
            target, schedule, stacking, gate, bias = next(rounds)
            name = f"{variant}-{family}-{'even' if even else 'odd'}-{str(dtype)[6:]}-{target}-{schedule}"
            found.append(pytest.param(variant, family, even, dtype, target, schedule, stacking, gate, bias, id=name))
        next(rounds)  # else each dtype would meet but one schedule
    return found


CASES = cases()


def train(p: Problem) -> Results:
    y, mean, var = ops.forward_training(p.x, p.weight, p.bias, *p.options)
    return Results(y, mean, var, *ops.backward(p.dy, p.x, p.weight, mean, var, *p.options, True, True, True, True)[:3])


def assert_traffic(done: compiled.Machine, aligned: bool) -> None:
    """What the machine counted is what the plans claim."""
    reports = iter(done.reports)
    for plan in done.plans:
        made = [next(reports) for _ in range(plan.launches)]
        reads, writes = ([compiled.moved(r, what, True) for r in made] for what in ("load", "store"))
        assert sum(m.bytes for m in reads) == plan.activation_bytes_read
        assert sum(m.bytes for m in writes) == plan.activation_bytes_written
        if aligned:  # every access is fully coalesced
            assert all(m.sectors * 32 == m.bytes for m in (*reads, *writes))
        # Vectors and partial sums: written once, read by each warp of a program, one sector or more at a time.
        reads, writes = ([compiled.moved(r, what, False) for r in made] for what in ("load", "store"))
        assert sum(m.bytes for m in writes) == plan.bytes_written - plan.activation_bytes_written
        claimed = plan.bytes_read - plan.activation_bytes_read
        assert claimed <= sum(m.bytes for m in reads)
        times = max(compiled.allowed_vectors(r, plan.work.family) for r in made)
        assert sum(m.sectors for m in reads) <= claimed // plan.work.parameter_size * plan.warps * times
        assert all(r.conflicts <= compiled.allowed_conflicts(r, plan.work.family) for r in made)
    assert next(reports, None) is None


@pytest.mark.parametrize(
    ("variant", "family", "even", "dtype", "target", "schedule", "stacking", "gate", "bias"), CASES
)
def test_compiled_kernels(variant, family, even, dtype, target, schedule, stacking, gate, bias):
    memory_format = "contiguous" if family == "rows" else "channels_last"
    options = {"dtype": dtype, "stacking": stacking, "memory_format": memory_format, "gate": gate, "bias": bias}
    p = problem(*SIZES[variant, family, even], **options)
    with compiled.machine(toy(variant, target), schedule) as done:
        if variant == "elementwise":
            evaluate(p)
        else:
            assert_matches_definition(p, train(p))
    assert [(q.variant, q.work.family, rules.is_even(q.work, q.tile)) for q in done.plans] == [
        (variant, family, even)
    ] * 2
    assert_traffic(done, aligned=even)


def evaluate(p: Problem) -> None:
    """y and dx by given statistics, which need no sum."""
    q = in_double(p)
    _, mean, var = defined.forward_training(q.x, q.weight, q.bias, *q.options)
    mean, var = (v.to(reference.accumulate_dtype(p.x.dtype)) for v in (mean, var))
    y = ops.forward_eval(p.x, p.weight, p.bias, mean, var, *p.options)
    expected = defined.forward_eval(q.x, q.weight, q.bias, mean.double(), var.double(), *q.options)
    assert_within(y, expected, FORWARD[p.x.dtype], scale=max(1.0, float(expected.abs().max()) / 4))
    needs = False, True, False, False
    dx, dweight, dbias, _ = ops.backward(p.dy, p.x, p.weight, mean, var, *p.options, *needs)
    expected, *_ = defined.backward(q.dy, q.x, q.weight, mean.double(), var.double(), *q.options, *needs)
    assert_within(dx, expected, BACKWARD[p.x.dtype], scale=max(1.0, float(expected.abs().max()) / 4))
    assert dweight.numel() == dbias.numel() == 0


def test_each_variant_meets_each_target_dtype_and_schedule():
    seen: dict[object, list[set[object]]] = {}
    for case in CASES:
        variant, family, even, dtype, target, schedule, stacking, gate, bias = case.values
        values = dtype, target, schedule, gate
        for known, value in zip(seen.setdefault((variant, family, even), [set() for _ in values]), values, strict=True):
            known.add(value)
        for known, value in zip(seen.setdefault(variant, [set() for _ in range(2)]), (stacking, bias), strict=True):
            known.add(value)
    assert len(seen) == 2 * 2 * len(VARIANTS) + len(VARIANTS)
    for key, sets in seen.items():
        sizes = [3, 2] if isinstance(key, str) else [4, 3, 4, 2]
        assert list(map(len, sets)) == sizes, key


# ---- what the round does not reach -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["resident", "streaming", "split"])
@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, True, True), (True, True, False)]
)
def test_only_the_gradients_that_are_asked_for(variant, needs):
    p = problem(*SIZES[variant, "rows", True])
    expected = definition(p)
    with compiled.machine(toy(variant, "sm_90"), 3) as done:
        got = ops.backward(p.dy, p.x, p.weight, expected.mean.float(), expected.var.float(), *p.options, True, *needs)
    for need, value, wanted in zip(needs, got[:3], expected[3:], strict=True):
        assert value.numel() == (wanted.numel() if need else 0)
        if need:
            assert_within(value, wanted, BACKWARD[torch.float32], scale=max(1.0, float(wanted.abs().max())))
    assert done.plans[0].variant == variant
    assert_traffic(done, aligned=True)


@pytest.mark.parametrize("variant", ["resident", "streaming", "split"])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_backward_in_evaluation(variant, memory_format):
    family = "rows" if memory_format == "contiguous" else "columns"
    p = problem(*SIZES[variant, family, False], dtype=torch.bfloat16, memory_format=memory_format)
    q, statistics = in_double(p), definition(p)[1:3]
    with compiled.machine(toy(variant, "sm_100"), "reversed") as done:
        mean, var = (v.float() for v in statistics)
        got = ops.backward(p.dy, p.x, p.weight, mean, var, *p.options, False, True, True, True)
    expected = defined.backward(q.dy, q.x, q.weight, mean.double(), var.double(), *q.options, False, True, True, True)
    for value, wanted in zip(got[:3], expected[:3], strict=True):
        assert_within(value, wanted, BACKWARD[value.dtype], scale=max(1.0, float(wanted.abs().max())))
    assert done.plans[0].variant == variant
    assert_traffic(done, aligned=False)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("variant", ["resident", "split"])
def test_an_input_that_all_tasks_share(variant, memory_format):
    family = "rows" if memory_format == "contiguous" else "columns"
    p = problem(*SIZES[variant, family, True], stacking="task_axis", memory_format=memory_format)
    p = p._replace(x=p.x[:1].expand(p.x.shape))
    with compiled.machine(toy(variant, "sm_80"), 4) as done:
        assert_matches_definition(p, train(p))
    assert all(plan.work.expanded for plan in done.plans)
    assert_traffic(done, aligned=True)


@pytest.mark.parametrize(("variant", "dtype"), [("resident", torch.bfloat16), ("streaming", torch.float32)])
def test_an_input_that_begins_anywhere(variant, dtype):
    p = problem(*SIZES[variant, "rows", True], dtype=dtype)

    def moved(t: Tensor) -> Tensor:
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    p = p._replace(x=moved(p.x), dy=moved(p.dy))
    assert p.x.data_ptr() % 16
    with compiled.machine(toy(variant, "sm_90")) as done:
        assert_matches_definition(p, train(p))
    assert_traffic(done, aligned=False)


@pytest.mark.parametrize("size", [7, 14, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_planes_of_any_alignment(size, dtype):
    """Steps between samples are constants where planes are aligned to less than 8 bytes."""
    p = problem(2, 8 if size == 14 else 5, 2, (size, size), dtype=dtype, bias=True)
    with compiled.machine(toy("resident", "sm_90"), "reversed") as done:
        assert_matches_definition(p, train(p))
    assert {plan.variant for plan in done.plans} == {"resident"}
    assert_traffic(done, aligned=False)


def test_a_gradient_in_another_order_than_the_input():
    p = problem(*SIZES["resident", "columns", True], memory_format="channels_last", stacking="sample_major")
    p = p._replace(dy=in_memory_format(p.dy, p.stacking, "contiguous"))
    with compiled.machine(toy("resident", "sm_90"), 5):
        assert_matches_definition(p, train(p))


# ---- traffic of the workload -------------------------------------------------------------------------------------


def plans(direction: str, columns: bool) -> list[tuple[str, Plan]]:
    found = []
    for layer in CELEBA40:
        family = "columns" if columns or layer.size is None else "rows"
        work = Work(40, 256, layer.channels, math.prod(layer.size or ()), 2, family, direction)
        found += [(name, rules.plan(work, DEVICES["H100"])) for name in layer.names]
    return found


@pytest.mark.parametrize("columns", [False, True])
def test_reads_and_writes_of_the_celeba_layers(columns):
    for direction, least in (("forward", 1), ("backward", 2)):
        for _, plan in plans(direction, columns):
            size = plan.work.activation_bytes
            once = plan.variant in ("resident", "cluster")
            assert plan.activation_bytes_read == (1 if once else 2) * least * size
            assert plan.activation_bytes_written == size


def test_which_celeba_layers_stay_on_chip():
    kept = dict.fromkeys(("bn6", "bn7", "bn8", "bn9"), "resident")
    if rules.compiles_clusters():
        kept |= dict.fromkeys(("bn2", "bn3", "bn4", "bn5"), "cluster")
    for direction in ("forward", "backward"):
        variants = {name: plan.variant for name, plan in plans(direction, columns=False)}
        assert {name: variant for name, variant in variants.items() if variant != "streaming"} == kept


# ---- broken on purpose -------------------------------------------------------------------------------------------

MUTANTS = {
    "reads past the end": (
        "tiles", "& (s < whole_runs(slab.S, tile))", "& (s <= whole_runs(slab.S, tile))", "resident", "rows", False,
        "race|out of",
    ),
    "walks one tile too far": (
        "backward", "        end = tl.minimum(first + share,", "        end = tl.minimum(first + share + 1,", "split",
        "rows", True, "race|write count",
    ),
    "every split writes the statistics": (
        "forward", "        if split == 0:", "        if split >= 0:", "split", "columns", True, "race|write count"
    ),
    "leaves out what parts the splits' means": (
        "statistics", " + deviation * deviation * before * share", "", "split", "columns", False, "relative|out of"
    ),
    "pairs the sums wrongly": (
        "tiles", "return a + c, b + d", "return a + d, b + c", "resident", "columns", True, "out",
    ),
    "sums one of two twice": ("tiles", "of_threads(b, tile)", "of_threads(a, tile)", "resident", "rows", True, "out"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, tmp_path, monkeypatch):
    module, text, broken, variant, family, even, message = MUTANTS[name]
    compiled.break_kernel(module, text, broken, tmp_path, monkeypatch)
    p = problem(*SIZES[variant, family, even], memory_format="contiguous" if family == "rows" else "channels_last")
    with (
        compiled.machine(toy(variant, "sm_90")),
        pytest.raises((Violation, AssertionError), match=message),
    ):
        assert_matches_definition(p, train(p))


def test_a_missing_barrier_is_caught():
    p = problem(*SIZES["streaming", "rows", True])
    with (
        compiled.without_barriers(),
        compiled.machine(toy("streaming", "sm_90")),
        pytest.raises(Violation, match=r"race|unwritten"),
    ):
        train(p)
