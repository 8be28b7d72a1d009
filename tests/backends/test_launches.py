"""Launches of a layer: one a pass by both GPU backends, for the layers of whole networks, and nothing beside them.

Tensors are on the meta device and nothing is launched: what is counted is how often a backend asks for it. That each
time is one launch of the driver is shown by ``test_launcher.py`` and ``cuda/test_cuda_runtime.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from support.problems import FORMATS, in_memory_format
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.records.workloads import CELEBA, RESNET50, SEGNET, Layer, Workload
from tsbn_kernels import FusedTSigmaBN1d, FusedTSigmaBN2d, backends
from tsbn_kernels.backends import cuda, triton
from tsbn_kernels.backends.plan import DEVICES, Plan
from tsbn_kernels.backends.plan import cuda as rules
from tsbn_kernels.backends.plan.choice import TRACKING, plans_of
from tsbn_kernels.backends.plan.triton import compiles_clusters
from tsbn_kernels.backends.plan.work import work_of
from tsbn_kernels.definition.options import Needs, Options

H100 = DEVICES["H100"]
Fused = FusedTSigmaBN1d | FusedTSigmaBN2d
NETWORKS = CELEBA, SEGNET, *RESNET50
# Memory, views of it, and questions: no kernel runs for these.
NOTHING = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "unsqueeze", "view",
    "promote_types",
}  # fmt: skip

both = pytest.mark.parametrize("backend", ["cuda", *["triton"] * triton.available])


class Beside(TorchDispatchMode):
    """Counts the operators of PyTorch that launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in NOTHING:
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def counting(backend: str) -> Iterator[tuple[list[Any], Counter[str]]]:
    """Sends tensors of every device to a backend on an H100: the launches that it asks for, and operators beside."""
    launched: list[Any] = []
    forced = backends.Availability(backend, (), True, "taken for usable")
    with (
        mock.patch.object(backends, "_override", forced),
        mock.patch.object(cuda.launches, "device_of", return_value=H100),
        mock.patch.object(cuda.batch_norm, "clusters", return_value=rules.clusters_on_paper),
        mock.patch.object(cuda.batch_norm, "_prepare", cuda.batch_norm._prepare.__wrapped__),
        mock.patch.object(torch.ops.tsbn, "_cuda_launch", lambda *told: launched.append(told), create=True),
        nullcontext() if backend == "cuda" else noting(launched),
        Beside() as beside,
    ):
        yield launched, beside.seen


@contextmanager
def noting(launched: list[Any]) -> Iterator[None]:
    """Notes the launches of the Triton backend in place of making them."""
    from tsbn_kernels.backends.triton import launch, ops

    with (
        mock.patch.object(ops, "device_of", return_value=H100),
        mock.patch.object(ops, "on_device", return_value=nullcontext()),
        mock.patch.object(launch.Launch, "__call__", lambda self, *arguments: launched.append(self)),
        mock.patch.dict(ops.forwards, clear=True),
        mock.patch.dict(ops.backwards, clear=True),
    ):
        yield


def passes(backend: str, layer: Fused, *inputs: Tensor) -> tuple[list[int], Counter[str]]:
    """How often a training step and an evaluation launch: forward, backward, forward; and the operators beside."""
    given, counts = [x.requires_grad_() for x in inputs], []
    with counting(backend) as (launched, beside):
        for training in (True, False):
            y = layer.train(training)(*given)
            counts.append(len(launched))
            if training:
                torch.autograd.grad(y, [*given, *layer.parameters()], torch.empty_like(y))
                counts.append(len(launched))
    return [counts[0], counts[1] - counts[0], counts[2] - counts[1]], beside


def made(of: Layer, workload: Workload, memory_format: str, **options: Any) -> tuple[Fused, Tensor]:
    """A layer of a network, and a batch of it in bfloat16."""
    kind = FusedTSigmaBN2d if of.size else FusedTSigmaBN1d
    x = torch.empty(of.shape(workload.tasks, workload.batch), dtype=torch.bfloat16, device="meta")
    return kind(workload.tasks, of.channels, device="meta", **options), in_memory_format(x, "task_major", memory_format)


def planned(backend: str, layer: Fused, x: Tensor) -> list[Plan]:
    """The plans of a training step: forward, backward."""
    options = Options(layer.num_tasks, layer.eps, "sigmoid", layer.stacking, fan_out=layer.fan_out)
    steps = None, Needs(True, True, False, False)
    return [one for needs in steps for one in plans_of(backend, work_of(x, options, needs, training=True), H100)]


@both
@pytest.mark.parametrize("memory_format", FORMATS)
def test_one_launch_a_layer_and_pass(backend: str, memory_format: str) -> None:
    """Two where several programs share a slab: it is too large for one, or for a cluster, and there are few slabs.

    In NCHW that is one layer of all, by Triton.
    """
    for workload in NETWORKS:
        for of in workload.layers:
            layer, x = made(of, workload, memory_format)
            counts, beside = passes(backend, layer, x)
            assert (counts[-1], dict(beside)) == (1, {}), (workload.name, of.name)
            for plan, count in zip(planned(backend, layer, x), counts, strict=False):
                assert count == (2 if plan.variant == "split" else 1) == plan.launches, (workload.name, of.name)
                assert count == 1 or (plan.slabs < 4 * H100.multiprocessors), (workload.name, of.name)
                if memory_format == "contiguous" and (backend == "cuda" or compiles_clusters()):
                    assert count == 1 or (backend == "triton" and of is SEGNET.layers[0]), (workload.name, of.name)


@both
def test_one_launch_of_what_follows_the_layer_too(backend: str) -> None:
    """A residual, an activation, the cumulative average; and of a fan-out as many as are planned, up to three."""
    for workload in NETWORKS:
        layer, x = made(workload.layers[-2], workload, "contiguous", activation="relu", momentum=None)
        counts, beside = passes(backend, layer, x, torch.empty_like(x))
        assert (counts, dict(beside)) == ([1, 1, 1], {})
        layer, x = made(workload.layers[0], workload, "contiguous", fan_out=True, momentum=None)
        x = torch.empty_like(x[: workload.batch])
        counts, beside = passes(backend, layer, x)
        assert (counts, dict(beside)) == ([*(plan.launches for plan in planned(backend, layer, x)), 1], {})
        assert max(counts) <= (3 if backend == "triton" else 2)


@pytest.mark.skipif(not triton.available, reason="no Triton")
def test_what_is_launched_beside_is_seen() -> None:
    """Triton leaves the running statistics of float64 to PyTorch, by as many operators as the plans count on."""
    for backend, operators in (("cuda", 0), ("triton", TRACKING)):
        x = torch.empty(6, 4, 8, 8, dtype=torch.float64, device="meta")
        counts, beside = passes(backend, FusedTSigmaBN2d(2, 4, device="meta", dtype=torch.float64), x)
        assert counts == [1, 1, 1]
        assert sum(beside.values()) == operators, beside
