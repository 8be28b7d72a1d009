"""Runs the kernels of csrc/cuda in the PTX machine as the operators would launch them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import nan
from typing import Any, NamedTuple

import pytest
import torch
from cuda_source import ptx
from support.problems import Problem
from torch import Tensor

from tools.ptxvm import Out, Report, Struct, launch
from tsbn_kernels.backends.plan import DEVICES, Work
from tsbn_kernels.backends.plan import cuda as rules
from tsbn_kernels.backends.plan.slots import LOG_LANES, cut, pass_of
from tsbn_kernels.backends.plan.work import Operands, Strides
from tsbn_kernels.definition import layout
from tsbn_kernels.definition.batch_norm import accumulate_dtype
from tsbn_kernels.definition.options import NOT_TRACKED, Running

H100 = DEVICES["H100"]
KERNEL_DTYPES = {torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16"}
POINTERS = (
    "x", "dy", "residual", "out", "dresidual", "weight", "bias", "mean", "var", "first", "second", "partial", "staged",
    "mix", "batches", "rows",
)  # fmt: skip
REALS = 3  # eps, slope and momentum


def parameters(
    pointers: Sequence[Any], numbers: Sequence[int], eps: float, slope: float, momentum: float | None = None
) -> Struct:
    """What a kernel is told: ``Params`` or ``RowParams`` of csrc/cuda/params.h."""
    reals = eps, slope, nan if momentum is None else momentum
    return Struct(f"{len(pointers)}P{len(reals)}d{len(numbers)}q", *pointers, *reals, *numbers)


def told(raw: memoryview) -> tuple[list[int], list[int], list[float], list[int]]:
    """What a launch was told, of the bytes of `Launch` and `Params`: its numbers, addresses, reals, and the plan's."""
    words, first = raw.cast("B").cast("q").tolist(), 8 + len(POINTERS)
    reals = raw[8 * first : 8 * (first + REALS)].cast("B").cast("d").tolist()
    return words[:8], words[8:first], reals, words[first + REALS :]


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
    plan: rules.CudaPlan


class Backward(NamedTuple):
    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    dresidual: Tensor | None
    reports: list[Report]
    plan: rules.CudaPlan


def view_of(x: Tensor, p: Problem) -> Tensor:
    """As ``[T, N, C, S]``; an input that has no task axis of its own is expanded."""
    if x.shape == p.dy.shape:
        return layout.task_view(x, p.num_tasks, p.stacking)
    return layout.task_view(x, 1, "task_major").expand(p.num_tasks, -1, -1, -1)


def strides(x: Tensor, p: Problem) -> Strides:
    view = view_of(x, p)
    t, n, c, s = view.stride()
    assert view.data_ptr() == x.data_ptr()
    # The machine puts an array at an address that is as aligned as the array is within its storage.
    residue = x.storage_offset() % (16 // x.element_size())
    return Strides(t, n, c, s, residue)


def piece(
    p: Problem,
    epilogue: Epilogue,
    out: Tensor | None,
    dy: Tensor | None = None,
    dresidual: Tensor | None = None,
    **options: Any,
) -> Work:
    dy_, out_, residual, dresidual_ = (
        None if tensor is None else strides(tensor, p) for tensor in (dy, out, epilogue.residual, dresidual)
    )
    fan_out = p.x.shape != p.dy.shape
    family = layout.family(p.x, "task_major" if fan_out else p.stacking)
    assert family is not None
    return Work(
        *view_of(p.x, p).shape,
        p.x.element_size(),
        family,
        "forward" if dy is None else "backward",
        needs_dx=out is not None,
        parameter_size=p.weight.element_size(),
        activation=epilogue.activation,
        residual=residual is not None,
        needs_dresidual=dresidual is not None,
        fan_out=fan_out,
        strides=Operands(strides(p.x, p), dy_, out_, residual, dresidual_),
        **options,
    )


def name_of(x: Tensor) -> str:
    """Its dtype, such as "float32"."""
    return str(x.dtype).removeprefix("torch.")


def vector(v: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if v is None else (rules.DTYPE_CODES[name_of(v)], *v.stride())


def dx_of_fan_out(dx: Tensor, phases: int, buffer: bool) -> Tensor | Out:
    """Between the passes h waits in a buffer, or in dx: that is then written, read, and written again."""
    if phases & rules.SPILL:
        return dx if buffer else Out(dx)
    return dx if phases & rules.COMBINE and not buffer else Out(dx, writes=1 if buffer else 2)


def run_plan(
    plan: rules.CudaPlan,
    p: Problem,
    epilogue: Epilogue,
    arrays: dict[str, Any],
    *,
    target: int = 90,
    code: str | None = None,
    schedule: str | int = "forward",
) -> list[Report]:
    """Both launches of a split, or the one of the others."""
    reports, work = [], plan.work
    name = pass_of(work) + "_together" * (plan.teams > 0)
    kernel = f"tsbn_{name}_{KERNEL_DTYPES[p.x.dtype]}_{plan.cut.access}"
    arrays["residual"] = epilogue.residual
    for name, size in (("partial", plan.buffer_bytes), ("staged", plan.staged_bytes)):
        if size:
            arrays[name] = torch.full((size,), 255, dtype=torch.uint8)  # NaN
    for n, phases in enumerate(plan.phases):
        writes_out = phases & rules.APPLY or (phases & rules.REDUCE and not work.training)
        left = {"out": not writes_out, "first": phases == rules.REDUCE | rules.SPILL, "dresidual": n > 0}
        left["second"] = left["first"]
        a = {name: None if left.get(name) and isinstance(value, Out) else value for name, value in arrays.items()}
        if work.gathers and work.two_passes:
            a["out"] = dx_of_fan_out(arrays["out"].array, phases, bool(plan.staged_bytes))
        vectors = [vector(arrays.get(name)) for name in ("weight", "bias", "mean", "var")]
        values = rules.numbers(plan, phases, p.gate == "sigmoid", tuple(k for v in vectors for k in v))
        pointers = [0 if a.get(name) is None else a[name] for name in POINTERS]
        struct = parameters(pointers, values, p.eps, epilogue.slope, arrays.get("momentum"))
        grid = {"cluster": plan.cluster, "cooperative": plan.teams > 0}
        grid |= {"shared": plan.shared_bytes, "schedule": schedule}
        reports.append(launch(code or ptx(target), kernel, plan.programs, plan.threads, [struct], **grid))
    return reports


def empty_output(x: Tensor, p: Problem) -> Tensor:
    return torch.empty_strided(x.shape, layout.dense_strides(x, p.stacking), dtype=x.dtype)


def forward(
    p: Problem,
    variant: str,
    parts: int = 1,
    *,
    shared: int = H100.block_shared_memory,
    resident: int = -1,
    threads: int = 0,
    teams: int = 0,
    most_lanes: int = LOG_LANES,
    given: tuple[Tensor, Tensor] | None = None,
    epilogue: Epilogue = NO_EPILOGUE,
    running: Running = NOT_TRACKED,
    **options: Any,
) -> Forward:
    y = empty_output(p.dy, p)
    work = piece(p, epilogue, y, training=given is None, bias=p.bias is not None)
    limits = {"most_shared_bytes": shared, "resident": resident, "threads": threads}
    limits |= {"most_lanes": most_lanes, "teams": teams or 2 * (variant == "together")}
    if variant == "together" and cut(work).access != "columns":
        pytest.skip("the whole device shares columns alone")
    plan = rules.lay_out(work, H100, variant, parts, **limits)  # type: ignore[arg-type]
    arrays: dict[str, Any] = {"x": p.x, "out": Out(y), "weight": p.weight, "bias": p.bias}
    if given is None:
        mean, var = (torch.empty(p.weight.shape, dtype=accumulate_dtype(p.x.dtype)) for _ in range(2))
        arrays |= {"first": Out(mean), "second": Out(var), **running._asdict()}
    else:
        mean, var = given
        arrays |= {"mean": mean, "var": var}
    return Forward(y, mean, var, run_plan(plan, p, epilogue, arrays, **options), plan)


def backward(
    p: Problem,
    mean: Tensor,
    var: Tensor,
    variant: str,
    parts: int = 1,
    *,
    shared: int = H100.block_shared_memory,
    resident: int = -1,
    threads: int = 0,
    teams: int = 0,
    most_lanes: int = LOG_LANES,
    training: bool = True,
    need: tuple[bool, ...] = (True, True, True, False),
    epilogue: Epilogue = NO_EPILOGUE,
    **options: Any,
) -> Backward:
    """`need`: of dx, dweight, dbias and dresidual."""
    dx = empty_output(p.x, p) if need[0] else None
    dweight, dbias = (torch.empty_like(p.weight) if needed else None for needed in need[1:3])
    dresidual = empty_output(p.dy, p) if len(need) > 3 and need[3] else None
    reads_bias = p.bias is not None and epilogue.activation not in ("none", "inverse_leaky_relu")
    if epilogue.activation == "none":
        epilogue = NO_EPILOGUE  # dy itself is the gradient
    sums = {"needs_dweight": need[1], "needs_dbias": need[2]}
    work = piece(p, epilogue, dx, p.dy, dresidual, training=training, bias=reads_bias, **sums)
    limits = {"most_shared_bytes": shared, "resident": resident, "threads": threads}
    limits |= {"most_lanes": most_lanes, "teams": teams or 2 * (variant == "together")}
    if variant == "together" and cut(work).access != "columns":
        pytest.skip("the whole device shares columns alone")
    plan = rules.lay_out(work, H100, variant, parts, **limits)  # type: ignore[arg-type]
    arrays: dict[str, Any] = {"x": p.x, "dy": p.dy, "weight": p.weight, "mean": mean, "var": var}
    if reads_bias:
        arrays["bias"] = p.bias
    for name, value in (("out", dx), ("first", dweight), ("second", dbias), ("dresidual", dresidual)):
        arrays[name] = None if value is None else Out(value)
    reports = run_plan(plan, p, epilogue, arrays, **options)
    return Backward(dx, dweight, dbias, dresidual, reports, plan)


def counted(result: Forward | Backward) -> tuple[int, int]:
    """Bytes of global memory read and written, less those of counters by which blocks wait for others."""
    rows = [row for report in result.reports for row in report.rows if row.space == "global" and row.bytes]
    plain = [row for row in rows if not re.search("acquire|release|acq_rel|volatile", row.opcode)]
    return (
        sum(row.bytes for row in plain if row.operation == "ld"),
        sum(row.bytes for row in plain if row.operation in ("st", "atom")),
    )
