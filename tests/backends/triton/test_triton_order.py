"""What is read a second time is read in the reverse order, so that it begins with what the cache still holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.problems import FORMATS, problem, run
from torch import Tensor

pytest.importorskip("triton")
from support import interpreter
from support.fused import assert_equals_reference, fused
from support.interpreter import device, dispatched, interpreted, passes
from support.mixed_calls import MANY, Call
from support.twice import call_of

from tsbn_kernels.backends.triton import mixed
from tsbn_kernels.operator import ops

Reads = list[list[list[int]]]  # where the tiles of x begin that are read, by launch and program

TRITON = ops.flat(ops.operators("triton"))
SIZE = 2, 3, 3, (193,)  # several tiles of each slab, in rows and in columns; the last one is not full


@contextmanager
def reads_of(x: Tensor) -> Iterator[Reads]:
    """Notes the reads of x by the launches that read it, as the interpreter runs their programs: in order."""
    launches: Reads = []
    first, last = x.data_ptr(), x.data_ptr() + interpreter.extent(x)

    class Noting(interpreter.Builder):
        def set_grid_dim(self, *sizes: int) -> None:
            launches.append([])
            super().set_grid_dim(*sizes)

        def set_grid_idx(self, *place: int) -> None:
            launches[-1].append([])
            super().set_grid_idx(*place)

        def _check(self, what: str, ptrs: Any, mask: Any) -> Any:
            addresses = super()._check(what, ptrs, mask)
            if what == "read" and addresses.size and first <= addresses.min() < last:
                launches[-1][-1].append(int(addresses.min()))
            return addresses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "Builder", Noting)
        yield launches
        launches[:] = [programs for programs in launches if any(programs)]


def plain(memory_format: str) -> tuple[Tensor, Callable[[], object]]:
    p = problem(*SIZE, memory_format=memory_format)
    return p.x, lambda: run(p)


def shared_by_tasks(memory_format: str) -> tuple[Tensor, Callable[[], object]]:
    call = fused(*SIZE, epilogue=("relu", True), shared=True, memory_format=memory_format)
    return call.p.x, lambda: assert_equals_reference(call)


def second_derivative(memory_format: str) -> tuple[Tensor, Callable[[], object]]:
    call = call_of(problem(*SIZE, memory_format=memory_format))
    return call.x, lambda: (call.sums(TRITON), call.gradients(TRITON))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("make", [plain, shared_by_tasks, second_derivative])
def test_the_second_of_two_launches(make: Any, memory_format: str) -> None:
    x, call = make(memory_format)
    with dispatched(device(threads=16, multiprocessors=8)), reads_of(x) as launches:
        call()
    found = [[address for program in programs for address in program] for programs in launches]
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert len(first) > 2 and second == first[::-1]
    assert found


@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_second_walk_of_a_mixed_batch(memory_format: str) -> None:
    """A launch before them reads all samples as they lie, for their keys."""
    call = Call(MANY, (5, 3), memory_format=memory_format)
    with interpreted(device(threads=64, multiprocessors=2)), reads_of(call.x) as launches:
        call.check(mixed)
    found = [[address for program in programs for address in program] for programs in launches]
    assert len(found) == 6
    for first, second in (found[1:3], found[4:]):
        assert len(first) > 2 and second == first[::-1]


@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_second_half_of_a_program(memory_format: str) -> None:
    """It reads all of its slab twice."""
    x, call = plain(memory_format)
    with dispatched(device(threads=16, multiprocessors=1)), reads_of(x) as launches:
        call()
        assert {one.plan.variant for one in passes()} == {"streaming"}
    assert len(launches) == 2
    for program in (program for programs in launches for program in programs):
        half = len(program) // 2
        assert half > 1 and program[half:] == program[:half][::-1]
