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
    reports: list[Report]
    plan: rules.Launch


def strides(x: Tensor, p: Problem) -> rules.Strides:
    view = layout.task_view(x, p.num_tasks, p.stacking)
    t, n, c, s = view.stride()
    assert view.data_ptr() == x.data_ptr()
    # The machine puts an array at an address that is as aligned as the array is within its storage.
    residue = x.storage_offset() % (16 // x.element_size())
    return rules.Strides(t, n, c, s, residue)


def piece(p: Problem, x: Tensor, out: Tensor | None, dy: Tensor | None = None, **options: Any) -> rules.Problem:
    view = layout.task_view(x, p.num_tasks, p.stacking)
    return rules.Problem(
        str(x.dtype).removeprefix("torch."), *view.shape, strides(x, p), None if out is None else strides(out, p),
        None if dy is None else strides(dy, p), rows=layout.family(x, p.stacking) == "rows",
        parameter_dtype=str(p.weight.dtype).removeprefix("torch."), **options,
    )  # fmt: skip


def vector(v: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if v is None else (rules.DTYPE_CODES[str(v.dtype).removeprefix("torch.")], *v.stride())


def run_plan(
    direction: str, problem: rules.Problem, plan: rules.Launch, p: Problem, arrays: dict[str, Any],
    *, target: int = 90, text: str | None = None, schedule: str | int = "forward",
) -> list[Report]:  # fmt: skip
    """Both launches of a split, or the one of the others."""
    reports = []
    partial: Tensor | None = torch.zeros(max(1, plan.partial_bytes), dtype=torch.uint8) if plan.partial_bytes else None
    for phases in plan.phases:
        writes_out = phases & rules.APPLY or (phases & rules.REDUCE and not problem.training)
        left = {"out": not writes_out, "first": phases & rules.SPILL, "second": phases & rules.SPILL}
        a = {name: None if left.get(name) and isinstance(value, Out) else value for name, value in arrays.items()}
        vectors = [vector(arrays.get(name)) for name in ("weight", "bias", "mean", "var")]
        values = rules.numbers(problem, plan, phases, p.gate == "sigmoid", tuple(k for v in vectors for k in v))
        names = ("x", "dy", "out", "weight", "bias", "mean", "var", "first", "second")
        pointers = [0 if a.get(name) is None else a[name] for name in names]
        struct = Struct(f"10Pd{len(values)}q", *pointers, 0 if partial is None else partial, p.eps, *values)
        reports.append(launch(
            ptx(target, text), f"tsbn_{direction}_{rules.DTYPE_NAMES[problem.dtype]}_{plan.kernel}", plan.blocks,
            plan.threads, [struct], cluster=plan.cluster, shared=plan.shared, schedule=schedule,
        ))  # fmt: skip
    return reports


def empty_output(x: Tensor, p: Problem) -> Tensor:
    return torch.empty_strided(x.shape, layout.dense_strides(x, p.stacking), dtype=x.dtype)


def forward(
    p: Problem, variant: str, parts: int = 1, *, shared: int = H100_SHARED, resident: int = -1, threads: int = 0,
    given: tuple[Tensor, Tensor] | None = None, **options: Any,
) -> Forward:  # fmt: skip
    y = empty_output(p.x, p)
    problem = piece(p, p.x, y, training=given is None, bias=p.bias is not None)
    plan = rules.lay_out(problem, variant, parts, shared_limit=shared, resident=resident, threads=threads)  # type: ignore
    arrays: dict[str, Any] = {"x": p.x, "out": Out(y), "weight": p.weight, "bias": p.bias}
    if given is None:
        mean, var = (torch.empty(p.weight.shape, dtype=accumulate_dtype(p.x.dtype)) for _ in range(2))
        arrays |= {"first": Out(mean), "second": Out(var)}
    else:
        mean, var = given
        arrays |= {"mean": mean, "var": var}
    return Forward(y, mean, var, run_plan("forward", problem, plan, p, arrays, **options), plan)


def backward(
    p: Problem, mean: Tensor, var: Tensor, variant: str, parts: int = 1, *, shared: int = H100_SHARED,
    resident: int = -1, threads: int = 0, training: bool = True, need: tuple[bool, bool, bool] = (True, True, True),
    **options: Any,
) -> Backward:  # fmt: skip
    dx = empty_output(p.x, p) if need[0] else None
    dweight, dbias = (torch.empty_like(p.weight) if needed else None for needed in need[1:])
    problem = piece(p, p.x, dx, p.dy, training=training, dweight=need[1], bias=need[2])
    plan = rules.lay_out(problem, variant, parts, shared_limit=shared, resident=resident, threads=threads)  # type: ignore
    arrays: dict[str, Any] = {"x": p.x, "dy": p.dy, "weight": p.weight, "mean": mean, "var": var}
    for name, value in (("out", dx), ("first", dweight), ("second", dbias)):
        arrays[name] = None if value is None else Out(value)
    return Backward(dx, dweight, dbias, run_plan("backward", problem, plan, p, arrays, **options), plan)
