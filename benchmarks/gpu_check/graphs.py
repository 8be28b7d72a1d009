"""Step: forward and backward pass captured in a CUDA graph give, replayed on new data, what they give without one."""

from __future__ import annotations

from functools import partial

from benchmarks.gpu_check import layers
from benchmarks.gpu_check.case import Case, Cases, Setting
from benchmarks.gpu_check.layers import Step
from benchmarks.replay import captured
from tsbn_kernels import use_backend

REPLAYS = 3


def cases(setting: Setting) -> Cases:
    """A training step of each layer."""
    names = layers.chosen(setting.quick)
    return Cases([Case(name, partial(replay, name, setting)) for name in names], about="replayed on new data, bitwise")


def replay(name: str, setting: Setting) -> None:
    """Outputs, gradients and running statistics of replays, against a twin that is not captured.

    Raises:
        AssertionError: they differ.
    """
    with use_backend(setting.backend):
        step = Step.of(name, setting.device)
        graph, results = captured(step)
        for seed in range(1, 1 + REPLAYS):
            step.load(Step.of(name, setting.device, seed))
            twin = step.twin()
            wanted = twin()
            graph.replay()
            step.assert_equals(results, twin, wanted)
