"""Clusters: slabs of rows that several blocks keep in their registers, in the interpreter and as compiled.

The interpreter takes a cluster for one program. In the PTX machine its blocks read one another's shared memory.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.problems import STACKINGS, Results, assert_matches_definition, definition, problem
from support.tolerances import Tolerance, assert_within

pytest.importorskip("triton")
from support import compiled
from support.fused import Epilogue, assert_equals_reference, fused
from support.interpreter import device, interpreted, passes
from test_triton_compiled import assert_traffic, toy, train
from test_triton_running import copied, running

from tools.ptxvm import Violation
from tsbn_kernels.backends import triton as backend
from tsbn_kernels.backends.fallback import Health, KernelError
from tsbn_kernels.backends.plan import DEVICES, Plan, Work
from tsbn_kernels.backends.plan import triton as rules
from tsbn_kernels.backends.triton import launch as launches
from tsbn_kernels.backends.triton import ops as triton_ops
from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.definition.activations import ACTIVATIONS
from tsbn_kernels.definition.options import Options
from tsbn_kernels.operator.ops import flat

pytestmark = pytest.mark.skipif(not rules.compiles_clusters(), reason="this Triton compiles no clusters")

ops = flat(triton_ops)
H100 = DEVICES["H100"]

# T, N, C and space. All but the first end within a block, in either direction.
SIZES = {
    "even": (2, 64, 2, (16, 16)),
    "odd": (2, 60, 3, (11, 16)),
    "narrow": (2, 31, 2, (9, 15)),
    "one sample": (1, 1, 2, (91, 93)),
    "wide": (1, 61, 2, (14, 32)),
}


@pytest.fixture(params=[0])
def clusters(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are made by clusters: the smallest that keep the slab, or the largest (-1)."""

    def choose(plan: Plan, _: object) -> Plan:
        return list(rules.in_clusters(plan.work, plan.device))[request.param]

    monkeypatch.setattr(triton_ops, "choose", choose)


# ---- in the interpreter ------------------------------------------------------------------------------------------

EPILOGUES: tuple[Epilogue, ...] = (*product(("none", *ACTIVATIONS), (False, True)),)


@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize(
    ("epilogue", "name", "dtype", "stacking"),
    list(
        zip(
            EPILOGUES, cycle(("odd", "narrow")), cycle((torch.float32, torch.bfloat16, torch.float16)), cycle(STACKINGS)
        )
    ),
)
def test_in_the_interpreter(epilogue: Epilogue, name: str, dtype: torch.dtype, stacking: str) -> None:
    with interpreted(device(threads=256)):
        assert_equals_reference(fused(*SIZES[name], epilogue=epilogue, dtype=dtype, stacking=stacking))
        assert {one.plan.variant for one in passes()} == {"cluster"}


@pytest.mark.usefixtures("clusters")
def test_means_that_are_far_from_zero() -> None:
    """What rounding takes from the first mean is found: in y, and of a constant in the variance."""
    p = problem(*SIZES["odd"])
    with interpreted(device(threads=256)):
        far = p._replace(x=p.x + 1000)
        y, mean, _ = ops.forward_training(far.x, p.weight, p.bias, *p.options)
        wanted = definition(far)
        assert_within(y, wanted.y, Tolerance(1e-5, 0), 4.0)
        assert_within(mean, wanted.mean, Tolerance(1e-7, 0), 1000.0)
        constant = torch.full_like(p.x, 77777.7)
        assert (ops.forward_training(constant, p.weight, p.bias, *p.options)[2] < 1e-10).all()
        assert {one.plan.variant for one in passes()} == {"cluster"}


@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("momentum", [0.25, None])
@pytest.mark.parametrize("some", [False, True])
def test_running_statistics(momentum: float | None, some: bool) -> None:
    p = problem(*SIZES["odd"])
    got = running(2, 3, momentum, some, torch.float32)
    wanted = copied(got)
    for _ in range(2):
        with interpreted(device(threads=256)):
            triton_ops.forward_tracked(p.x, p.weight, p.bias, None, got, Options(*p.options))
            assert {one.plan.variant for one in passes()} == {"cluster"}
        reference.forward_tracked(p.x, p.weight, p.bias, None, wanted, Options(*p.options))
    torch.testing.assert_close(list(got[:3]), list(wanted[:3]))


# ---- as compiled -------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCHEDULES = ("forward", "reversed", 1, 2)


def cases() -> list[Any]:
    """Each size in each dtype; sizes of clusters, targets, schedules, stackings and bias go round."""
    rounds = zip(
        cycle((0, -1)),
        cycle(("sm_90", "sm_100", "sm_90")),
        cycle(SCHEDULES),
        cycle(STACKINGS),
        cycle((True, False)),
        strict=False,
    )
    found = []
    for (name, dtype), (which, target, schedule, *options) in zip(product(SIZES, DTYPES), rounds, strict=False):
        title = f"{name}-{str(dtype)[6:]}-{target}-{schedule}"
        found.append(pytest.param(which, name, dtype, target, schedule, *options, id=title))
    return found


@pytest.mark.parametrize(
    ("clusters", "name", "dtype", "target", "schedule", "stacking", "bias"), cases(), indirect=["clusters"]
)
@pytest.mark.usefixtures("clusters")
def test_compiled(name: str, dtype: torch.dtype, target: str, schedule: Any, stacking: str, bias: bool) -> None:
    """Results; each activation is read and written once, vectors by each block, and all is coalesced."""
    p = problem(*SIZES[name], dtype=dtype, stacking=stacking, bias=bias)
    with compiled.machine(toy("cluster", target), schedule) as done:
        assert_matches_definition(p, train(p))
    for plan in done.plans:
        assert plan.variant == "cluster"
        assert plan.activation_bytes_read == plan.work.bytes_to_read
    assert [report.cluster for report in done.reports] == [(plan.cluster, 1, 1) for plan in done.plans]
    assert_traffic(done, aligned=name == "even")


def test_two_runs_have_the_same_bits() -> None:
    """In whatever order blocks and warps run; of a batch's count too, which the last program of a task writes."""
    p, found = problem(*SIZES["odd"]), []
    for schedule in SCHEDULES:
        got = running(2, 3, None, True, torch.float32)
        with compiled.machine(toy("cluster", "sm_90"), schedule) as done:
            y, mean, var = triton_ops.forward_tracked(p.x, p.weight, p.bias, None, got, Options(*p.options))
            gradients = ops.backward(p.dy, p.x, p.weight, mean, var, *p.options, True, True, True, True)
        assert {plan.variant for plan in done.plans} == {"cluster"}
        found.append([y, mean, var, *gradients[:3], *got[:3]])
    wanted = running(2, 3, None, True, torch.float32)
    reference.forward_tracked(p.x, p.weight, p.bias, None, wanted, Options(*p.options))
    torch.testing.assert_close(found[0][-3:], list(wanted[:3]))
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_as_compiled(momentum: float | None) -> None:
    p = problem(*SIZES["odd"], dtype=torch.bfloat16)
    got = running(2, 3, momentum, False, torch.float32)
    wanted = copied(got)
    for schedule in ("reversed", 3):
        with compiled.machine(toy("cluster", "sm_100"), schedule) as done:
            triton_ops.forward_tracked(p.x, p.weight, p.bias, None, got, Options(*p.options))
        assert [plan.variant for plan in done.plans] == ["cluster"]
        reference.forward_tracked(p.x, p.weight, p.bias, None, wanted, Options(*p.options))
    torch.testing.assert_close(list(got[:3]), list(wanted[:3]))


COMPILED = [("relu", True), ("silu", False), ("gelu", True), ("none", True)]


@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize(("epilogue", "name"), list(zip(COMPILED, SIZES, strict=False)))
def test_an_epilogue_as_compiled(epilogue: Epilogue, name: str) -> None:
    with compiled.machine(toy("cluster", "sm_90"), 2) as done:
        assert_equals_reference(fused(*SIZES[name], epilogue=epilogue, dtype=torch.bfloat16, stacking="sample_major"))
    assert {plan.variant for plan in done.plans} == {"cluster"}
    assert_traffic(done, aligned=name == "even")


# ---- broken on purpose -------------------------------------------------------------------------------------------

# Of the kernels, and of their PTX.
MUTANTS = {
    "sums one of two twice": ("dots = total(gradient * deviation, tile)", "dots = total(gradient, tile)", "out of"),
    "an earlier count, which others still fetch": (
        "    counted = None if momentum is None else batches\n", "    counted = batches\n", "race"
    ),
    "running statistics are read late": (
        "    track(running_mean,",
        "    before = tracked(running_mean, running_var, None, 0.0, rows, slab, tile)\n    track(running_mean,",
        "race",
    ),
}  # fmt: skip
REWRITTEN = {
    "a block sums what it has itself": (
        r"mapa\.shared::cluster\.u32(\s+%r\d+, %r\d+), %r\d+;",
        r"mov.u32 \1;",
        "out of",
    ),
    "no block waits for the others": (r"barrier\.cluster\.", "// barrier.cluster.", "race|unwritten|exited"),
}


def track_and_train() -> None:
    p, given = problem(*SIZES["odd"]), running(2, 3, None, False, torch.float32)
    with compiled.machine(toy("cluster", "sm_90"), "reversed"):
        found = triton_ops.forward_tracked(p.x, p.weight, p.bias, None, given, Options(*p.options))
        gradients = ops.backward(p.dy, p.x, p.weight, *found[1:], *p.options, True, True, True, True)
    assert_matches_definition(p, Results(*found, *gradients[:3]))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    track_and_train()
    text, broken, message = MUTANTS[name]
    compiled.break_kernel("cluster", text, broken, tmp_path, monkeypatch)
    with pytest.raises((Violation, AssertionError), match=message):
        track_and_train()


@pytest.mark.parametrize("name", REWRITTEN)
def test_blocks_that_do_not_meet_are_caught(name: str) -> None:
    pattern, text, message = REWRITTEN[name]
    with compiled.rewritten(pattern, text), pytest.raises((Violation, AssertionError), match=message):
        track_and_train()


# ---- plans, and the way back -------------------------------------------------------------------------------------


def test_the_largest_slabs_of_a_cluster() -> None:
    """524,288 values forward and half as many backward: in sixteen blocks of as many threads as there may be.

    A block has 64 KiB of loads under way, and waits for each sum by itself.
    """
    for direction, samples, sums in (("forward", 512, 3), ("backward", 256, 2)):
        work = Work(40, samples, 64, 1024, 2, direction=direction)  # type: ignore[arg-type]
        plan = rules.plan(work, H100)
        assert (plan.variant, plan.cluster, plan.threads) == ("cluster", 16, 1024)
        assert (plan.programs, plan.bytes_in_flight, plan.exchanges) == (16 * plan.slabs, 1 << 16, sums)
        assert rules.plan(replace(work, samples=2 * samples), H100).variant != "cluster"
        assert rules.plan(work, DEVICES["A100"]).variant != "cluster"  # whose blocks do not meet
        assert max(one.cluster for one in rules.in_clusters(replace(work, samples=64), DEVICES["RTX5090"])) == 8


def test_a_block_has_the_registers_that_its_kernel_needs() -> None:
    """Fewer spill. With more of them than 64 a block has at most 512 threads."""
    of_threads = {}
    for activation in ("none", "relu"):
        work = Work(40, 256, 128, 1024, 4, activation=activation)
        of_threads[activation] = [(one.cluster, one.threads, one.registers) for one in rules.in_clusters(work, H100)]
    assert of_threads == {"none": [(8, 1024, 64), (16, 512, 64)], "relu": [(16, 512, 80)]}


def test_earlier_versions_of_triton_compile_none(monkeypatch: pytest.MonkeyPatch) -> None:
    known = rules.compiles_clusters.__wrapped__
    for version, compiles in (
        ("3.6.0", False),
        ("3.7.1", False),
        ("3.8.0", True),
        ("3.10.0+git1", True),
        ("4.0.0", True),
    ):
        monkeypatch.setattr(rules.importlib.metadata, "version", lambda _, told=version: told)
        assert known() == compiles
    monkeypatch.setattr(rules, "compiles_clusters", lambda: False)
    assert rules.plan(Work(40, 256, 64, 1024, 2), H100).variant == "streaming"


@pytest.mark.parametrize("own", [True, False])
def test_a_device_that_refuses_clusters(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such passes are split from then on, with one warning for each kernel, and right."""
    monkeypatch.setattr(backend, "health", health := Health("Triton"))
    monkeypatch.setattr(triton_ops, "_unclustered", set())
    asked, call = [], launches.Launch.__call__

    def refuse(launch: launches.Launch, *arguments: Any) -> None:
        asked.append(launch.kernel)
        if launch.kernel.endswith("cluster"):
            raise KernelError(launch.kernel, "RuntimeError: Triton Error [CUDA]: cluster misconfiguration", own)
        call(launch, *arguments)

    monkeypatch.setattr(launches.Launch, "__call__", refuse)
    p = problem(*SIZES["odd"])
    with interpreted(device(threads=256, multiprocessors=132)), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        if not own:  # what all kernels need
            with pytest.raises(KernelError):
                train(p)
            assert not health.failures
            return
        for _ in range(2):
            assert_matches_definition(p, train(p))
    of_each = [
        f"{direction}_{part}" for direction in ("forward", "backward") for part in ("cluster", "partial", "apply")
    ]
    assert asked == of_each + [kernel for kernel in of_each if not kernel.endswith("cluster")]
    assert [str(one.message).partition(",")[0] for one in heard] == [
        f"tsbn-kernels runs without the kernel {direction}_cluster of Triton" for direction in ("forward", "backward")
    ]
