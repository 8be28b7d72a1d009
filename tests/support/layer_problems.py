"""Calls of the operators of layer normalisation in every layout, their results, and those of the definition."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from support.problems import stack
from support.tolerances import (
    BACKWARD,
    FORWARD,
    STATISTICS,
    Tolerance,
    assert_relative,
    assert_same_bits,
    assert_within,
)
from tsbn_kernels.definition import layer_norm as reference
from tsbn_kernels.operator import layer_ops

defined = layer_ops.flat(reference)  # the definition, as functions of flat arguments


class LayerProblem(NamedTuple):
    """One call of the operators, with random upstream gradients of y and, with a residual, of ``s = x + residual``."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    dy: Tensor
    ds: Tensor | None
    gate: str
    stacking: str
    eps: float = 1e-5
    rms: bool = False
    fan_out: bool = False

    @property
    def options(self) -> tuple[Any, ...]:
        """The options of the forward operator; those of the backward have no eps."""
        return self.eps, self.gate, self.stacking, self.rms, self.fan_out


def layer_problem(
    T: int = 3,
    N: int = 2,
    tokens: tuple[int, ...] = (5,),
    shape: tuple[int, ...] = (7,),
    *,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    stacking: str = "task_major",
    gate: str = "sigmoid",
    bias: bool = True,
    residual: bool = False,
    rms: bool = False,
    fan_out: bool = False,
    mean: float = 0.5,
    seed: int = 0,
) -> LayerProblem:
    """A problem of T tasks with N samples of ``tokens`` rows of ``shape`` each; ``mean`` in standard deviations."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float32).double()

    def of_input(offset: float = 0.0) -> Tensor:
        streams = (normal(T, N, *tokens, *shape) + offset).to(dtype)
        return streams[0] if fan_out else stack(streams, stacking)

    parameters = parameter_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    weight, offset = normal(T, *shape).to(parameters), normal(T, *shape).to(parameters)
    return LayerProblem(
        of_input(mean),
        weight,
        offset if bias and not rms else None,
        of_input() if residual else None,
        stack(normal(T, N, *tokens, *shape).to(dtype), stacking),
        of_input() if residual else None,
        gate,
        stacking,
        rms=rms,
        fan_out=fan_out,
    )


def in_double(p: LayerProblem) -> LayerProblem:
    """The same numbers, as rounded, in float64."""
    return p._replace(**{name: t.double() for name, t in p._asdict().items() if isinstance(t, Tensor)})


class LayerResults(NamedTuple):
    """What both operators return; without a residual s is empty, in the RMS form the mean is."""

    y: Tensor
    s: Tensor
    mean: Tensor
    rstd: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor


def run(p: LayerProblem, operators: Any = torch.ops.tsbn) -> LayerResults:
    """Forward and backward pass, by default through the operators that the dispatcher picks."""
    y, s, mean, rstd = operators.layer_norm(p.x, p.weight, p.bias, p.residual, *p.options)
    read = p.x if p.residual is None else s
    needs = True, True, p.bias is not None
    found = operators.layer_norm_backward(p.dy, p.ds, read, p.weight, mean, rstd, *p.options[1:], *needs)
    return LayerResults(y, s, mean, rstd, *found)


def definition(p: LayerProblem) -> LayerResults:
    """The results of the reference in float64, where ``x + residual`` is that of the dtype of x."""
    wide = in_double(p)
    if p.residual is None:
        return run(wide, defined)
    s = p.x.double() + p.residual.double()
    rounded = s.to(p.x.dtype).double()
    return run(wide._replace(x=rounded, residual=torch.zeros_like(rounded)), defined)


def assert_matches_definition(p: LayerProblem, actual: LayerResults, expected: LayerResults | None = None) -> None:
    """Within the tolerances of the package, of the definition where nothing else is ``expected``."""
    expected, dtype = expected or definition(p), p.x.dtype
    assert_within(actual.y, expected.y, FORWARD[dtype], scale=max(1.0, float(expected.y.abs().max()) / 4))
    if p.residual is not None:
        assert_same_bits(actual.s, p.x + p.residual)
    if not p.rms:
        deviation = torch.maximum(expected.mean.abs(), 1 / expected.rstd)
        assert_within(actual.mean, expected.mean, Tolerance(STATISTICS[dtype], 1), deviation)
    assert_relative(actual.rstd, expected.rstd, STATISTICS[dtype])
    # In a row of few values dx is what is left of terms as large as rstd * dz.
    rstd = expected.rstd.reshape(*p.x.shape[: 1 + p.x.dim() - p.weight.dim()], *(1,) * (p.weight.dim() - 1))
    terms = (len(p.weight) if p.fan_out else 1) * float(p.dy.abs().max()) / 4
    assert_within(actual.dx, expected.dx, BACKWARD[dtype], scale=rstd.clamp_min(1) * max(1.0, terms))
    rows = p.dy.numel() // p.weight.numel()
    for got, wanted in ((actual.dweight, expected.dweight), (actual.dbias, expected.dbias)):
        assert_within(got, wanted, Tolerance(STATISTICS[dtype], 1), scale=max(1.0, rows**0.5) * 4)
