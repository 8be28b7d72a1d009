"""Calls of the operators with an epilogue or a shared input, and what each must give."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from support.backends import threads
from support.problems import Problem, defined, in_double, problem, unstack
from support.tolerances import (
    BACKWARD,
    FORWARD,
    STATISTICS,
    Tolerance,
    assert_relative,
    assert_same_bits,
    assert_within,
)
from tsbn_kernels.definition.activations import ACTIVATIONS, EPILOGUES

ops = torch.ops.tsbn
SLOPE = 0.125
KINK = 1e-3  # no z is closer to a kink: there the derivative depends on the rounding of z


class Call(NamedTuple):
    """A problem whose x may be one for all tasks; ``given`` are the statistics in evaluation."""

    p: Problem
    residual: Tensor | None
    activation: str
    shared: bool
    given: tuple[Tensor, Tensor] | None

    @property
    def training(self) -> bool:
        return self.given is None

    @property
    def epilogue(self) -> tuple[Tensor | None, str, float, bool]:
        return self.residual, self.activation, SLOPE, self.shared

    def in_double(self) -> Call:
        residual = None if self.residual is None else self.residual.double()
        given = None if self.given is None else (self.given[0].double(), self.given[1].double())
        return self._replace(p=in_double(self.p), residual=residual, given=given)


class Outcome(NamedTuple):
    y: Tensor
    mean: Tensor
    var: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    dresidual: Tensor


def make_call(
    *size: Any,
    activation: str = "relu",
    residual: bool = False,
    training: bool = True,
    shared: bool = False,
    away_from_kinks: bool = True,
    **options: Any,
) -> Call:
    """A call on a random problem of ``size`` (T, N, C, spatial)."""
    p = problem(*size, **options)
    added = problem(*size, **options | {"seed": 1}).x if residual else None
    if shared:
        p = p._replace(x=problem(1, *size[1:], **options | {"stacking": "task_major", "seed": 2}).x)
    statistics = None
    if not training:
        mean = torch.linspace(-0.5, 1, p.weight.numel(), dtype=p.weight.dtype).view_as(p.weight)
        statistics = mean, mean.square() + 0.5
    call = Call(p, added, activation, shared, statistics)
    return without_kinks(call) if away_from_kinks else call


def without_kinks(call: Call, given: tuple[Tensor, Tensor] | None = None) -> Call:
    """Moves x where some z is near a kink; ``given`` are other statistics than the call's."""
    kinks = EPILOGUES[call.activation].kinks
    plain = call._replace(activation="none", given=call.given if given is None else given)
    for _ in range(50):
        z = forward(plain.in_double(), defined)[0] if kinks else torch.empty(0)
        near = near_kinks(z, call.activation, KINK)
        if not near.any():
            return call
        if call.shared:
            near = unstack(near, call.p.num_tasks, call.p.stacking).any(0)
        call.p.x[near] += 0.25
    raise AssertionError("some z stay near a kink")


def near_kinks(z: Tensor, activation: str, distance: float | Tensor) -> Tensor:
    """Where z is so near a kink that rounding may take it to the other side."""
    near = torch.zeros_like(z, dtype=torch.bool)
    for kink in EPILOGUES[activation].kinks:
        near |= (z - kink).abs() < distance
    return near


def forward(call: Call, by: Any = ops) -> tuple[Tensor, Tensor, Tensor]:
    p = call.p
    if call.given is None:
        y, mean, var = by.forward_training(p.x, p.weight, p.bias, *p.options, *call.epilogue)
        return y, mean, var
    return by.forward_eval(p.x, p.weight, p.bias, *call.given, *p.options, *call.epilogue), *call.given


def backward(
    call: Call,
    mean: Tensor,
    var: Tensor,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, True),
    by: Any = ops,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and residual; the last one only where it is not dy itself."""
    p, (*three, dresidual) = call.p, needs
    dresidual = dresidual and call.activation in ACTIVATIONS
    return by.backward(  # type: ignore[no-any-return]
        p.dy, p.x, p.weight, mean, var, *p.options, call.training, *three, p.bias, *call.epilogue, dresidual
    )


def run(call: Call, by: Any = ops) -> Outcome:
    y, mean, var = forward(call, by)
    return Outcome(y, mean, var, *backward(call, mean, var, by=by))


def assert_correct(call: Call, got: Outcome, slack: float = 1.0) -> None:
    """Against the definition in float64 on the same rounded input; ``slack`` widens all but the last units."""
    dtype, wanted = call.p.x.dtype, run(call.in_double(), defined)

    def scale(tensor: Tensor) -> float:
        return slack * max(1.0, float(tensor.abs().max()) / 4) if tensor.numel() else 1.0

    assert_within(got.y, wanted.y, FORWARD[dtype], scale(wanted.y))
    assert_relative(got.var, wanted.var, slack * STATISTICS[dtype])
    deviation = slack * torch.maximum(wanted.mean.abs(), wanted.var.sqrt())
    assert_within(got.mean, wanted.mean, Tolerance(STATISTICS[dtype], 1), deviation)
    tasks = call.p.num_tasks if call.shared else 1
    assert_within(got.dx, wanted.dx, BACKWARD[dtype], scale(wanted.dx) * tasks**0.5)
    assert_within(got.dresidual, wanted.dresidual, BACKWARD[dtype], scale(wanted.dresidual))
    positions = call.p.dy.numel() // call.p.weight.numel()
    for sums, exact in ((got.dweight, wanted.dweight), (got.dbias, wanted.dbias)):
        assert_within(sums, exact, Tolerance(STATISTICS[dtype], 1), slack * max(1.0, positions**0.5) * 4)
    shaped = run_meta(call)
    for actual, fake in zip(got, shaped, strict=True):
        assert (actual.shape, actual.stride(), actual.dtype) == (fake.shape, fake.stride(), fake.dtype)


def run_meta(call: Call) -> Outcome:
    """Shapes, strides and dtypes that the schema's fake kernels promise."""

    def meta(tensor: Tensor | None) -> Any:
        return (
            tensor
            if tensor is None
            else torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        )

    p = call.p._replace(x=meta(call.p.x), dy=meta(call.p.dy), weight=meta(call.p.weight), bias=meta(call.p.bias))
    given = None if call.given is None else (meta(call.given[0]), meta(call.given[1]))
    return run(call._replace(p=p, residual=meta(call.residual), given=given))


def assert_same_bits_for_every_number_of_threads(call: Call) -> None:
    results = []
    for count in (1, 2, 3, 4, 2):
        with threads(count):
            results.append(run(call))
    for result in results[1:]:
        for got, wanted in zip(result, results[0], strict=True):
            assert_same_bits(got, wanted)
