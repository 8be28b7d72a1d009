"""Derivatives beyond the first backward pass: forward mode, second derivatives, batches of gradients, ensembles."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.layers import LAYERS, SHAPE, of_any_kind, trained, with_a_bias
from support.problems import FORMATS, GATES, STACKINGS, Problem, defined, in_double, problem
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, hessian, jacfwd, jacrev, stack_module_state, vmap

from tsbn_kernels import FusedTSigmaBN1d
from tsbn_kernels.functional import task_batch_norm

T, N, C = 2, 3, 4
stackings = pytest.mark.parametrize("stacking", STACKINGS)
formats = pytest.mark.parametrize("memory_format", FORMATS)
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """PyTorch's own remarks on its transforms."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*performance drop.*")
        yield


def layer_of(p: Problem, training: bool) -> Callable[..., Tensor]:
    """The layer as a function of x, weight and bias."""
    shape = p.weight.shape
    mean, var = (None, None) if training else (torch.randn(shape).double(), torch.rand(shape).double() + 0.5)
    options = {"num_tasks": T, "training": training, "gate": p.gate, "stacking": p.stacking}
    return lambda x, weight, bias: task_batch_norm(x, weight, bias, mean, var, **options)  # type: ignore[arg-type]


@modes
@stackings
@formats
@pytest.mark.parametrize("gate", GATES)
def test_all_modes_of_differentiation(gate: str, memory_format: str, stacking: str, training: bool) -> None:
    p = in_double(problem(T, N, 2, (2, 2), stacking=stacking, gate=gate, memory_format=memory_format))
    inputs = [tensor.clone().requires_grad_() for tensor in (p.x, p.weight, p.bias) if tensor is not None]
    layer = layer_of(p, training)
    assert torch.autograd.gradcheck(
        layer, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=False
    )
    assert torch.autograd.gradgradcheck(layer, inputs, check_fwd_over_rev=True)


@modes
@pytest.mark.parametrize("moved", ["x", "weight", "bias"])
def test_tangent_of_one_input(moved: str, training: bool) -> None:
    """A directional derivative against a difference quotient, with the other inputs fixed."""
    p = in_double(problem(T, N, C))
    layer = layer_of(p, training)
    inputs = {"x": p.x, "weight": p.weight, "bias": p.bias}
    tangent = torch.randn_like(inputs[moved])
    with forward_ad.dual_level():
        dual = inputs | {moved: forward_ad.make_dual(inputs[moved], tangent)}
        derivative = forward_ad.unpack_dual(layer(*dual.values())).tangent
    step = 1e-6
    above, below = (layer(*(inputs | {moved: inputs[moved] + s * step * tangent}).values()) for s in (1, -1))
    torch.testing.assert_close(derivative, (above - below) / (2 * step), rtol=1e-6, atol=1e-7)


def test_a_tangent_keeps_the_dtype_of_a_half_input() -> None:
    p = problem(T, N, C, dtype=torch.bfloat16)
    with forward_ad.dual_level():
        y = task_batch_norm(forward_ad.make_dual(p.x, p.dy), p.weight, p.bias, num_tasks=T)
        assert forward_ad.unpack_dual(y).tangent.dtype == torch.bfloat16


def test_hessian_in_both_orders() -> None:
    p = in_double(problem(T, N, C, (2, 2)))
    target = torch.randn_like(p.x)

    def loss(function: Callable[..., tuple[Tensor, ...] | Tensor], weight: Tensor) -> Tensor:
        y = function(p.x, weight)
        return ((y if isinstance(y, Tensor) else y[0]) - target).square().sum()

    def fused(weight: Tensor) -> Tensor:
        return loss(lambda x, w: task_batch_norm(x, w, num_tasks=T), weight)

    def plain(weight: Tensor) -> Tensor:
        return loss(lambda x, w: defined.forward_training(x, w, None, T, 1e-5, "sigmoid", "task_major"), weight)

    expected = hessian(plain)(p.weight)
    for transform in (lambda f: jacfwd(jacrev(f)), lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacfwd(f))):
        torch.testing.assert_close(transform(fused)(p.weight), expected)


@of_any_kind
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stacking", ["task_major", "sample_major"])
def test_batches_of_upstream_gradients(stacking: str, memory_format: torch.memory_format, kind: str) -> None:
    """``is_grads_batched``: what multi-task weighting methods use for the gradients of all losses at once."""
    layer = trained(kind, stacking=stacking)
    x = torch.randn(SHAPE).to(memory_format=memory_format).requires_grad_()
    y = layer(x)
    upstream = torch.randn(5, *y.shape)
    batched = torch.autograd.grad(y, (x, layer.weight), upstream, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, (x, layer.weight), dy, retain_graph=True) for dy in upstream]
    for got, wanted in zip(batched, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(wanted))


@of_any_kind
@pytest.mark.parametrize("tasks", [[0, 1], [1]], ids=["all", "one"])
@pytest.mark.parametrize("stacking", ["task_major", "sample_major"])
def test_batches_of_upstream_gradients_of_streams(stacking: str, tasks: list[int], kind: str) -> None:
    layer = trained(kind, stacking=stacking)
    x = torch.randn(SHAPE).requires_grad_()
    streams = [layer.streams(x)[task] for task in tasks]
    upstream = [torch.randn(5, *stream.shape) for stream in streams]
    batched = torch.autograd.grad(streams, (x, layer.weight), upstream, is_grads_batched=True, retain_graph=True)
    single = [
        torch.autograd.grad(streams, (x, layer.weight), dys, retain_graph=True) for dys in zip(*upstream, strict=True)
    ]
    for got, wanted in zip(batched, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(wanted))


@pytest.mark.parametrize("activation", [None, "hardswish"])
def test_an_ensemble_of_one_mixed_sample_by_channels(activation: str | None) -> None:
    """The definition put what it computed of all models into the strides of one."""
    x, weight, index = torch.randn(3, 1, 5, 4).transpose(2, 3), torch.randn(3, 2, 4), torch.tensor([1])

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return task_batch_norm(x, weight, num_tasks=2, task_of_sample=index, activation=activation)

    wanted = [call(*one) for one in zip(x, weight, strict=True)]
    torch.testing.assert_close(vmap(call)(x, weight), torch.stack(wanted))


@modes
@with_a_bias
@pytest.mark.parametrize("shared", [True, False], ids=["one input", "an input each"])
@pytest.mark.parametrize("stacking", ["task_major", "sample_major"])
def test_ensembles(stacking: str, shared: bool, kind: str, training: bool) -> None:
    """``vmap`` over models: outputs, running statistics and gradients are those of the models one by one."""
    models = [trained(kind, stacking=stacking, bias=True).train(training) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    inputs = torch.randn(3, *SHAPE)

    def call(state: tuple[dict[str, Tensor], dict[str, Tensor]], x: Tensor) -> Tensor:
        return functional_call(skeleton, state, (x,))

    together = vmap(call, in_dims=((0, 0), None if shared else 0))
    y = together((parameters, buffers), inputs[0] if shared else inputs)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    for e, model in enumerate(models):
        expected = model(inputs[0 if shared else e])
        torch.testing.assert_close(y[e], expected)
        expected.backward(gradient[e])
        for name, tensor in buffers.items():
            torch.testing.assert_close(tensor[e], model.get_buffer(name))
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.grad[e], model.get_parameter(name).grad)


def test_ensembles_with_a_task_axis_and_another_batch_dimension() -> None:
    x, weight = torch.randn(T, N, C, 3, 4), torch.randn(T, C, 4)

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return task_batch_norm(x, weight, num_tasks=T, stacking="task_axis")

    y = vmap(call, in_dims=(4, 2), out_dims=4)(x, weight)
    for e in range(4):
        torch.testing.assert_close(y[..., e], call(x[..., e], weight[..., e]))


def test_per_sample_gradients_of_an_ensemble() -> None:
    """grad inside vmap."""
    layer = FusedTSigmaBN1d(T, C, track_running_stats=False)
    x = torch.randn(4, T * N, C)

    def loss(x: Tensor) -> Tensor:
        return layer(x).tanh().sum()

    together = vmap(torch.func.grad(loss))(x)
    for got, each in zip(together, x, strict=True):
        torch.testing.assert_close(got, torch.func.grad(loss)(each))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "options"), [("BN", {"activation": "silu"}), *((kind, {}) for kind in LAYERS)])
def test_functionalized(kind: str, options: Any, training: bool) -> None:
    """Statistics are updated through it, and what comes out can be differentiated."""
    layer = trained(kind, **options).train(training)
    x, dy = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    results = []
    for transform in (torch.func.functionalize, lambda call: call):
        state = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
        state["weight"].requires_grad_()
        y = transform(lambda state, x: functional_call(layer, state, (x,)))(state, x)
        results.append([y, *torch.autograd.grad(y, [x, state["weight"]], dy), *state.values()])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)
