"""Runs the kernels of csrc/cuda in the PTX machine as the operators would launch them."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from ptxvm import Out, Report, Struct, compile_cuda, launch
from support import ROOT, Problem
from torch import Tensor

from tsbn_kernels import layout
from tsbn_kernels.plan import cuda as rules
from tsbn_kernels.reference import accumulate_dtype

CSRC = ROOT / "csrc" / "cuda"
H100_SHARED = 227 << 10
POINTERS = (
    "x", "dy", "residual", "out", "dresidual", "weight", "bias", "mean", "var", "first", "second", "partial", "staged",
)  # fmt: skip


@lru_cache
def source() -> str:
    """kernels.cu with our headers in place, so that tests can change any line of it."""
    seen = set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (CSRC / name).read_text().replace("#pragma once", "")
        return re.sub(r'#include "([^"]+)"', lambda match: expand(match[1]), text)

    return expand("kernels.cu")


@lru_cache
def ptx(target: int = 90, text: str | None = None) -> str:
    return compile_cuda(text or source(), target=target, flags=["-DTSBN_DEVICE_ONLY"])


class Epilogue(NamedTuple):
    activation: str = "none"
    residual: Tensor | None = None
    slope: float = 0.0


NO_EPILOGUE = Epilogue()


class Forward(NamedTuple):
    y: Tensor
    mean: Tensor
    var: Tensor
    reports: list[Report]
    plan: rules.Launch


class Backward(NamedTuple):
    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    dresidual: Tensor | None
    reports: list[Report]
    plan: rules.Launch


def view_of(x: Tensor, p: Problem) -> Tensor:
    """As ``[T, N, C, S]``; an input that has no task axis of its own is expanded."""
    if x.shape == p.dy.shape:
        return layout.task_view(x, p.num_tasks, p.stacking)
    return layout.task_view(x, 1, "task_major").expand(p.num_tasks, -1, -1, -1)


def strides(x: Tensor, p: Problem) -> rules.Strides:
    view = view_of(x, p)
    t, n, c, s = view.stride()
    assert view.data_ptr() == x.data_ptr()
    # The machine puts an array at an address that is as aligned as the array is within its storage.
    residue = x.storage_offset() % (16 // x.element_size())
    return rules.Strides(t, n, c, s, residue)


def piece(
    p: Problem, epilogue: Epilogue, out: Tensor | None, dy: Tensor | None = None, dresidual: Tensor | None = None,
    **options: Any,
) -> rules.Problem:  # fmt: skip
    x, out_, dy_, residual, dresidual_ = (
        None if tensor is None else strides(tensor, p) for tensor in (p.x, out, dy, epilogue.residual, dresidual)
    )
    assert x is not None
    fan_out = p.x.shape != p.dy.shape
    family = layout.family(p.x, "task_major" if fan_out else p.stacking)
    return rules.Problem(
        str(p.x.dtype).removeprefix("torch."), *view_of(p.x, p).shape, x, out_, dy_, rows=family == "rows",
        parameter_dtype=str(p.weight.dtype).removeprefix("torch."), activation=epilogue.activation, residual=residual,
        dresidual=dresidual_, fan_out=fan_out, **options,
    )  # fmt: skip


def vector(v: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if v is None else (rules.DTYPE_CODES[str(v.dtype).removeprefix("torch.")], *v.stride())


def dx_of_fan_out(dx: Tensor, phases: int, buffer: bool) -> Tensor | Out:
    """Between the passes h waits in a buffer, or in dx: that is then written, read, and written again."""
    if phases & rules.SPILL:
        return dx if buffer else Out(dx)
    return dx if phases & rules.COMBINE and not buffer else Out(dx, writes=1 if buffer else 2)


def run_plan(
    problem: rules.Problem, plan: rules.Launch, p: Problem, epilogue: Epilogue, arrays: dict[str, Any],
    *, target: int = 90, text: str | None = None, schedule: str | int = "forward",
) -> list[Report]:  # fmt: skip
    """Both launches of a split, or the one of the others."""
    reports = []
    arrays["residual"] = epilogue.residual
    for name, size in (("partial", plan.partial_bytes), ("staged", plan.staged_bytes)):
        if size:
            arrays[name] = torch.full((size,), 255, dtype=torch.uint8)  # NaN
    for n, phases in enumerate(plan.phases):
        writes_out = phases & rules.APPLY or (phases & rules.REDUCE and not problem.training)
        left = {"out": not writes_out, "first": phases & rules.SPILL, "dresidual": n > 0}
        left["second"] = left["first"]
        a = {name: None if left.get(name) and isinstance(value, Out) else value for name, value in arrays.items()}
        if problem.kernels == "backward_fan_out" and problem.two_passes:
            a["out"] = dx_of_fan_out(arrays["out"].array, phases, bool(plan.staged_bytes))
        vectors = [vector(arrays.get(name)) for name in ("weight", "bias", "mean", "var")]
        values = rules.numbers(problem, plan, phases, p.gate == "sigmoid", tuple(k for v in vectors for k in v))
        pointers = [0 if a.get(name) is None else a[name] for name in POINTERS]
        struct = Struct(f"13P2d{len(values)}q", *pointers, p.eps, epilogue.slope, *values)
        reports.append(launch(
            ptx(target, text), f"tsbn_{problem.kernels}_{rules.DTYPE_NAMES[problem.dtype]}_{plan.kernel}", plan.blocks,
            plan.threads, [struct], cluster=plan.cluster, shared=plan.shared, schedule=schedule,
        ))  # fmt: skip
    return reports


def empty_output(x: Tensor, p: Problem) -> Tensor:
    return torch.empty_strided(x.shape, layout.dense_strides(x, p.stacking), dtype=x.dtype)


def forward(
    p: Problem, variant: str, parts: int = 1, *, shared: int = H100_SHARED, resident: int = -1, threads: int = 0,
    given: tuple[Tensor, Tensor] | None = None, epilogue: Epilogue = NO_EPILOGUE, **options: Any,
) -> Forward:  # fmt: skip
    y = empty_output(p.dy, p)
    problem = piece(p, epilogue, y, training=given is None, bias=p.bias is not None)
    plan = rules.lay_out(problem, variant, parts, shared_limit=shared, resident=resident, threads=threads)  # type: ignore
    arrays: dict[str, Any] = {"x": p.x, "out": Out(y), "weight": p.weight, "bias": p.bias}
    if given is None:
        mean, var = (torch.empty(p.weight.shape, dtype=accumulate_dtype(p.x.dtype)) for _ in range(2))
        arrays |= {"first": Out(mean), "second": Out(var)}
    else:
        mean, var = given
        arrays |= {"mean": mean, "var": var}
    return Forward(y, mean, var, run_plan(problem, plan, p, epilogue, arrays, **options), plan)


def backward(
    p: Problem, mean: Tensor, var: Tensor, variant: str, parts: int = 1, *, shared: int = H100_SHARED,
    resident: int = -1, threads: int = 0, training: bool = True, need: tuple[bool, ...] = (True, True, True, False),
    epilogue: Epilogue = NO_EPILOGUE, **options: Any,
) -> Backward:  # fmt: skip
    """`need`: of dx, dweight, dbias and dresidual."""
    dx = empty_output(p.x, p) if need[0] else None
    dweight, dbias = (torch.empty_like(p.weight) if needed else None for needed in need[1:3])
    dresidual = empty_output(p.dy, p) if len(need) > 3 and need[3] else None
    reads_bias = p.bias is not None and epilogue.activation not in ("none", "inverse_leaky_relu")
    if epilogue.activation == "none":
        epilogue = NO_EPILOGUE  # dy itself is the gradient
    problem = piece(
        p, epilogue, dx, p.dy, dresidual, training=training, dweight=need[1], bias=need[2], reads_bias=reads_bias
    )
    plan = rules.lay_out(problem, variant, parts, shared_limit=shared, resident=resident, threads=threads)  # type: ignore
    arrays: dict[str, Any] = {"x": p.x, "dy": p.dy, "weight": p.weight, "mean": mean, "var": var}
    if reads_bias:
        arrays["bias"] = p.bias
    for name, value in (("out", dx), ("first", dweight), ("second", dbias), ("dresidual", dresidual)):
        arrays[name] = None if value is None else Out(value)
    reports = run_plan(problem, plan, p, epilogue, arrays, **options)
    return Backward(dx, dweight, dbias, dresidual, reports, plan)


def counted(result: Forward | Backward) -> tuple[int, int]:
    """Bytes of global memory read and written."""
    return (
        sum(report.global_read.bytes for report in result.reports),
        sum(report.global_written.bytes for report in result.reports),
    )
