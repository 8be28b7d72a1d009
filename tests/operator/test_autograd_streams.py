"""Task subsets: streams of their own, whose backward passes cost the tasks that they come from."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from support.problems import STACKINGS, problem, unstack
from torch import Tensor, nn

from tsbn_kernels import FusedTSigmaBN1d, FusedTSigmaBN2d
from tsbn_kernels.definition.options import Gradients, Needs, Options, Saved
from tsbn_kernels.functional import task_batch_norm, task_streams
from tsbn_kernels.operator import autograd_streams

T, N, C = 4, 3, 5


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tasks each backward operator was asked for."""
    asked: list[int] = []
    plain = autograd_streams.differentiable_twice

    def counting(backend: str | None) -> SimpleNamespace:
        def call(dy: Tensor, saved: Saved, training: bool, needs: Needs, options: Options) -> Gradients:
            asked.append(options.num_tasks)
            return plain(backend).backward(dy, saved, training, needs, options)

        return SimpleNamespace(backward=call)

    monkeypatch.setattr(autograd_streams, "differentiable_twice", counting)
    return asked


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fan_out", [True, False])
@pytest.mark.parametrize("stacking", STACKINGS)
def test_gradients_of_some_tasks(
    stacking: str, fan_out: bool, training: bool, activation: str | None, residual: bool, calls: list[int]
) -> None:
    p = problem(T, N, C, (2, 3), dtype=torch.float64, stacking=stacking)
    x = torch.randn(N, C, 2, 3, dtype=torch.float64) if fan_out else p.x
    assert p.bias is not None
    inputs = [tensor.clone().requires_grad_() for tensor in (x, p.weight, p.bias)]
    if residual:
        inputs.append(torch.randn_like(p.x).requires_grad_())
    given = (None, None) if training else (p.weight.detach(), p.weight.detach().exp())
    tensors = *inputs[:3], *given, *inputs[3:]
    options = {"num_tasks": T, "training": training, "stacking": stacking, "activation": activation, "fan_out": fan_out}
    whole = unstack(task_batch_norm(*tensors, **options), T, stacking)
    outputs = task_streams(*tensors, **options)
    assert len(outputs) == T
    for one, expected in zip(outputs, whole, strict=True):
        assert torch.equal(one, expected)
    for tasks in ([2], [0, 3], [3, 0, 1], list(range(T))):
        upstream = [torch.randn_like(outputs[t]) for t in tasks]
        got = torch.autograd.grad([outputs[t] for t in tasks], inputs, upstream, retain_graph=True)
        wanted = torch.autograd.grad([whole[t] for t in tasks], inputs, upstream, retain_graph=True)
        for gradient, exact in zip(got, wanted, strict=True):
            torch.testing.assert_close(gradient, exact, rtol=1e-10, atol=1e-10)
    assert calls == [1, 2, 3, T]


def test_separate_backward_passes_cost_a_task_each(calls: list[int]) -> None:
    """As methods that weigh the tasks' gradients of shared weights make them."""
    stem = nn.Conv2d(3, C, 3, dtype=torch.float64)
    layer = FusedTSigmaBN2d(T, C, activation="relu", fan_out=True, dtype=torch.float64)
    outputs = layer.streams(stem(torch.randn(N, 3, 6, 6, dtype=torch.float64)))
    losses = [output.square().mean() for output in outputs]
    separate = [torch.autograd.grad(loss, stem.weight, retain_graph=True)[0] for loss in losses]
    assert calls == T * [1]
    (together,) = torch.autograd.grad(sum(losses), stem.weight)
    torch.testing.assert_close(sum(separate), together)
    assert calls[T:] == [T]


def test_second_derivatives() -> None:
    p = problem(2, 3, 2, (2,), dtype=torch.float64)
    assert p.bias is not None
    inputs = [tensor.clone().requires_grad_() for tensor in (p.x, p.weight, p.bias)]
    for tasks in ([1], [0, 1]):

        def forward(*tensors: Tensor, tasks: list[int] = tasks) -> tuple[Tensor, ...]:
            outputs = task_streams(*tensors, num_tasks=2, activation="gelu")
            return tuple(outputs[t] for t in tasks)

        assert torch.autograd.gradcheck(forward, inputs)
        assert torch.autograd.gradgradcheck(forward, inputs)


def test_statistics_are_updated_as_by_the_layer() -> None:
    x = torch.randn(T * N, C, 4, 4)
    layers = FusedTSigmaBN2d(T, C), FusedTSigmaBN2d(T, C)
    layers[0](x)
    layers[1].streams(x)
    for name, buffer in layers[0].named_buffers():
        assert torch.equal(buffer, layers[1].get_buffer(name))


@pytest.mark.parametrize("tasks", list(itertools.permutations(range(T), 2)))
def test_a_layer_runs_the_named_tasks_only(tasks: tuple[int, ...]) -> None:
    layer, whole = FusedTSigmaBN2d(T, C), FusedTSigmaBN2d(T, C)
    nn.init.normal_(layer.weight)
    whole.load_state_dict(layer.state_dict())
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    x = torch.randn(T, N, C, 3, 3)
    y = layer(x[list(tasks)].flatten(0, 1), tasks=list(tasks))
    torch.testing.assert_close(y.unflatten(0, (2, N)), whole(x)[list(tasks)])
    for name, buffer in layer.named_buffers():
        for t in range(T):
            expected = whole.get_buffer(name)[t] if t in tasks else before[name][t]
            torch.testing.assert_close(buffer[t], expected)


@pytest.mark.parametrize("tasks", [[], [1, 1], [T], [-1]])
def test_unknown_tasks(tasks: list[int]) -> None:
    with pytest.raises(ValueError, match="tasks must be different indices below num_tasks=4"):
        FusedTSigmaBN2d(T, C)(torch.randn(2 * N, C, 3, 3), tasks=tasks)


def test_what_streams_do_not_do() -> None:
    x, weight = torch.randn(T * N, C, 2), torch.zeros(T, C)
    with pytest.raises(ValueError, match="recover_input=True keeps the streams as one stack"):
        task_streams(x, weight, num_tasks=T, recover_input=True)
    with pytest.raises(ValueError, match="recover_input=True keeps the streams as one stack"):
        FusedTSigmaBN1d(T, C, recover_input=True).streams(x)
    with pytest.raises(RuntimeError, match="do not work under vmap"):
        torch.vmap(lambda x: task_streams(x, weight, num_tasks=T)[0])(x.expand(2, *x.shape))
