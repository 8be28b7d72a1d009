"""The CUDA C++ kernels of mixed batches, and the launches of one half of a split, in the PTX machine."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from cuda_source import Broken
from hypothesis import given
from hypothesis import strategies as st
from obedient import Machine, obedient
from support.epilogues import make_call
from support.mixed_calls import ALL_OF_ONE, Call
from support.problems import FORMATS
from support.synchronized_calls import assert_correct
from support.tolerances import assert_same_bits

from tools.ptxvm import Violation, find_nvcc
from tsbn_kernels.backends import cuda
from tsbn_kernels.backends.order import order_of
from tsbn_kernels.backends.plan import DEVICES
from tsbn_kernels.backends.plan.mixed import MixedWork
from tsbn_kernels.backends.plan.mixed_cuda import MixedCudaPlan, plan
from tsbn_kernels.backends.plan.slots import cut
from tsbn_kernels.definition import mixed_batch_norm as reference
from tsbn_kernels.definition.options import Needs
from tsbn_kernels.operator.mixed_ops import eager_operators
from tsbn_kernels.operator.ops import flat

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")
MANY, UNEVEN = (5, 0, 70, 2), (9, 0, 300, 2)


def check_traffic(machine: Machine, counts: tuple[int, ...]) -> None:
    """Activations move as planned, where slots have 16 bytes; vectors, keys and sums at most so much."""
    reports = iter(machine.reports)
    for one in machine.plans:
        assert isinstance(one, MixedCudaPlan)
        made, work = [next(reports) for _ in range(one.launches)], one.work
        rows = [row for report in made for row in report.rows if row.space == "global" and row.bytes]
        slots = [row for row in rows if row.bytes == 16 * row.threads]
        keyed = [report.global_read.bytes for report in made if "keys" in report.kernel]
        states = work.reduces and not work.backward  # these have 16 bytes too
        blocks = [-(-samples // one.block) for samples in counts]
        size = states * 16 * cut(work).tiles * cut(work).width
        read = sum(row.bytes for row in slots if row.operation == "ld") - size * sum(n * n for n in blocks)
        read += sum(keyed) - max(0, len(keyed) - 1) * 8 * work.samples
        written = sum(row.bytes for row in slots if row.operation == "st") - size * sum(blocks)
        assert (read, written) == (one.activation_bytes_read, one.activation_bytes_written)
        assert sum(r.global_written.bytes for r in made) <= one.activation_bytes_written + one.vector_bytes_written
        sectors = sum(row.sectors for row in rows if row.operation == "ld" and row not in slots)
        assert sectors <= one.vector_bytes_read // work.parameter_size * one.warps
    assert next(reports, None) is None


# ---- numbers and bytes -----------------------------------------------------------------------------------------------


@needs_nvcc
@pytest.mark.parametrize(
    ("schedule", "counts", "shape", "options"),
    [
        ("reversed", UNEVEN, (72,), {"dtype": torch.bfloat16, "activation": "relu"}),
        (3, ALL_OF_ONE, (8, 2, 2), {"memory_format": "channels_last", "activation": "silu"}),
        ("forward", MANY, (3, 4, 4), {"dtype": torch.float16, "activation": "gelu"}),
        (1, MANY, (20,), {}),
    ],
)
def test_equals_the_definition(
    schedule: str | int, counts: tuple[int, ...], shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    chosen = eager_operators("cuda")
    with obedient(schedule=schedule) as machine:
        call = Call(counts, shape, **options)
        call.check(chosen)
        call.check(chosen, training=False)
    check_traffic(machine, counts)
    assert len(machine.plans) == 5


@needs_nvcc
@pytest.mark.parametrize(
    ("counts", "shape", "options"),
    [
        (MANY, (5, 7), {"dtype": torch.bfloat16, "activation": "relu", "mean": 100.0}),
        (ALL_OF_ONE, (19, 3), {"memory_format": "channels_last", "dtype": torch.float64}),
    ],
)
def test_what_does_not_fill_slots(counts: tuple[int, ...], shape: tuple[int, ...], options: dict[str, Any]) -> None:
    with obedient() as machine:
        Call(counts, shape, **options).check(cuda)
    assert {one.cut.access for one in machine.plans} == {"scalar"}


@needs_nvcc
def test_no_order_of_the_samples_changes_a_bit() -> None:
    """Nor does what runs first; some samples of a task are equal in x, and differ in dy or the residual alone."""
    for call in (Call(MANY, (40,)), Call(MANY, (3, 7), torch.bfloat16, "silu")):
        call.x[::2] = call.x[0]
        order, results = torch.randperm(len(call.index)), []
        for schedule, other in ((2, call), ("reversed", call), ("forward", call.permuted(order))):
            with obedient(schedule=schedule):
                found = [result for part in other.run(cuda) for result in part if result is not None]
            alike = [result.shape == call.x.shape for result in found]
            whole = zip(found, alike, strict=True)
            results.append([r[order] if like and other is call else r for r, like in whole])
        for first, *others in zip(*results, strict=True):
            for one in others:
                assert_same_bits(first, one)


@needs_nvcc
def test_gradients_that_are_not_needed() -> None:
    call = Call(MANY, (24,), activation="relu")
    for training, needs in ((True, (False, False, True, False)), (False, (True, False, False, True))):
        call.needs = Needs(*needs)
        with obedient():
            call.check(cuda, training)


@needs_nvcc
def test_long_samples_move_what_is_planned() -> None:
    """Forward x is read twice and the residual once; backward x and dy are read twice; y and dx are written once."""
    call = Call((3, 0, 2, 1), (8, 8, 16), torch.bfloat16)
    with obedient() as machine:
        call.check(eager_operators("cuda"))
    read, written = (sum(getattr(r, what).bytes for r in machine.reports) for what in ("global_read", "global_written"))
    assert len(machine.reports) == 4
    assert 0 <= read - 7 * call.x.nbytes <= sum(one.vector_bytes_read for one in machine.plans)
    assert 0 <= written - 2 * call.x.nbytes <= sum(one.vector_bytes_written for one in machine.plans)


# ---- one half of a split: statistics that are synchronised, and long samples ----------------------------------------


@needs_nvcc
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halves(dtype: torch.dtype, memory_format: str) -> None:
    for (activation, fan_out), size in zip(
        itertools.product(("none", "gelu"), (False, True)),
        ((3, 4, 5, (6, 7)), (2, 3, 24, (4, 4)), (2, 40, 8, (16, 16)), (3, 4, 8, (4, 4))),
        strict=True,
    ):
        options: dict[str, Any] = {
            "dtype": dtype,
            "memory_format": memory_format,
            "residual": activation != "none",
            "training": False,
        }
        call = make_call(*size, activation=activation, shared=fan_out, **options)
        with obedient() as machine:
            assert_correct(call, flat(cuda))
        sums, result = machine.plans
        assert (len(sums.phases_of("sums")), len(machine.reports)) == (1, 3 if fan_out else 2)
        moved = machine.reports[0].global_read.bytes
        assert moved == call.p.x.nbytes
        if not fan_out:
            work = result.work
            rest = machine.reports[1].global_read.bytes - work.bytes_to_read
            assert 0 <= rest <= result.parts * work.vector_bytes_to_read + result.parts * result.partial_bytes
            assert machine.reports[1].global_written.bytes == work.bytes_to_write


# ---- plans -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=9).filter(any),
    st.integers(1, 200),
    st.sampled_from([(2, "columns", 64), (4, "columns", 32), (4, "rows", 32), (8, "rows", 16)]),
    st.sampled_from(["H100", "RTX4090"]),
    st.data(),
)
def test_there_are_blocks_for_every_mix(
    counts: list[int], channels: int, kind: tuple[int, Any, int], device: str, data: st.DataObject
) -> None:
    size, family, most = kind
    direction: Any = data.draw(st.sampled_from(["forward", "backward"]))
    work = MixedWork(len(counts), sum(counts), channels, data.draw(st.integers(1, most)), size, family, direction)
    made = plan(work, DEVICES[device])
    assert made.shared_bytes <= DEVICES[device].block_shared_memory
    assert made.part_slots == made.block * (cut(work).divisor << cut(work).log_lanes)
    index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    order = order_of(index, len(counts), None, made.block, made.blocks)
    for task, samples in enumerate(counts):
        assert (order.task == task).sum() == -(-samples // made.block)
    assert -(-max(counts) // made.block) <= 64


def test_launches_are_made_of_shapes_alone() -> None:
    """One plan serves all mixes, so a CUDA graph does."""
    seen: dict[tuple[int, ...], list[Any]] = {(3, 0, 20, 8): [], (8, 9, 7, 7): []}
    with obedient():
        for counts, told in seen.items():
            with mock.patch.object(cuda.launches, "launch", lambda *launch, told=told: told.append(launch[:3])):
                Call(counts, (24,)).run(cuda)
    first, second = seen.values()
    assert len(first) == 7
    assert first == second


# ---- the proof can fail ----------------------------------------------------------------------------------------------

KEYS, SUMS = "mixed_keys_f64", "forward_mixed_bf16_columns"
MUTANTS = {
    "samples of another task": ("kMixed ? mix.order[quotient] : outer", "kMixed ? int64_t(quotient) : outer", SUMS),
    "a task begins where its block does": ("mix.order += mix.sample[task] + before", "mix.order += before", SUMS),
    "sums of another channel": ("kMixed ? uint32_t(p.n.tiles) : 1", "1", SUMS),
    "keys leave out the last words": ("i < p.n.run; i += lanes", "i < p.n.run - 1; i += lanes", KEYS),
}
BROKEN = Broken(MUTANTS, KEYS, SUMS)


def forward_alone(name: str | None) -> None:
    call = Call(UNEVEN, (72,), torch.bfloat16)
    with obedient(code=BROKEN[name]) as machine:
        found = call.forward(cuda)
    call.check_forward(found, call.forward(reference))
    check_traffic(machine, UNEVEN)


@needs_nvcc
@pytest.mark.parametrize("name", [None, *MUTANTS])
def test_mutants_are_caught(name: str | None) -> None:
    if name is None:
        forward_alone(None)
        return
    with pytest.raises((Violation, AssertionError)):
        forward_alone(name)
