"""The definition against PyTorch's own BatchNorm, one plain layer for each task."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.problems import FORMATS, GATES, STACKINGS, defined, problem, stack, unstack
from torch import Tensor
from torch.nn.functional import batch_norm


def loop(
    x: Tensor, scale: Tensor, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, training: bool
) -> Tensor:
    """Streams ``[T, N, C, *]`` through T calls of F.batch_norm."""
    rows = []
    for t in range(x.shape[0]):
        statistics = (None, None) if mean is None or var is None else (mean[t], var[t])
        rows.append(batch_norm(x[t], *statistics, scale[t], None if bias is None else bias[t], training, 0.1, 1e-5))
    return torch.stack(rows)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("stacking", STACKINGS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_equals_a_loop_of_batch_norms(training: bool, bias: bool, gate: str, stacking: str, memory_format: str) -> None:
    p = problem(dtype=torch.float64, stacking=stacking, memory_format=memory_format, gate=gate, bias=bias)
    mean, var = torch.randn(3, 5, dtype=torch.float64), torch.rand(3, 5, dtype=torch.float64) + 0.5

    leaves = [tensor.clone().requires_grad_() for tensor in (p.x, p.weight, p.bias) if tensor is not None]
    x, weight, offset = (*leaves, None)[:3]
    scale = torch.sigmoid(weight) if gate == "sigmoid" else weight
    statistics = (None, None) if training else (mean, var)
    expected = stack(loop(unstack(x, 3, stacking), scale, offset, *statistics, training), stacking, memory_format)
    gradients = torch.autograd.grad(expected, leaves, p.dy)

    if training:
        y, mean, var = defined.forward_training(p.x, p.weight, p.bias, *p.options)
    else:
        y = defined.forward_eval(p.x, p.weight, p.bias, mean, var, *p.options)
    torch.testing.assert_close(y, expected.detach(), rtol=1e-10, atol=1e-10)
    assert y.stride() == p.x.stride()

    needed = (True, True, bias)
    for got, wanted in zip(
        defined.backward(p.dy, p.x, p.weight, mean, var, *p.options, training, *needed), gradients, strict=False
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_statistics_are_the_biased_moments_of_each_task() -> None:
    p = problem(dtype=torch.float64)
    mean, var = defined.moments(p.x, 3, "task_major")
    for t, stream in enumerate(p.x.chunk(3)):
        torch.testing.assert_close(mean[t], stream.mean(dim=(0, 2, 3)))
        torch.testing.assert_close(var[t], stream.var(dim=(0, 2, 3), correction=0))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_first_and_second_derivative(training: bool, bias: bool, gate: str) -> None:
    p = problem(2, 2, 2, (3,), dtype=torch.float64, gate=gate, bias=bias)
    mean, var = torch.randn(2, 2, dtype=torch.float64), torch.rand(2, 2, dtype=torch.float64) + 0.5

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if training:
            return defined.forward_training(x, weight, bias, *p.options)[0]
        return defined.forward_eval(x, weight, bias, mean, var, *p.options)

    inputs = [tensor.requires_grad_() for tensor in (p.x, p.weight, p.bias) if tensor is not None]
    assert torch.autograd.gradcheck(forward, inputs)
    assert torch.autograd.gradgradcheck(forward, inputs)


@pytest.mark.parametrize("training", [False, True])
def test_backward_can_be_differentiated(training: bool) -> None:
    """The formula of the first derivative has the right derivative: it serves create_graph."""
    p = problem(2, 2, 2, (3,), dtype=torch.float64)
    mean, var = defined.moments(p.x, 2, "task_major")
    if not training:
        mean, var = mean + 0.3, var + 0.1
    backward = partial(_backward, p.options, mean, var, training)
    assert torch.autograd.gradcheck(backward, [tensor.requires_grad_() for tensor in (p.dy, p.x, p.weight)])


def _backward(
    options: tuple[int, float, str, str],
    mean: Tensor,
    var: Tensor,
    training: bool,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
) -> tuple[Tensor, ...]:
    return defined.backward(dy, x, weight, mean, var, *options, training, True, True, True)


def test_half_inputs_are_computed_in_float32() -> None:
    p = problem(dtype=torch.bfloat16)
    y, mean, var = defined.forward_training(p.x, p.weight, p.bias, *p.options)
    assert (y.dtype, mean.dtype, var.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    wide = defined.forward_training(p.x.float(), p.weight, p.bias, *p.options)[0]
    assert torch.equal(y, wide.bfloat16())


def test_gradients_not_needed_are_empty() -> None:
    p = problem()
    mean, var = defined.moments(p.x, 3, "task_major")
    gradients = defined.backward(p.dy, p.x, p.weight, mean, var, *p.options, True, False, False, False)
    assert [gradient.numel() for gradient in gradients] == [0, 0, 0, 0]


@pytest.mark.parametrize("stacking", STACKINGS)
def test_empty_batch(stacking: str) -> None:
    x = stack(torch.zeros(3, 0, 5, 2, 2), stacking)
    y, mean, var = defined.forward_training(x, torch.zeros(3, 5), None, 3, 1e-5, "sigmoid", stacking)
    assert y.shape == x.shape
    assert torch.equal(mean, torch.zeros(3, 5))
    assert torch.equal(var, torch.zeros(3, 5))
