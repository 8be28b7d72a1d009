"""The definition against PyTorch's own layer_norm and rms_norm, one plain layer for each task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.layer_problems import LayerProblem, defined, in_double, layer_problem, run
from support.problems import GATES, STACKINGS, stack, unstack
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from tsbn_kernels.definition import layer_norm as reference
from tsbn_kernels.definition.options import LayerOptions

CASES = [
    {"gate": gate, "stacking": stacking, "fan_out": fan_out, "residual": residual, **form}
    for stacking in STACKINGS
    for gate in GATES
    for fan_out in (False, True)
    for residual in (False, True)
    for form in ({"bias": True}, {"bias": False}, {"rms": True})
]


def loop(p: LayerProblem) -> tuple[Tensor, Tensor]:
    """y and ``x + residual`` by T calls of PyTorch's functions."""
    T, shape = len(p.weight), p.weight.shape[1:]
    s = p.x if p.residual is None else p.x + p.residual
    streams = s.expand(T, *s.shape) if p.fan_out else unstack(s, T, p.stacking)
    scale = torch.sigmoid(p.weight) if p.gate == "sigmoid" else p.weight

    def rows() -> Iterator[Tensor]:
        for t in range(T):
            if p.rms:
                yield rms_norm(streams[t], shape, scale[t], p.eps)
            else:
                yield layer_norm(streams[t], shape, scale[t], None if p.bias is None else p.bias[t], p.eps)

    return stack(torch.stack(list(rows())), p.stacking), s


def leaves(p: LayerProblem) -> tuple[LayerProblem, list[Tensor]]:
    """The problem with operands that require a gradient, and these."""
    names = [name for name in ("x", "weight", "bias", "residual") if getattr(p, name) is not None]
    own = {name: getattr(p, name).clone().requires_grad_() for name in names}
    return p._replace(**own), list(own.values())


@pytest.mark.parametrize("shape", [(7,), (3, 5)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_a_loop_of_layer_norms(case: dict[str, Any], shape: tuple[int, ...]) -> None:
    p = layer_problem(shape=shape, dtype=torch.float64, **case)
    with_leaves, operands = leaves(p)
    y, s = loop(with_leaves)
    outputs, given = ([y, s], [p.dy, p.ds]) if p.residual is not None else ([y], [p.dy])
    gradients = torch.autograd.grad(outputs, operands, given)

    found = run(p, defined)
    wanted = {"y": y, "dx": gradients[0], "dweight": gradients[1]}
    if p.bias is not None:
        wanted["dbias"] = gradients[2]
    if p.residual is not None:
        wanted["s"] = s
        torch.testing.assert_close(gradients[-1], gradients[0])
    for name, expected in wanted.items():
        torch.testing.assert_close(getattr(found, name), expected.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_statistics_are_those_of_the_rows_of_x(case: dict[str, Any]) -> None:
    p = layer_problem(dtype=torch.float64, **case)
    found = run(p, defined)
    rows = (p.x if p.residual is None else found.s).reshape(-1, 7)
    if p.rms:
        assert found.mean.shape == (0,)
        torch.testing.assert_close(found.rstd, (rows.square().mean(1) + p.eps).rsqrt())
    else:
        torch.testing.assert_close(found.mean, rows.mean(1))
        torch.testing.assert_close(found.rstd, (rows.var(1, correction=0) + p.eps).rsqrt())


@pytest.mark.parametrize("stacking", STACKINGS)
def test_the_task_of_a_row(stacking: str) -> None:
    """What kernels go by: row r of what is stacked is one of task ``r // inner % T``."""
    T, tokens = 3, (5, 2)
    tasks = stack(torch.arange(T).view(T, 1, 1, 1, 1).expand(T, 4, *tokens, 7), stacking)
    weight = torch.zeros(T, 7)
    inner = reference.inner_rows(tasks, weight, LayerOptions(T, 1e-5, "sigmoid", stacking))
    rows = torch.arange(T * 4 * 10)
    assert torch.equal(rows // inner % T, tasks.flatten(0, -2)[:, 0])
    # Of one input for all tasks: row r of stream t is (r // inner) * T * inner + t * inner + r % inner of y.
    shared = torch.arange(4 * 10).view(4, *tokens, 1).expand(4, *tokens, 7)
    inner = reference.inner_rows(shared, weight, LayerOptions(T, 1e-5, "sigmoid", stacking, fan_out=True))
    y = stack(shared.expand(T, *shared.shape) + 1000 * torch.arange(T).view(T, 1, 1, 1, 1), stacking).flatten(0, -2)[
        :, 0
    ]
    r = torch.arange(4 * 10)
    for t in range(T):
        assert torch.equal(y[(r // inner) * T * inner + t * inner + r % inner], r + 1000 * t)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_first_and_second_derivative(case: dict[str, Any]) -> None:
    p = layer_problem(2, 2, (2,), (3,), dtype=torch.float64, **case)
    _, operands = leaves(p)
    names = [name for name in ("x", "weight", "bias", "residual") if getattr(p, name) is not None]

    def forward(*operands: Tensor) -> tuple[Tensor, ...]:
        own = p._replace(**dict(zip(names, operands, strict=True)))
        y, s, *_ = defined.layer_norm(own.x, own.weight, own.bias, own.residual, *own.options)
        return (y,) if own.residual is None else (y, s)

    assert torch.autograd.gradcheck(forward, operands)
    assert torch.autograd.gradgradcheck(forward, operands)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
def test_half_inputs_are_computed_in_float32(residual: bool, dtype: torch.dtype) -> None:
    p = layer_problem(dtype=dtype, residual=residual)
    found = run(p, defined)
    assert (found.y.dtype, found.mean.dtype, found.rstd.dtype) == (dtype, torch.float32, torch.float32)
    x = p.x if p.residual is None else (p.x.float() + p.residual.float()).to(dtype)
    wide = defined.layer_norm(x.float(), p.weight, p.bias, None, *p.options)[0]
    assert torch.equal(found.y, wide.to(dtype))


@pytest.mark.parametrize(("mean", "most"), [(0.0, 5e-6), (1.0, 5e-6), (1e3, 2e-4)])
@pytest.mark.parametrize("shape", [(1,), (64,), (768,), (5000,)])
def test_float32_is_accurate(shape: tuple[int, ...], mean: float, most: float) -> None:
    p = layer_problem(2, 3, (5,), shape, mean=mean)
    y, expected = (run(problem, defined).y for problem in (p, in_double(p)))
    assert (y - expected).abs().max() < most


@pytest.mark.parametrize("stacking", STACKINGS)
@pytest.mark.parametrize("fan_out", [False, True])
def test_empty_batch(fan_out: bool, stacking: str) -> None:
    p = layer_problem(N=0, stacking=stacking, fan_out=fan_out)
    found = run(p, defined)
    assert found.y.shape == p.dy.shape
    assert found.dx.shape == p.x.shape
    assert found.mean.shape == found.rstd.shape == (0,)
    assert torch.equal(found.dweight, torch.zeros(3, 7))
    assert torch.equal(found.dbias, torch.zeros(3, 7))
