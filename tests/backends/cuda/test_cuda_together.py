"""Kernels whose blocks run all at a time: what is theirs alone. test_cuda_kernels shows the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from typing import Any

import cuda_cases
import cuda_machine
import pytest
import torch
from cuda_machine import H100, Backward, Forward, backward, counted, forward
from cuda_source import Broken
from support.problems import Problem, Results, assert_matches_definition, definition, problem
from support.tolerances import BACKWARD, FORWARD, assert_same_bits, assert_within

from tools.ptxvm import Violation, find_nvcc, launch
from tsbn_kernels.backends.plan import Work
from tsbn_kernels.backends.plan import cuda as rules

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")


def case() -> Problem:
    """Four slabs, two of 64 and two of 16 channels; of 512 and of 512 slots."""
    return problem(2, 4, 80, (16, 8), dtype=torch.bfloat16, memory_format="channels_last")


def both(p: Problem, parts: int, **options: Any) -> tuple[Forward, Backward]:
    options["code"] = BROKEN[None]
    there = forward(p, "together", parts, **options)
    return there, backward(p, there.mean, there.var, "together", parts, **options)


@pytest.mark.parametrize(("parts", "teams", "most_lanes", "kept"), [(5, 3, 3, 64), (3, 2, 2, 1 << 20), (40, 1, 3, 0)])
def test_teams(parts: int, teams: int, most_lanes: int, kept: int) -> None:
    """Rounds that not all teams have work for, narrow slabs, parts without a slot: right, the same bits in every order,
    and the bytes of the plan."""
    p, first = case(), None
    for schedule in ("forward", "reversed", 1):
        options = {"teams": teams, "most_lanes": most_lanes, "resident": kept, "threads": 64, "schedule": schedule}
        there, back = found = both(p, parts, **options)
        assert there.plan.programs == teams * parts
        for result in found:
            assert counted(result) == (result.plan.bytes_read, result.plan.bytes_written)
        tensors = there.y, there.mean, there.var, back.dx, back.dweight, back.dbias
        assert_matches_definition(p, Results(*tensors))  # type: ignore[arg-type]
        first = first or tensors
        for one, other in zip(first, tensors, strict=True):
            assert one is not None and other is not None
            assert_same_bits(one, other)


VIOLATIONS = {
    "blocks that do not meet": ("      meet(counters + slab, parts);\n", "", "race"),
    "blocks that do not meet at first": ("cooperative_groups::this_grid().sync();", "__syncthreads();", "race"),
    "blocks that take what is not merged yet": ("    meet(counters + slab, first ? parts : 2 * parts);\n", "", "race"),
    "a block that comes before its threads are done": (
        "uint32_t all) {\n    __syncthreads();\n",
        "uint32_t all) {\n",
        "race",
    ),
    "threads that go on before their block does": (
        "    }\n    __syncthreads();\n  }\n  // Blocks that share",
        "    }\n  }\n  // Blocks that share",
        "race",
    ),
    "a block that goes on before the last one has come": ("met < all;", "met + 1 < all;", "race"),
    "a block that waits for one too many": ("met < all;", "met <= all;", "deadlock"),
    "a counter that nobody sets to 0": ("k < slabs;", "k + 1 < slabs;", "deadlock"),
}
# What a thread keeps in registers, and what lies behind that in shared memory.
MISPLACED = {
    "the first slot in the place of all that are held": ("value = held[h];", "value = held[0];"),
    "a single slot that nobody held": ("if (h % U == u && k", "if (U > 1 && h % U == u && k"),
    "a step behind the end of shared memory": (" : 0) - before;", " : 0) - before + blockDim.x;"),
    "gradients in the place of x": ("kept_dy(shared, p.n.resident, 1)", "kept_dy(shared, p.n.resident, 0)"),
    "fewer slots held than are planned": ("kHeldSlots = 6", "kHeldSlots = 4"),
}  # fmt: skip
OVERTAKEN = "shared memory that is used again before it has been read"
FORWARD_KERNEL, BACKWARD_KERNEL = "forward_together_bf16_columns", "backward_together_bf16_columns"
EPILOGUE_KERNEL = "backward_epilogue_together_bf16_columns"
# The kernels of all tests here: the others need not be compiled.
BROKEN = Broken(
    {name: (old, new, FORWARD_KERNEL) for name, (old, new, _) in VIOLATIONS.items()}
    | {name: (*change, FORWARD_KERNEL, BACKWARD_KERNEL) for name, change in MISPLACED.items()}
    | {OVERTAKEN: ("    __syncthreads();  // what is in shared memory has been read\n", "", EPILOGUE_KERNEL)},
    FORWARD_KERNEL,
    BACKWARD_KERNEL,
    EPILOGUE_KERNEL,
)


@pytest.mark.parametrize("name", VIOLATIONS)
def test_violation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, kind = VIOLATIONS[name]
    monkeypatch.setattr(cuda_machine, "launch", lambda *a, **options: launch(*a, **options, patience=500_000))

    def run() -> None:
        for schedule, threads in itertools.product(("forward", "reversed", 1, 2), (64, 128)):
            forward(case(), "together", 3, teams=2, schedule=schedule, threads=threads, code=BROKEN[name])

    with pytest.raises(Violation, match=kind):
        run()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("red.release.gpu", "red.relaxed.gpu"),
        ("red.release.gpu", "red.release.cta"),
        ("ld.acquire.gpu", "ld.relaxed.gpu"),
        ("ld.acquire.gpu", "ld.acquire.cta"),
    ],
)
def test_order_of_memory(old: str, new: str) -> None:
    """What a block leaves is released to the whole device, and acquired from it."""
    whole = BROKEN[None]
    assert f"{old}.global" in whole
    code = whole.replace(f"{old}.global", f"{new}.global")
    with pytest.raises(Violation, match="race"):
        forward(case(), "together", 3, teams=2, threads=64, code=code)


def test_shared_memory_is_used_again_when_it_has_been_read() -> None:
    """The biases of the next slab, beside the last gradients of this one."""
    p, epilogue = cuda_cases.case("silu", False, 2, 4, 80, (16, 8), dtype=torch.bfloat16, memory_format="channels_last")
    wanted = cuda_cases.exact(p, epilogue)
    options = {"teams": 2, "threads": 64, "epilogue": epilogue, "need": (True, True, True, True)}
    for name in (None, OVERTAKEN):
        with pytest.raises(Violation, match="race") if name else contextlib.nullcontext():
            back = backward(p, wanted.mean.float(), wanted.var.float(), "together", 3, code=BROKEN[name], **options)  # type: ignore[arg-type]
            cuda_cases.check_gradients(p, back, wanted)


def test_a_device_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver refuses a grid that does not run at a time; launched all the same, it would wait for ever."""
    for together, error, told in ((True, ValueError, "runs 5 at a time"), (False, Violation, "deadlock")):
        options = {"cooperative": together, "resident": 5, "patience": 500_000}
        monkeypatch.setattr(cuda_machine, "launch", lambda *a, **most: launch(*a, **most | options))  # noqa: B023
        with pytest.raises(error, match=told):
            forward(case(), "together", 3, teams=2, threads=64, code=BROKEN[None])


@pytest.mark.parametrize("name", [None, *MISPLACED])
def test_slots_in_registers(name: str | None) -> None:
    """Kept in the wrong place, slots are wrong, not there, or overwrite one another."""
    p, wanted = case(), definition(case())
    options: dict[str, Any] = {"teams": 3, "threads": 64, "code": BROKEN[name]}

    def run() -> None:
        for parts, kept in ((5, 640), (9, 1 << 20)):
            there = forward(p, "together", parts, resident=kept, **options)
            assert_within(there.y, wanted.y, FORWARD[p.x.dtype])
            back = backward(p, there.mean, there.var, "together", parts, resident=kept, **options)
            assert back.dx is not None
            assert_within(back.dx, wanted.dx, BACKWARD[p.x.dtype])
            assert counted(there) == (there.plan.bytes_read, there.plan.bytes_written)
            assert counted(back) == (back.plan.bytes_read, back.plan.bytes_written)

    with pytest.raises((AssertionError, Violation)) if name else contextlib.nullcontext():
        run()


# Layers of CelebA with a batch of 256, by C and S: what is read of x, or of x and dy together, on an H100 in bfloat16.
READS = {1: (64, 4096, 1.47, 3.47), 2: (128, 1024, 1.0, 2.0), 4: (256, 256, 1.0, 2.0), 6: (512, 64, 1.0, 2.0)}


@pytest.mark.parametrize("layer", READS)
def test_celeba_layers(layer: int) -> None:
    C, S, *most = READS[layer]
    for direction, reads in zip(("forward", "backward"), most, strict=True):
        work = Work(40, 256, C, S, 2, "columns", direction)  # type: ignore[arg-type]
        plan = rules.plan(work, H100)
        assert plan.activation_bytes_read <= reads * work.activation_bytes
        assert plan.activation_bytes_written == work.activation_bytes
        assert plan.bytes_read - plan.activation_bytes_read < 0.025 * work.activation_bytes
        assert plan.launches == 1
        assert plan.programs <= H100.multiprocessors * plan.resident_programs


def test_devices_without_it_split() -> None:
    """Where the driver runs no blocks together, or fewer than are planned."""
    work = Work(40, 256, 128, 1024, 2, "columns")
    chosen = rules.plan(work, H100)
    assert chosen.teams > 0
    for room in (0, chosen.programs - 1):

        def driver(plan: rules.CudaPlan) -> int:
            return room if plan.teams else rules.clusters_on_paper(plan)  # noqa: B023

        found = rules.plan.__wrapped__(work, H100, driver)
        assert found.programs <= room if found.teams else found.variant == "split"
    with pytest.raises(ValueError, match="columns, not rows"):
        rules.lay_out(Work(2, 8, 8, 64, 2), H100, "together", 2, teams=2)


# A seventieth of a layer, by its channels and positions of a sample, and what is read of it as of the whole layer.
SCALED = {1: (32, 168, 1.5, 3.5), 3: (64, 41, 1.0, 2.0), 4: (64, 10, 1.0, 2.0)}


@pytest.mark.parametrize("layer", SCALED)
def test_layers_of_celeba_scaled(layer: int) -> None:
    """A batch and a device, both small: the rules plan as for the whole, and the machine counts what they say."""
    small = dataclasses.replace(
        H100,
        target="sm_80",
        multiprocessors=4,
        shared_memory=96 << 10,
        block_shared_memory=95 << 10,
        bandwidth=H100.bandwidth / 70,
    )
    C, rows, *reads = SCALED[layer]
    p = problem(64 // C, 4, C, (rows, 24), dtype=torch.bfloat16, memory_format="channels_last", bias=False)
    work = Work(p.num_tasks, 4, C, 24 * rows, 2, "columns", needs_dbias=True)
    plans = [rules.plan(dataclasses.replace(work, direction=d), small) for d in ("forward", "backward")]
    options = [{"teams": one.teams, "most_lanes": one.most_lanes, "shared": one.shared_bytes} for one in plans]
    there = forward(p, plans[0].variant, plans[0].parts, code=BROKEN[None], **options[0])  # type: ignore[arg-type]
    back = backward(p, there.mean, there.var, plans[1].variant, plans[1].parts, code=BROKEN[None], **options[1])  # type: ignore[arg-type]
    for result, plan, most in zip((there, back), plans, reads, strict=True):
        assert plan.teams > 0
        assert counted(result) == (plan.bytes_read, plan.bytes_written)
        assert plan.activation_bytes_read <= most * p.x.nbytes
        assert plan.activation_bytes_written == p.x.nbytes
