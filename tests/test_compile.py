"""The module and the operators inside compiled and exported graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from graphs import GraphCounter
from support import FORMATS, in_memory_format
from torch import nn

from tsbn_kernels import FusedTSigmaBN1d, FusedTSigmaBN2d, use_backend

T, N, C = 3, 4, 8


def compare(eager: nn.Module, compiled: nn.Module, original: nn.Module, memory_format: str, steps: int = 2) -> None:
    """Outputs, gradients and state of ``eager`` and ``compiled`` (made from ``original``) over a few steps."""
    for step in range(steps):
        x = in_memory_format(torch.randn(T * N, C, 6, 5), "task_major", memory_format) + step
        dy = torch.randn_like(x)
        results = []
        for module, owner in ((eager, eager), (compiled, original)):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            y = module(leaf)
            y.backward(dy)
            assert leaf.grad is not None
            results.append((y.detach(), leaf.grad, *(p.grad for p in owner.parameters()), *owner.buffers()))
            owner.zero_grad()
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
            assert a.stride() == b.stride()


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_module_without_graph_break(momentum: float | None, training: bool, memory_format: str) -> None:
    layer = FusedTSigmaBN2d(T, C, momentum=momentum, bias=True)
    nn.init.normal_(layer.weight)
    twin = copy.deepcopy(layer.train(training))
    counter = GraphCounter()
    compare(layer, torch.compile(twin, fullgraph=True, backend=counter), twin, memory_format)
    forward = "tsbn.forward_training.default" if training else "tsbn.forward_eval.default"
    assert counter.targets.count(forward) == 1
    assert counter.targets.count("tsbn.backward.default") == 1  # the fused operator, not the differentiable formula


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [True, False])
def test_module_under_inductor(training: bool, memory_format: str) -> None:
    layer = FusedTSigmaBN2d(T, C, bias="frozen")
    twin = copy.deepcopy(layer.train(training))
    compare(layer, torch.compile(twin, fullgraph=True), twin, memory_format)


def test_network_under_inductor() -> None:
    """Inductor fuses around the operators; they keep their inputs' memory format."""
    net = nn.Sequential(
        nn.Conv2d(C, C, 1, bias=False), FusedTSigmaBN2d(T, C), nn.ReLU(), nn.Conv2d(C, C, 3, bias=False)
    )
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, fullgraph=True)
    x = torch.randn(T * N, C, 6, 5)
    results = []
    for module, owner in ((net, net), (compiled, twin)):
        y = module(x)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        results.append((y.detach(), *(p.grad for p in owner.parameters()), *owner.buffers()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_sizes_that_change() -> None:
    """A second batch size makes one dynamic graph, not one graph for each size."""
    layer = FusedTSigmaBN1d(T, C)
    twin = copy.deepcopy(layer)
    counter = GraphCounter()
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    for n in (4, 5, 6, 7, 9):
        x = torch.randn(T * n, C)
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.targets.count("tsbn.forward_training.default") <= 2


def test_export() -> None:
    layer = FusedTSigmaBN2d(T, C).eval()
    x = torch.randn(T * N, C, 4, 4)
    program = torch.export.export(layer, (x,))
    assert torch.equal(program.module()(x), layer(x))
    assert any("tsbn.forward_eval" in str(node.target) for node in program.graph.nodes)


def test_reference_backend_without_graph_break() -> None:
    layer = FusedTSigmaBN2d(T, C, bias=True)
    twin = copy.deepcopy(layer)
    counter = GraphCounter()
    with use_backend("reference"):
        compare(layer, torch.compile(twin, fullgraph=True, backend=counter), twin, "contiguous", steps=1)
    assert not any(target.startswith("tsbn.") for target in counter.targets)
