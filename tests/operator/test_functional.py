"""What ``task_batch_norm`` accepts, what it refuses and how it says so, and what it does to the running statistics."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.problems import DTYPES, FORMATS, HALVES, STACKINGS, definition, problem, stack
from support.tolerances import FORWARD, STATISTICS, assert_relative, assert_within
from torch import Tensor
from torch.nn.functional import batch_norm

from tsbn_kernels.functional import task_batch_norm

X = torch.randn(6, 5, 4, 4)
W = torch.zeros(3, 5)
ONES = torch.ones(3, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: task_batch_norm(X, W, num_tasks=3, gate="tanh"),
            ValueError,
            "gate must be one of sigmoid, identity, got 'tanh'",
        ),
        (
            lambda: task_batch_norm(X, W, num_tasks=3, stacking="TNC"),
            ValueError,
            "stacking must be one of task_major, sample_major, task_axis, got 'TNC'",
        ),
        (lambda: task_batch_norm(X, W, num_tasks=0), ValueError, "num_tasks must be 1 or more, got 0"),
        (lambda: task_batch_norm(X.int(), W, num_tasks=3), TypeError, "got torch.int32; convert it with x.float()"),
        (lambda: task_batch_norm(X.cfloat(), W, num_tasks=3), TypeError, "got torch.complex64"),
        (
            lambda: task_batch_norm(X[:, 0, 0, 0], W, num_tasks=3),
            ValueError,
            "x must have at least 2 dimensions [T*N, C, ...], got shape [6]",
        ),
        (
            lambda: task_batch_norm(X[:, :, 0, 0], W, num_tasks=3, stacking="task_axis"),
            ValueError,
            "at least 3 dimensions [T, N, C, ...], got shape [6, 5]",
        ),
        (
            lambda: task_batch_norm(X, W, num_tasks=3, stacking="task_axis"),
            ValueError,
            "expected num_tasks=3; for a stacked batch pass stacking='task_major' or 'sample_major'",
        ),
        (
            lambda: task_batch_norm(X[:5], W, num_tasks=3),
            ValueError,
            "the first dimension of x, 5, is not a multiple of num_tasks=3",
        ),
        (
            lambda: task_batch_norm(X, W[:2], num_tasks=3),
            ValueError,
            "weight must have shape [num_tasks, channels] = [3, 5] for x of shape [6, 5, 4, 4], got [2, 5]",
        ),
        (
            lambda: task_batch_norm(X, W[0], num_tasks=3),
            ValueError,
            "weight must have shape [num_tasks, channels] = [3, 5]",
        ),
        (
            lambda: task_batch_norm(X, W, W.t(), num_tasks=3),
            ValueError,
            "bias must have shape [num_tasks, channels] = [3, 5]",
        ),
        (lambda: task_batch_norm(X, W, None, W[:, :4], ONES, num_tasks=3), ValueError, "running_mean must have shape"),
        (lambda: task_batch_norm(X, W, None, W, ONES[:, :4], num_tasks=3), ValueError, "running_var must have shape"),
        (
            lambda: task_batch_norm(X, W.int(), num_tasks=3),
            TypeError,
            "weight must be float32, float64, float16 or bfloat16, got torch.int32",
        ),
        (
            lambda: task_batch_norm(X, W, W.long(), num_tasks=3),
            TypeError,
            "bias must be float32, float64, float16 or bfloat16, got torch.int64",
        ),
        (
            lambda: task_batch_norm(X, W, num_tasks=3, training=False),
            ValueError,
            "evaluation needs running_mean; pass it, or training=True to use the batch's statistics",
        ),
        (
            lambda: task_batch_norm(X, W, None, W, None, num_tasks=3, training=False),
            ValueError,
            "evaluation needs running_var",
        ),
        (
            lambda: task_batch_norm(X, W.to("meta"), num_tasks=3),
            RuntimeError,
            "weight is on meta and x on cpu; move one of them with .to()",
        ),
        (
            lambda: task_batch_norm(X[:3, :, :1, :1], W, num_tasks=3),
            ValueError,
            "per task and channel when training, got input size [3, 5, 1, 1] with num_tasks=3; use a larger",
        ),
    ],
)
def test_errors_say_what_came_and_how_to_mend_it(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_one_value_per_channel_is_fine_in_evaluation() -> None:
    y = task_batch_norm(X[:3, :, :1, :1], W, None, W, ONES, num_tasks=3, training=False, eps=0.0)
    torch.testing.assert_close(y, X[:3, :, :1, :1] / 2)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0])
def test_running_statistics(momentum: float) -> None:
    mean, var = torch.randn(3, 5), torch.rand(3, 5) + 0.5
    expected_mean, expected_var = mean.clone(), var.clone()
    task_batch_norm(X, W, None, mean, var, num_tasks=3, momentum=momentum)
    for t, stream in enumerate(X.chunk(3)):
        batch_norm(stream, expected_mean[t], expected_var[t], training=True, momentum=momentum)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var, expected_var, rtol=1e-5, atol=1e-6)


def test_momentum_tensor_broadcasts() -> None:
    momentum = torch.tensor([0.0, 0.5, 1.0])
    mean, var = torch.randn(3, 5), torch.rand(3, 5) + 0.5
    expected = [(mean.clone(), var.clone()) for _ in momentum]
    task_batch_norm(X, W, None, mean, var, num_tasks=3, momentum=momentum.unsqueeze(1))
    for t, (share, (running_mean, running_var)) in enumerate(zip(momentum.tolist(), expected, strict=True)):
        task_batch_norm(X, W, None, running_mean, running_var, num_tasks=3, momentum=share)
        torch.testing.assert_close(mean[t], running_mean[t])
        torch.testing.assert_close(var[t], running_var[t])


def test_one_running_statistic_alone() -> None:
    mean, var = torch.zeros(3, 5), torch.ones(3, 5)
    task_batch_norm(X, W, None, mean, None, num_tasks=3)
    task_batch_norm(X, W, None, None, var, num_tasks=3)
    assert (mean != 0).all()
    assert (var != 1).all()


def test_evaluation_leaves_running_statistics_alone() -> None:
    mean, var = torch.randn(3, 5), torch.rand(3, 5) + 0.5
    before = mean.clone(), var.clone()
    task_batch_norm(X, W, None, mean, var, num_tasks=3, training=False)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


@pytest.mark.parametrize("stacking", STACKINGS)
@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training: bool, stacking: str) -> None:
    """As nn.BatchNorm2d: an empty output, gradients of zero, running statistics untouched."""
    x = stack(torch.zeros(3, 0, 5, 2, 2), stacking).requires_grad_()
    weight, bias = W.clone().requires_grad_(), W.clone().requires_grad_()
    mean, var = torch.randn(3, 5), torch.rand(3, 5)
    before = mean.clone(), var.clone()
    y = task_batch_norm(x, weight, bias, mean, var, num_tasks=3, training=training, stacking=stacking)
    assert y.shape == x.shape
    gradients = torch.autograd.grad(y, (x, weight, bias), torch.zeros_like(y))
    assert gradients[0].shape == x.shape
    assert all(torch.equal(gradient, torch.zeros(3, 5)) for gradient in gradients[1:])
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


@pytest.mark.parametrize("shape", [(6, 5, 0, 2), (6, 5, 2, 0), (6, 0, 2, 2)])
def test_empty_planes_and_no_channels(shape: tuple[int, ...]) -> None:
    x, parameters = torch.zeros(shape), torch.zeros(3, shape[1])
    assert batch_norm(x, None, None, training=True).shape == x.shape
    assert task_batch_norm(x, parameters, num_tasks=3).shape == x.shape


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("parameter_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_mixed_dtypes(dtype: torch.dtype, parameter_dtype: torch.dtype, memory_format: str) -> None:
    """Parameters of any dtype with activations of any: computed in float32, gradients in the dtype of each."""
    p = problem(dtype=dtype, parameter_dtype=parameter_dtype, memory_format=memory_format)
    assert p.bias is not None
    running_mean, running_var = torch.zeros_like(p.weight), torch.ones_like(p.weight)
    x, weight, bias = (tensor.requires_grad_() for tensor in (p.x, p.weight, p.bias))
    y = task_batch_norm(x, weight, bias, running_mean, running_var, num_tasks=3, momentum=1.0)
    expected = definition(p)
    assert y.dtype == dtype
    assert_within(y, expected.y.detach(), FORWARD[dtype])
    gradients = torch.autograd.grad(y, (x, weight, bias), p.dy)
    assert [gradient.dtype for gradient in gradients] == [dtype, parameter_dtype, parameter_dtype]
    for got, wanted in zip(gradients[1:], (expected.dweight, expected.dbias), strict=True):
        torch.testing.assert_close(
            got.double(), wanted.detach(), rtol=max(1e-5, torch.finfo(parameter_dtype).eps), atol=1e-4
        )
    assert running_mean.dtype == parameter_dtype
    positions = x.numel() // weight.numel()
    bound = max(2 * STATISTICS[dtype], torch.finfo(parameter_dtype).eps)
    assert_relative(running_var, expected.var.detach() * (positions / (positions - 1)), bound)


@pytest.mark.parametrize("statistics_dtype", DTYPES)
def test_evaluation_with_statistics_of_any_dtype(statistics_dtype: torch.dtype) -> None:
    mean, var = torch.randn(3, 5).to(statistics_dtype), (torch.rand(3, 5) + 0.5).to(statistics_dtype)
    y = task_batch_norm(X, W, None, mean, var, num_tasks=3, training=False)
    expected = task_batch_norm(X.double(), W, None, mean.double(), var.double(), num_tasks=3, training=False)
    assert_within(y, expected, FORWARD[torch.float32])


def test_parameters_may_be_strided() -> None:
    p = problem()
    expected = task_batch_norm(p.x, p.weight, p.bias, num_tasks=3)
    assert p.bias is not None
    wide = torch.stack((p.weight, p.bias), dim=-1)
    columns = p.weight.t().contiguous().t()
    assert torch.equal(task_batch_norm(p.x, wide[..., 0], wide[..., 1], num_tasks=3), expected)
    assert torch.equal(task_batch_norm(p.x, columns, p.bias, num_tasks=3), expected)
    shared = p.weight[:1].expand(3, 5)
    assert torch.equal(
        task_batch_norm(p.x, shared, None, num_tasks=3), task_batch_norm(p.x, shared.contiguous(), None, num_tasks=3)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("statistics", [True, False])
def test_inputs_are_never_modified(statistics: bool, training: bool, dtype: torch.dtype) -> None:
    p = problem(dtype=dtype)
    if not training and not statistics:
        return
    mean, var = (torch.randn(3, 5), torch.rand(3, 5) + 0.5) if statistics else (None, None)
    inputs = [p.x, p.weight, p.bias, p.dy]
    copies = [tensor.clone() for tensor in inputs if tensor is not None]
    leaves = [tensor.requires_grad_() for tensor in (p.x, p.weight, p.bias) if tensor is not None]
    y = task_batch_norm(p.x, p.weight, p.bias, mean, var, num_tasks=3, training=training)
    kept = y.detach().clone()
    torch.autograd.grad(y, leaves, p.dy)
    for tensor, copy in zip(inputs, copies, strict=True):
        assert tensor is not None
        assert torch.equal(tensor.detach(), copy)
    assert torch.equal(y, kept)


@pytest.mark.parametrize("stacking", STACKINGS)
def test_inputs_that_no_family_reads_are_copied_once(stacking: str) -> None:
    p = problem(stacking=stacking)
    gaps = torch.stack((p.x, torch.full_like(p.x, float("nan"))), dim=-1)[..., 0]  # position stride 2
    assert not gaps.is_contiguous()
    y = task_batch_norm(gaps, p.weight, p.bias, num_tasks=3, stacking=stacking)
    assert_within(y, definition(p).y, FORWARD[torch.float32])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("stacking", STACKINGS)
def test_output_has_the_shape_and_memory_format_of_x(stacking: str, memory_format: str) -> None:
    p = problem(stacking=stacking, memory_format=memory_format)
    y = task_batch_norm(p.x, p.weight, p.bias, num_tasks=3, stacking=stacking)
    assert (y.shape, y.stride(), y.dtype) == (p.x.shape, p.x.stride(), p.x.dtype)


def test_input_shared_by_all_tasks() -> None:
    shared = torch.randn(4, 5, 3, 3, requires_grad=True)
    weight = torch.randn(3, 5)
    x = shared.expand(3, 4, 5, 3, 3)
    y = task_batch_norm(x, weight, num_tasks=3, stacking="task_axis")
    dense = task_batch_norm(x.contiguous(), weight, num_tasks=3, stacking="task_axis")
    assert torch.equal(y, dense)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, shared, dy)[0], torch.autograd.grad(dense, shared, dy)[0])


def test_autocast_keeps_the_dtype_of_x() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert task_batch_norm(X, W, num_tasks=3).dtype == torch.float32
        assert task_batch_norm(X.bfloat16(), W, num_tasks=3).dtype == torch.bfloat16


def test_meta_tensors() -> None:
    y: Tensor = task_batch_norm(X.to("meta"), W.to("meta"), num_tasks=3)
    assert (y.device.type, y.shape, y.stride()) == ("meta", X.shape, X.stride())
