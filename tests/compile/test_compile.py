"""The module and the operators inside compiled graphs."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.graphs import WAYS, C, GraphCounter, T, tensors
from support.problems import FORMATS, in_memory_format
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.func import functional_call

from tsbn_kernels import FusedTSigmaBN2d, use_backend
from tsbn_kernels.backends import triton
from tsbn_kernels.definition import layout
from tsbn_kernels.functional import task_batch_norm, task_layer_norm
from tsbn_kernels.operator.ops import operators

N = 4


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


def grad(call: Callable[..., Tensor], dy: Tensor) -> Callable[..., Any]:
    return torch.func.grad(lambda parameters, x: (call(parameters, x) * dy).sum())


def vmap(call: Callable[..., Tensor], _: Tensor) -> Callable[..., Any]:
    def ensemble(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        models = {name: torch.stack([value, value + 1]) for name, value in parameters.items()}
        return torch.func.vmap(call, (0, None))(models, x)

    return ensemble


def forward(call: Callable[..., Tensor], tangent: Tensor) -> Callable[..., Any]:
    return lambda parameters, x: torch.func.jvp(lambda x: call(parameters, x), (x,), (tangent,))


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


@pytest.mark.parametrize(("training", "memory_format"), [(False, "contiguous"), (True, "channels_last")])
def test_module_under_inductor(training: bool, memory_format: str) -> None:
    layer = FusedTSigmaBN2d(T, C, bias="frozen")
    twin = copy.deepcopy(layer.train(training))
    compare(layer, torch.compile(twin, fullgraph=True), twin, memory_format)


@pytest.fixture
def sizes_that_are_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler of PyTorch 2.11 and earlier does not sort tuples of sizes that change; a later one does."""
    dense_strides = layout.dense_strides

    def of_backends(x: Tensor, stacking: str) -> tuple[int, ...]:
        assert not torch.compiler.is_dynamo_compiling(), "sorts sizes where a compiler traces"
        return dense_strides(x, stacking)

    monkeypatch.setattr(layout, "dense_strides", of_backends)


@pytest.mark.usefixtures("sizes_that_are_not_sorted")
@pytest.mark.parametrize(
    ("name", "training"),
    [(name, True) for name in WAYS] + [(name, False) for name in ("plain", "residual", "fan_out", "tasks", "model")],
)
def test_sizes_that_change(name: str, training: bool) -> None:
    """A second batch size makes one dynamic graph, not one graph for each size; no way of calling breaks the graph."""
    way = WAYS[name]
    eager = way.make().train(training)
    twin = copy.deepcopy(eager)
    counter = GraphCounter()
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    for samples in (17, 18, 20, 41):  # PyTorch's own convolution has another graph below 16
        inputs = way.inputs(samples)
        results = []
        for call, owner in ((eager, eager), (compiled, twin)):
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            outputs = tensors(call(*leaves))
            generator = torch.Generator().manual_seed(samples)
            torch.autograd.backward(outputs, [torch.randn(y.shape, generator=generator) for y in outputs])
            gradients = [x.grad for x in leaves] + [p.grad for p in owner.parameters()]
            results.append([*outputs, *gradients, *(buffer.clone() for buffer in owner.buffers())])
            owner.zero_grad()
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(set(counter.ran)) == 2
    assert torch.float64 not in counter.dtypes  # eps, momentum and counts stay numbers
    assert any(target.startswith(way.operators[2]) for target in counter.targets)


@pytest.mark.usefixtures("sizes_that_are_not_sorted")
@pytest.mark.parametrize("stacking", ["task_major", "task_axis"])
def test_dynamic_from_the_start(stacking: str) -> None:
    layer = FusedTSigmaBN2d(T, C)
    counter = GraphCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for n in (4, 5, 6):
        compiled(torch.randn(T, n, C, 9, 11) if stacking == "task_axis" else torch.randn(T * n, C, 9, 11))
    assert len(set(counter.ran)) == 1


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("function", [task_batch_norm, task_layer_norm])
def test_every_size_may_change(function: Callable[..., Tensor], mixed: bool) -> None:
    """Those of the parameters too, which a layer has fixed."""
    compiled = torch.compile(function, fullgraph=True, backend="eager", dynamic=True)
    for n, c in ((3, 4), (5, 6)):
        x, weight = torch.randn(T * n, c, c), torch.randn(T, c)
        index = {"task_of_sample": torch.arange(T).repeat(n)} if mixed else {}
        torch.testing.assert_close(
            compiled(x, weight, num_tasks=T, **index), function(x, weight, num_tasks=T, **index), rtol=0, atol=0
        )


def without_gradient(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def with_nothing_to_train(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.requires_grad_(False)(x)


def in_inference_mode(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return layer(x).clone()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("call", [without_gradient, with_nothing_to_train, in_inference_mode])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("name", ["plain", "LN"])
def test_no_gradient_needed(
    name: str, streams: bool, call: Callable[[nn.Module, Tensor], Tensor], training: bool
) -> None:
    layer: Any = WAYS[name].make().train(training)
    compiled = torch.compile(layer.streams if streams else layer, fullgraph=True, backend=GraphCounter())
    x = torch.randn(T * N, C, 6, 5)
    expected = copy.deepcopy(layer)(x)
    layer.requires_grad_(call is not with_nothing_to_train)
    with torch.no_grad() if call is without_gradient else torch.inference_mode(call is in_inference_mode):
        y = compiled(x)
    torch.testing.assert_close(torch.cat(y) if streams else y, expected.detach())


def test_momentum_that_changes() -> None:
    """A schedule of momentum costs one more graph, not one for each value."""
    layer, counter = FusedTSigmaBN2d(T, C), GraphCounter()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    for momentum in (0.1, 0.2, 0.3, 0.4, 0.45):
        layer.momentum = twin.momentum = momentum
        x = torch.randn(T * N, C, 4, 4)
        torch.testing.assert_close(compiled(x), layer(x))
        torch.testing.assert_close(twin.running_var, layer.running_var)
    assert len(set(counter.ran)) == 2


@torch._inductor.config.patch(force_disable_caches=True)
def test_a_network_is_compiled_without_conversions() -> None:
    """Inductor makes convolutions channels_last; the operators take what they give, and give what the next take."""
    net = nn.Sequential(
        nn.Conv2d(C, C, 3, bias=False), FusedTSigmaBN2d(T, C, activation="relu"), nn.Conv2d(C, C, 3, bias=False)
    )
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, fullgraph=True)
    x = torch.randn(T * N, C, 8, 8)

    def step(call: Callable[[Tensor], Tensor], owner: nn.Module) -> list[Tensor]:
        y = call(x)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        return [y.detach(), *(p.grad for p in owner.parameters() if p.grad is not None), *owner.buffers()]

    results, (forward, backward) = run_and_get_code(step, compiled, twin)
    for a, b in zip(results, step(net, net), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert re.search(
        r"(buf\d+) = extern_kernels.convolution.*(?:\n.*){0,6}"
        r"\n *(buf\d+) = torch.ops.tsbn.forward_training.default\(\1,.*(?:\n.*){0,3}"
        r"\n *(buf\d+) = \2\[0\](?:\n(?!.*cpp_fused).*)*extern_kernels.convolution\(\3,",
        forward,
    )
    assert re.search(r"tsbn.backward.default\(buf\d+, convolution, ", backward)  # what was saved, as it was


def test_reference_backend_without_graph_break() -> None:
    layer = FusedTSigmaBN2d(T, C, bias=True)
    twin = copy.deepcopy(layer)
    counter = GraphCounter()
    with use_backend("reference"):
        compare(layer, torch.compile(twin, fullgraph=True, backend=counter), twin, "contiguous", steps=1)
    assert not any(target.startswith("tsbn.") for target in counter.targets)


def test_another_backend_makes_another_graph() -> None:
    layer, counter = FusedTSigmaBN2d(T, C), GraphCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(T * N, C, 4, 4)
    compiled(x)
    assert "tsbn.forward_training.default" in counter.targets
    counter.targets.clear()
    with use_backend("reference"):
        compiled(x)
    assert counter.targets
    assert not any(target.startswith("tsbn.") for target in counter.targets)
    compiled(x)
    assert counter.ran == [0, 1, 0]


def test_a_backend_that_a_graph_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(triton, "available", True)
    with pytest.raises(RuntimeError, match="backend 'cuda' runs only where Triton is not installed"):
        operators("cuda")


@pytest.mark.parametrize("transform", [grad, vmap, forward])
@pytest.mark.parametrize("name", ["activation", "LN", "RMS"])
def test_transforms(name: str, transform: Callable[..., Any]) -> None:
    layer: Any = WAYS[name].make().eval()
    x, other = torch.randn(T * N, C, 6, 5), torch.randn(T * N, C, 6, 5)
    parameters = {"weight": torch.randn_like(layer.weight)}

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,))

    transformed = transform(call, other)
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(parameters, x), transformed(parameters, x))
