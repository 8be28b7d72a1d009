"""Activations of more than 2**31 elements, whose offsets do not fit into 32 bits."""

from __future__ import annotations

import pytest
import torch
from support.epilogues import Call
from support.problems import Problem, unstack
from support.tolerances import BACKWARD, FORWARD, STATISTICS, Tolerance, assert_within
from torch import Tensor

from benchmarks.timing import environment
from on_gpu.calls import run
from on_gpu.conftest import Change
from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.operator.ops import flat

SIZE = (5, 103, 64, 257, 254)  # T, N, C, H, W: 2**31 + 0.2 % elements
DTYPE = torch.bfloat16
SPARE = 3 * 2**30  # bytes beside the activations: float64 copies of some slabs


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_beyond_32_bits(device: str, by: str, memory_format: str, shared: bool, thorough: bool) -> None:
    """Rows and columns, and one input fanned out to so many elements."""
    if not thorough:
        pytest.skip("it takes more than 17 GiB of memory; --device checks it")
    compare(memory_format, shared, SIZE, by, device)


def compare(memory_format: str, shared: bool, size: tuple[int, int, int, int, int], backend: str, device: str) -> None:
    """Forward and backward pass; the first and the last channel of the first and the last task are compared."""
    T, N, C, H, W = size
    one = N * C * H * W * DTYPE.itemsize
    needed = (2 * T + 2 * (1 if shared else T)) * one + min(SPARE, 64 * one)
    free = environment.available_bytes(torch.device(device))
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free")
    order = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    torch.manual_seed(0)

    def normal(samples: int) -> Tensor:
        empty = torch.empty((samples, C, H, W), dtype=DTYPE, device=device, memory_format=order)
        return empty.normal_()

    x, dy = normal(N if shared else T * N), normal(T * N)
    weight, bias = (torch.randn((T, C), device=device) for _ in range(2))
    problem = Problem(x, dy, weight, bias, T, "sigmoid", "task_major")
    got = run(Call(problem, None, "none", shared, None), backend)

    defined = flat(reference)
    for channels in (slice(0, 1), slice(C - 1, C)):
        # A task's dx is that of all where x is shared: then all tasks are compared.
        for tasks in [slice(0, T)] if shared else [slice(0, 1), slice(T - 1, T)]:
            part = _part(problem, tasks, channels, shared)
            count = part.num_tasks
            y, mean, var = defined.forward_training(part.x, part.weight, part.bias, *part.options, shared=shared)
            dx, dweight, dbias, _ = defined.backward(
                part.dy, part.x, part.weight, mean, var, *part.options, True, True, True, True, part.bias, shared=shared
            )
            where = tasks, slice(None), channels
            assert_within(unstack(got.y, T, "task_major")[where], unstack(y, count, "task_major"), FORWARD[DTYPE], 2.0)
            own_dx = got.dx[:, channels] if shared else unstack(got.dx, T, "task_major")[where]
            assert_within(own_dx.reshape(dx.shape), dx, BACKWARD[DTYPE], 2.0 * (T**0.5 if shared else 1.0))
            sums = Tolerance(STATISTICS[DTYPE], 1)
            for result, exact, scale in (
                (got.mean, mean, 1.0),
                (got.var, var, 1.0),
                (got.dweight, dweight, 4.0 * (N * H * W) ** 0.5),
                (got.dbias, dbias, 4.0 * (N * H * W) ** 0.5),
            ):
                assert_within(result[tasks, channels], exact, sums, scale)


def _part(problem: Problem, tasks: slice, channels: slice, shared: bool) -> Problem:
    """The problem of some tasks and channels alone, in float64."""
    p = problem
    streams = [p.x if shared else unstack(p.x, p.num_tasks, p.stacking)[tasks].flatten(0, 1)]
    streams.append(unstack(p.dy, p.num_tasks, p.stacking)[tasks].flatten(0, 1))
    x, dy = (stream[:, channels].double() for stream in streams)
    weight = p.weight[tasks, channels].double()
    assert p.bias is not None
    return p._replace(x=x, dy=dy, weight=weight, bias=p.bias[tasks, channels].double(), num_tasks=len(weight))


# ---- is what is wrong found? -----------------------------------------------------------------------------------------


def test_the_large_size_is_beyond_32_bits() -> None:
    assert torch.Size(SIZE).numel() > 2**31


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_the_slabs_of_a_large_call_are_compared(change: Change, memory_format: str, shared: bool) -> None:
    size = 3, 5, 6, 33, 17
    compare(memory_format, shared, size, "cpu", "cpu")
    for index, last in ((0, (-1, -1, -1, -1)), (1, (-1, -1))):  # dx, dweight

        def spoil(result: Tensor, last: tuple[int, ...] = last) -> Tensor:
            result[last] += 9
            return result

        change("backward", index, spoil)
        with pytest.raises(AssertionError):
            compare(memory_format, shared, size, "cpu", "cpu")


def test_a_large_call_needs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.timing.environment.available_bytes", lambda _: 2**33)
    with pytest.raises(pytest.skip.Exception, match="needs 19 GiB of memory, 8 GiB are free"):
        compare("contiguous", False, SIZE, "cpu", "cpu")
