"""Step: two training steps at once, on two streams or in two threads, give what they give one after the other.

A CPU has no streams: PyTorch's stand for nothing there, and the threads remain.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_check import layers
from benchmarks.gpu_check.case import Case, Cases, Setting
from benchmarks.gpu_check.layers import Step
from tsbn_kernels import use_backend

STEPS, QUICK_STEPS = 20, 3  # of each layer

Results = list[list[tuple[Tensor, ...]]]  # of each layer, of each of its steps
Way = Callable[[list[Step], torch.device, int], Results]


def cases(setting: Setting) -> Cases:
    """Pairs of layers: on two streams of one thread, and on a stream in each of two threads."""
    ways: dict[str, Way] = {"on two streams": on_streams, "in two threads": in_threads}
    count = QUICK_STEPS if setting.quick else STEPS
    pairs = list(itertools.pairwise(layers.chosen(setting.quick)))
    return Cases(
        [
            Case(f"{' beside '.join(pair)}, {way}", partial(compare, pair, run, count, setting))
            for (way, run), pair in itertools.product(ways.items(), pairs)
        ],
        about=f"{count} steps at once, bitwise",
    )


def compare(pair: tuple[str, str], run: Way, count: int, setting: Setting) -> None:
    """``count`` steps of each layer at once, against one after the other.

    Raises:
        AssertionError: they differ.
    """
    with use_backend(setting.backend):
        steps = [Step.of(name, setting.device) for name in pair]
        twins = [step.twin() for step in steps]
        wanted = [[twin() for _ in range(count)] for twin in twins]
        got = run(steps, torch.device(setting.device), count)
    for step, twin, results, expected in zip(steps, twins, got, wanted, strict=True):
        for one, other in zip(results, expected, strict=True):
            step.assert_equals(one, twin, other)


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
