"""Two training steps at once, on two streams or in two threads, give what they give one after the other, bit for bit.

A CPU has no streams: PyTorch's stand for nothing there, and the threads remain.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from on_gpu.steps import FEW, LAYERS, Step
from tsbn_kernels import use_backend

STEPS, FEW_STEPS = 20, 3  # of each layer

Results = list[list[tuple[Tensor, ...]]]  # of each layer, of each of its steps
Way = Callable[[list[Step], torch.device, int], Results]


def on_streams(steps: list[Step], device: torch.device, count: int) -> Results:
    """The steps of the layers in turn, each layer on a stream of its own."""
    module = torch.get_device_module(device)
    module.synchronize()
    streams = [module.Stream() for _ in steps]
    results: Results = [[] for _ in steps]
    for _ in range(count):
        for step, stream, found in zip(steps, streams, results, strict=True):
            with module.stream(stream):
                found.append(step())
    module.synchronize()
    return results


def in_threads(steps: list[Step], device: torch.device, count: int) -> Results:
    """Each layer in a thread, and there on a stream of its own."""
    module = torch.get_device_module(device)
    module.synchronize()
    start = threading.Barrier(len(steps), timeout=30)

    def work(step: Step) -> list[tuple[Tensor, ...]]:
        start.wait()
        with module.stream(module.Stream()):
            return [step() for _ in range(count)]

    with ThreadPoolExecutor(len(steps)) as pool:
        results = list(pool.map(work, steps))
    module.synchronize()
    return results


@pytest.mark.parametrize("way", [on_streams, in_threads])
@pytest.mark.parametrize("pair", list(itertools.pairwise(LAYERS)), ids=" beside ".join)
def test_at_once(device: str, by: str, pair: tuple[str, str], way: Way, thorough: bool) -> None:
    if not (thorough or set(pair) & set(FEW)):
        pytest.skip("--device checks this pair as well")
    compare(pair, way, STEPS if thorough else FEW_STEPS, by, device)


def compare(pair: tuple[str, str], run: Way, count: int, backend: str, device: str) -> None:
    """``count`` steps of each layer at once, against one after the other."""
    with use_backend(backend):
        steps = [Step.of(name, device) for name in pair]
        twins = [step.twin() for step in steps]
        wanted = [[twin() for _ in range(count)] for twin in twins]
        got = run(steps, torch.device(device), count)
    for step, twin, results, expected in zip(steps, twins, got, wanted, strict=True):
        for one, other in zip(results, expected, strict=True):
            step.assert_equals(one, twin, other)


# ---- is what is wrong found? -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [on_streams, in_threads])
def test_steps_at_once_are_compared_with_steps_in_turn(way: Way) -> None:
    pair = "rows, relu", "columns"
    compare(pair, way, 3, "cpu", "cpu")

    def disturbed(steps: list[Step], device: torch.device, count: int) -> Results:
        results = way(steps, device, count)
        results[1][-1][1][0, 0, 0, 0] += 1
        return results

    with pytest.raises(AssertionError, match="dx differs in 1 of"):
        compare(pair, disturbed, 3, "cpu", "cpu")
