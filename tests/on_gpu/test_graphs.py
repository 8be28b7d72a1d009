"""A training step captured in a CUDA graph gives, replayed on new data, what it gives without one, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.timing import replay
from on_gpu.steps import LAYERS, Step
from tsbn_kernels import use_backend

REPLAYS = 3


@pytest.mark.parametrize("name", LAYERS)
def test_replay(device: str, by: str, name: str) -> None:
    if torch.device(device).type != "cuda":
        pytest.skip("CUDA graphs exist on CUDA devices alone")
    compare(name, by, device)


def compare(name: str, backend: str, device: str) -> None:
    """Outputs, gradients and running statistics of replays, against a twin that is not captured."""
    with use_backend(backend):
        step = Step.of(name, device)
        graph, results = replay.captured(step)
        for seed in range(1, 1 + REPLAYS):
            step.load(Step.of(name, device, seed))
            twin = step.twin()
            wanted = twin()
            graph.replay()
            step.assert_equals(results, twin, wanted)


# ---- is what is wrong found? -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("misses", ["", "y", "running_mean"])
def test_a_replay_is_compared_with_the_eager_step(monkeypatch: pytest.MonkeyPatch, name: str, misses: str) -> None:
    """By a graph that runs the step again, does nothing, or leaves the running statistics as they are."""

    class Graph:
        def __init__(self, step: Step) -> None:
            self.step, self.results = step, step()

        def replay(self) -> None:
            if misses != "y":
                step = self.step.twin() if misses else self.step
                for result, now in zip(self.results, step(), strict=True):
                    result.copy_(now)

    def captured(step: Step) -> tuple[Graph, Any]:
        graph = Graph(step)
        return graph, graph.results

    monkeypatch.setattr(replay, "captured", captured)
    if misses:
        with pytest.raises(AssertionError, match=f"{misses} differs"):
            compare(name, "cpu", "cpu")
    else:
        compare(name, "cpu", "cpu")
