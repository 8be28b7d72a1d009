"""The operators of layer normalisation as PyTorch sees them: schema, fake kernels, any strides."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.layer_problems import LayerProblem, defined, layer_problem, run
from support.problems import DTYPES, STACKINGS
from torch import Tensor
from torch._subclasses import FakeTensorMode

ops = torch.ops.tsbn


def backward_arguments(p: LayerProblem, needs: tuple[bool, ...] = (True, True, True)) -> tuple[Any, ...]:
    _, s, mean, rstd = ops.layer_norm(p.x, p.weight, p.bias, p.residual, *p.options)
    return p.dy, p.ds, p.x if p.residual is None else s, p.weight, mean, rstd, *p.options[1:], *needs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("fan_out", [False, True])
@pytest.mark.parametrize("stacking", STACKINGS)
def test_opcheck(stacking: str, fan_out: bool, rms: bool, residual: bool, dtype: torch.dtype) -> None:
    p = layer_problem(2, dtype=dtype, stacking=stacking, fan_out=fan_out, rms=rms, residual=residual)
    torch.library.opcheck(ops.layer_norm.default, (p.x, p.weight, p.bias, p.residual, *p.options))
    torch.library.opcheck(ops.layer_norm_backward.default, backward_arguments(p))


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
def test_gradients_that_are_not_needed_are_empty(needs: tuple[bool, ...]) -> None:
    p = layer_problem(dtype=torch.bfloat16, residual=True)
    arguments = backward_arguments(p, needs)
    torch.library.opcheck(ops.layer_norm_backward.default, arguments)
    likes = p.x, p.weight, p.weight
    for gradient, need, like in zip(ops.layer_norm_backward(*arguments), needs, likes, strict=True):
        assert gradient.shape == (like.shape if need else (0,))
        assert gradient.dtype == like.dtype


SHAPES: list[Callable[[], Tensor]] = [
    lambda: torch.randn(4, 5, 6),
    lambda: torch.randn(4, 6, 5).mT,
    lambda: torch.randn(8, 5, 6)[::2],
    lambda: torch.randn(4, 5, 12)[..., ::2],
    lambda: torch.randn(4, 6),
    lambda: torch.randn(0, 5, 6),
    lambda: torch.randn(1, 1, 6).expand(4, 5, 6),
]


@pytest.mark.parametrize("fan_out", [False, True])
@pytest.mark.parametrize("make", SHAPES)
def test_operands_of_any_strides(make: Callable[[], Tensor], fan_out: bool) -> None:
    """A compiler may choose them: results are those of contiguous operands, and as the fake kernels say."""
    x, T = make(), 2
    dy = make().new_empty(0) if x.numel() == 0 else torch.randn(x.shape)
    dy = dy.reshape(x.shape).repeat(T, *(1,) * (x.dim() - 1)) if fan_out else dy.reshape(x.shape)
    p = LayerProblem(
        x, torch.randn(T, 6, dtype=torch.float64), None, make(), dy, make(), "sigmoid", "task_major", fan_out=fan_out
    )
    found = run(p)
    with FakeTensorMode() as mode:
        fake = run(LayerProblem(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in p)))
    plain = run(LayerProblem(*(a.contiguous() if isinstance(a, Tensor) else a for a in p)))
    for a, b, wanted in zip(found, fake, plain, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
        torch.testing.assert_close(a, wanted)


def test_outputs_are_separate_tensors() -> None:
    outputs = run(layer_problem(residual=True))
    assert len({tensor.data_ptr() for tensor in outputs}) == len(outputs)


@pytest.mark.parametrize("parameter_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_need_not_have_the_dtype_of_x(dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
    p = layer_problem(dtype=dtype, parameter_dtype=parameter_dtype)
    found, wanted = run(p), run(p, defined)
    assert found.mean.dtype == found.rstd.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (found.dx.dtype, found.dweight.dtype, found.dbias.dtype) == (dtype, parameter_dtype, parameter_dtype)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
