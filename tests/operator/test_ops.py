"""The operators as PyTorch sees them: schema, fake kernels, errors instead of crashes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.problems import DTYPES, FORMATS, STACKINGS, Problem, problem
from support.processes import python_output
from support.tolerances import assert_same_bits
from torch import Tensor
from torch._subclasses import FakeTensorMode

ops = torch.ops.tsbn


def statistics(p: Problem) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if p.x.dtype == torch.float64 else torch.float32
    return torch.randn(p.weight.shape, dtype=dtype), torch.rand(p.weight.shape, dtype=dtype) + 0.5


def backward_arguments(
    p: Problem, training: bool = True, needs: tuple[bool, ...] = (True, True, True)
) -> tuple[Any, ...]:
    return p.dy, p.x, p.weight, *statistics(p), *p.options, training, *needs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("stacking", STACKINGS)
def test_opcheck(stacking: str, memory_format: str, dtype: torch.dtype) -> None:
    p = problem(2, 2, 3, (2, 2), dtype=dtype, stacking=stacking, memory_format=memory_format)
    for bias in (p.bias, None):
        torch.library.opcheck(ops.forward_training.default, (p.x, p.weight, bias, *p.options))
        torch.library.opcheck(ops.forward_eval.default, (p.x, p.weight, bias, *statistics(p), *p.options))
    for training in (True, False):
        torch.library.opcheck(ops.backward.default, backward_arguments(p, training))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
def test_opcheck_of_the_gradients_that_are_needed(needs: tuple[bool, ...], training: bool) -> None:
    p = problem(2, 2, 3, (2, 2), dtype=torch.bfloat16)
    arguments = backward_arguments(p, training, needs)
    if not any(needs) and not training:
        return  # test_no_gradient_needed_in_evaluation, in a process of its own
    torch.library.opcheck(ops.backward.default, arguments)
    for gradient, need, like in zip(
        ops.backward(*arguments), (*needs, False), (p.x, p.weight, p.weight, p.x), strict=True
    ):
        assert gradient.shape == (like.shape if need else (0,))
        assert gradient.dtype == like.dtype


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("shared", [False, True])
def test_opcheck_of_the_derivatives(shared: bool, activation: str) -> None:
    """The operators bring their derivatives along, which graphs rely on."""
    p = problem(2, 2, 3, (2, 2))
    leaves = [tensor.clone().requires_grad_() for tensor in (p.x[:2] if shared else p.x, p.weight, p.bias, p.dy)]
    end = leaves[3], activation, 0.0, shared
    torch.library.opcheck(ops.forward_training.default, (*leaves[:3], *p.options, *end))
    torch.library.opcheck(ops.forward_eval.default, (*leaves[:3], *statistics(p), *p.options, *end))

    def call(*leaves: Tensor) -> Tensor:
        y: Tensor = ops.forward_training(*leaves[:3], *p.options, leaves[3], activation, 0.0, shared)[0]
        return y

    double = [leaf.detach().double().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(call, double)
    assert torch.autograd.gradgradcheck(call, double)


def test_no_gradient_needed_in_evaluation() -> None:
    program = """
import torch, tsbn_kernels
x, w = torch.randn(4, 3, 5), torch.zeros(2, 3)
options = (2, 1e-5, "sigmoid", "task_major", False, False, False, False)
print([g.numel() for g in torch.ops.tsbn.backward(x, x, w, w, w + 1, *options)])
"""
    assert python_output(program).strip() == "[0, 0, 0, 0]"


SHAPES: list[Callable[[], Tensor]] = [
    lambda: torch.randn(4, 5, 3, 2),
    lambda: torch.randn(4, 5, 3, 2).to(memory_format=torch.channels_last),
    lambda: torch.randn(8, 5, 3, 2)[::2],
    lambda: torch.randn(4, 10, 3, 2).to(memory_format=torch.channels_last)[:, 5:],
    lambda: torch.randn(4, 5),
    lambda: torch.randn(4, 5, 1, 1),
    lambda: torch.randn(4, 1, 3, 2),
    lambda: torch.randn(0, 5, 3, 2),
    lambda: torch.randn(5, 4, 3, 2).transpose(0, 1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", SHAPES)
def test_fake_outputs_equal_the_real_ones(make: Callable[[], Tensor], dtype: torch.dtype) -> None:
    x = make().to(dtype, memory_format=torch.preserve_format)
    p = Problem(
        x, torch.empty_like(x), torch.zeros(2, x.shape[1], dtype=torch.bfloat16), None, 2, "sigmoid", "task_major"
    )
    calls = [
        (ops.forward_training, (x, p.weight, None, *p.options)),
        (ops.forward_eval, (x, p.weight, None, *statistics(p), *p.options)),
        (ops.backward, backward_arguments(p)),
    ]
    for op, arguments in calls:
        real = op(*arguments)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
        real, fake = ([out] if isinstance(out, Tensor) else out for out in (real, fake))
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


X, W = torch.randn(4, 5, 3, 2), torch.zeros(2, 5)
OPTIONS = (2, 1e-5, "sigmoid", "task_major")
FLAGS = (True, True, True, True)


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.forward_training(X, W[:, :4], None, *OPTIONS),
        lambda: ops.forward_training(X, W[0], None, *OPTIONS),
        lambda: ops.forward_training(X, W, W[:1], *OPTIONS),
        lambda: ops.forward_training(X[:3], W, None, *OPTIONS),
        lambda: ops.forward_training(X[:, 0, 0, 0], W, None, *OPTIONS),
        lambda: ops.forward_training(torch.tensor(1.0), W, None, *OPTIONS),
        lambda: ops.forward_training(X, W, None, 0, 1e-5, "sigmoid", "task_major"),
        lambda: ops.forward_training(X, W, None, -2, 1e-5, "sigmoid", "task_major"),
        lambda: ops.forward_training(X, W, None, 2, 1e-5, "tanh", "task_major"),
        lambda: ops.forward_training(X, W, None, 2, 1e-5, "sigmoid", "TNC"),
        lambda: ops.forward_training(X, W, None, 2, 1e-5, "sigmoid", "task_axis"),
        lambda: ops.forward_training(X.int(), W, None, *OPTIONS),
        lambda: ops.forward_training(X.cfloat(), W, None, *OPTIONS),
        lambda: ops.forward_training(X, W.int(), None, *OPTIONS),
        lambda: ops.forward_training(X, W, W.bool(), *OPTIONS),
        lambda: ops.forward_eval(X, W, None, W[:, :4], W, *OPTIONS),
        lambda: ops.forward_eval(X, W, None, W, W[0], *OPTIONS),
        lambda: ops.forward_eval(X.bool(), W, None, W, W, *OPTIONS),
        lambda: ops.backward(X[:2], X, W, W, W, *OPTIONS, *FLAGS),
        lambda: ops.backward(X.double(), X, W, W, W, *OPTIONS, *FLAGS),
        lambda: ops.backward(X.flatten(2), X, W, W, W, *OPTIONS, *FLAGS),
        lambda: ops.backward(X, X, W, W[0], W, *OPTIONS, *FLAGS),
        lambda: ops.backward(X, X, W.int(), W, W, *OPTIONS, *FLAGS),
    ],
)
@pytest.mark.usefixtures("native")
def test_bad_arguments_raise(call: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match="tsbn: ") as raised:
        call()
    assert "INTERNAL" not in str(raised.value)


ANY_STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "with gaps": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "channels of planes": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("of_x", "of_dy"),
    [*((of_x, "contiguous") for of_x in ANY_STRIDES), *(("channels_last", of_dy) for of_dy in ANY_STRIDES)],
)
def test_operands_of_any_strides(of_x: str, of_dy: str, shared: bool, backend: str) -> None:
    """A compiler may choose them: results are those of contiguous operands, in the strides of the fake kernel."""
    p = problem(2, 2, 3, (3, 2))
    x = p.x[:2] if shared else p.x
    mean, var = statistics(p)

    def results(x: Tensor, dy: Tensor, residual: Tensor) -> list[Tensor]:
        end = residual, "silu", 0.0, shared
        outputs = (
            *ops.forward_training(x, p.weight, p.bias, *p.options, *end),
            *ops.backward(dy, x, p.weight, mean, var, *p.options, *FLAGS, p.bias, *end, True),
            *ops.moments(x, p.num_tasks, p.stacking, shared),
            *ops.input_gradient(dy, x, p.weight, mean, var, mean, mean, *p.options, p.bias, *end, True),
        )
        return [*outputs, ops.forward_eval(x, p.weight, p.bias, mean, var, *p.options, *end)]

    residual = torch.randn(p.dy.shape)
    strided = ANY_STRIDES[of_x](x), ANY_STRIDES[of_dy](p.dy), ANY_STRIDES[of_dy](residual)
    got = results(*strided)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = results(*map(mode.from_tensor, strided))
    for a, b, wanted in zip(got, fake, results(x, p.dy, residual), strict=True):
        torch.testing.assert_close(a, wanted)
        assert a.stride() == b.stride()
    assert torch.equal(strided[0], x)


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_at_any_address(dtype: torch.dtype, memory_format: str, offset: int) -> None:
    """Results do not depend on alignment, to the bit."""
    p = problem(2, 3, 33, (5, 7), dtype=dtype, memory_format=memory_format)

    def shifted(tensor: Tensor) -> Tensor:
        memory = torch.full((tensor.numel() + offset,), float("nan"), dtype=dtype)
        view = memory.as_strided(tensor.shape, tensor.stride(), offset)
        return view.copy_(tensor)

    moved = p._replace(x=shifted(p.x), dy=shifted(p.dy))
    assert moved.x.data_ptr() % 64 != 0
    for got, wanted in zip(forward_backward(moved), forward_backward(p), strict=True):
        assert_same_bits(got, wanted)


def forward_backward(p: Problem) -> tuple[Tensor, ...]:
    y, mean, var = ops.forward_training(p.x, p.weight, p.bias, *p.options)
    return y, mean, var, *ops.backward(p.dy, p.x, p.weight, mean, var, *p.options, *FLAGS)


def test_outputs_are_separate_tensors() -> None:
    outputs = forward_backward(problem())
    assert len({tensor.data_ptr() for tensor in outputs}) == len(outputs)
    assert all(not tensor._is_view() for tensor in outputs)


def test_parameters_need_not_be_parameters_of_the_dtype_of_x() -> None:
    """Each gradient of a parameter has the parameter's dtype; statistics are float32 for half inputs."""
    for dtype, parameter_dtype in itertools.product(DTYPES, DTYPES):
        p = problem(dtype=dtype, parameter_dtype=parameter_dtype)
        _, mean, var, dx, dweight, dbias, _ = forward_backward(p)
        assert mean.dtype == var.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (dx.dtype, dweight.dtype, dbias.dtype) == (dtype, parameter_dtype, parameter_dtype)


def test_large_outputs_behave_as_other_tensors() -> None:
    """Outputs that live in the pool can be changed, shared, cloned, viewed and saved."""
    x = torch.randn(8, 16, 64, 64)
    y = ops.forward_training(x, torch.zeros(2, 16), None, *OPTIONS)[0]
    copy = y.clone()
    assert torch.equal(y.add_(1), copy + 1)
    assert y.view(-1)[1:].storage_offset() == 1
    y.share_memory_()
    assert torch.equal(y, copy + 1)
    assert y.is_shared()
    y.set_(torch.zeros(3))
    assert y.shape == (3,)
