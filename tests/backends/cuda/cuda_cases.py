"""Problems with an epilogue or a fan-out, and what their results must be by the definition in float64."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from cuda_machine import Backward, Epilogue, backward, forward
from support.problems import Problem, defined, in_double, in_memory_format, problem, unstack
from support.tolerances import BACKWARD, FORWARD, STATISTICS, Tolerance, assert_within
from torch import Tensor

from tsbn_kernels.definition.activations import EPILOGUES, as_module

SLOPE = 0.125


class Exact(NamedTuple):
    y: Tensor
    mean: Tensor
    var: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    dresidual: Tensor
    nearest_kink: float


def exact(p: Problem, epilogue: Epilogue, given: tuple[Tensor, Tensor] | None = None) -> Exact:
    """The definition: z and its gradient by the reference's formulas, the activation and its slope by autograd."""
    wide, shared = in_double(p), p.x.shape != p.dy.shape
    mean, var = defined.moments(wide.x, p.num_tasks, p.stacking, shared) if given is None else given
    z = defined.forward_eval(wide.x, wide.weight, wide.bias, mean.double(), var.double(), *p.options, shared=shared)
    z = z if epilogue.residual is None else z + epilogue.residual.double()
    z.requires_grad_()
    y = as_module(epilogue.activation, SLOPE)(z)
    (g,) = torch.autograd.grad(y, z, wide.dy)
    needs = True, True, True
    gradients = defined.backward(
        g, wide.x, wide.weight, mean.double(), var.double(), *p.options, given is None, *needs, shared=shared
    )[:3]
    kinks = EPILOGUES[epilogue.activation].kinks
    nearest = min((float((z.detach() - kink).abs().min()) for kink in kinks), default=1.0)
    return Exact(y.detach(), mean, var, *gradients, g, nearest)


def case(activation: str, residual: bool, *size: Any, shared: bool = False, **options: Any) -> tuple[Problem, Epilogue]:
    """A problem none of whose values lies so near a kink that rounding could take it to the other side."""
    for seed in itertools.count():
        p = problem(*size, seed=seed, **options)
        added = problem(*size, seed=seed + 100, **options).x if residual else None
        if shared:
            x = unstack(p.x, p.num_tasks, p.stacking)[0]
            p = p._replace(x=in_memory_format(x, "task_major", options.get("memory_format", "contiguous")))
        epilogue = Epilogue(activation, added, SLOPE)
        if exact(p, epilogue).nearest_kink > 1e-5:
            return p, epilogue
    raise AssertionError


def check(p: Problem, epilogue: Epilogue, variant: str, parts: int = 1, **options: Any) -> Backward:
    there = forward(p, variant, parts, epilogue=epilogue, **options)
    wanted, dtype = exact(p, epilogue), p.x.dtype
    assert_within(there.y, wanted.y, FORWARD[dtype], max(1.0, float(wanted.y.abs().max()) / 4))
    assert_within(there.mean, wanted.mean, Tolerance(STATISTICS[dtype], 1), 4.0)
    assert_within(there.var, wanted.var, Tolerance(STATISTICS[dtype], 1), 4.0)
    need = (True, True, True, epilogue.activation != "none")
    if p.x.shape != p.dy.shape and variant in ("resident", "cluster", "together"):
        variant = "split" if parts > 1 else "streaming"
    back = backward(p, there.mean, there.var, variant, parts, epilogue=epilogue, need=need, **options)
    check_gradients(p, back, wanted)
    return back


def check_gradients(p: Problem, back: Backward, wanted: Exact) -> None:
    dtype, positions = p.x.dtype, p.dy.numel() // p.weight.numel()
    for got, expected in ((back.dx, wanted.dx), (back.dresidual, wanted.dresidual)):
        if got is not None:
            assert_within(got, expected, BACKWARD[dtype], max(1.0, float(expected.abs().max()) / 4))
    for got, expected in ((back.dweight, wanted.dweight), (back.dbias, wanted.dbias)):
        if got is not None:
            assert_within(got, expected, Tolerance(STATISTICS[dtype], 1), max(1.0, positions**0.5) * 4)
