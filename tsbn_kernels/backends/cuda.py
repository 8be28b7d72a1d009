"""The CUDA C++ backend: kernels of csrc/cuda, chosen by :mod:`tsbn_kernels.plan.cuda`. No driver is touched on import.

The fallback where Triton is missing or broken, and the backend that keeps slabs in the shared memory of clusters.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tsbn_kernels import layout
from tsbn_kernels.plan import cuda as rules
from tsbn_kernels.plan import devices
from tsbn_kernels.reference import accumulate_dtype

DISPATCH_KEY = "CUDA"
_LIBRARY = Path(__file__).parent.parent / "_cuda.so"

available = False
_problem = ""


def load() -> None:
    """Loads the kernels; what is missing is remembered, not raised."""
    global available, _problem
    if not _LIBRARY.exists():
        _problem = "the CUDA library was not built (no nvcc or no CUDA PyTorch when the package was installed)"
    elif torch.version.cuda is None:
        _problem = "this PyTorch has no CUDA"
    else:
        try:
            torch.ops.load_library(str(_LIBRARY))
            available = True
        except (OSError, RuntimeError) as error:
            _problem = f"the CUDA library does not load: {error}"


def detail() -> str:
    """One line: what it is, or what is missing."""
    if not available:
        return _problem
    return "CUDA C++" if torch.cuda.is_available() else "CUDA C++, no GPU here"


# ---- launches ----------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a tensor's elements lie: all that plans depend on."""

    strides: tuple[int, ...]
    residue: int


class _Prepared(NamedTuple):
    """Launches, each as the kernel's choice and its numbers, and the bytes of the partial buffer between them."""

    launches: tuple[tuple[list[int], list[int]], ...]
    partial_bytes: int


def _place(x: Tensor) -> _Place:
    return _Place(x.stride(), x.data_ptr() % 16 // x.element_size())


@lru_cache(maxsize=64)
def _device(device: torch.device) -> devices.Device:
    return devices.of(device)


def _strides(place: _Place | None, shape: tuple[int, ...], num_tasks: int, stacking: str) -> rules.Strides | None:
    if place is None:
        return None
    view = layout.task_view(torch.empty_strided(shape, place.strides, device="meta"), num_tasks, stacking)
    t, n, c, s = view.stride()
    return rules.Strides(t, n, c, s, place.residue)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@lru_cache(maxsize=4096)
def _prepare(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    x: _Place,
    dy: _Place | None,
    out: _Place | None,
    vectors: tuple[tuple[torch.dtype, tuple[int, ...]] | None, ...],
    device: torch.device,
    num_tasks: int,
    stacking: str,
    gate: str,
    training: bool,
    dweight: bool,
    bias: bool,
) -> _Prepared:
    if gate not in ("sigmoid", "identity"):
        raise ValueError(f"unknown gate {gate!r}")
    like = torch.empty_strided(shape, x.strides, device="meta")
    family = layout.family(like, stacking)
    if family is None:
        raise ValueError("neither the positions nor the channels of x are contiguous; pass x.contiguous()")
    where = [_strides(place, shape, num_tasks, stacking) for place in (x, out, dy)]
    assert where[0] is not None
    assert vectors[0] is not None
    T, N, C, S = layout.task_view(like, num_tasks, stacking).shape
    problem = rules.Problem(
        _name(dtype), T, N, C, S, where[0], where[1], where[2],
        rows=family == "rows", training=training, dweight=dweight, bias=bias, parameter_dtype=_name(vectors[0][0]),
    )  # fmt: skip
    launch = _choose(problem, device)
    numbers = [
        number for v in vectors for number in ((0, 0, 0) if v is None else (rules.DTYPE_CODES[_name(v[0])], *v[1]))
    ]
    launches = tuple(
        (_kernel(problem, launch), list(rules.numbers(problem, launch, phases, gate == "sigmoid", tuple(numbers))))
        for phases in launch.phases
    )
    return _Prepared(launches, launch.partial_bytes)


def _kernel(problem: rules.Problem, launch: rules.Launch) -> list[int]:
    access = ("rows", "columns", "scalar").index(launch.kernel)
    code = rules.DTYPE_CODES[problem.dtype]
    return [code, access, int(problem.backward), launch.blocks, launch.threads, launch.cluster, launch.shared]


def _choose(problem: rules.Problem, device: torch.device) -> rules.Launch:
    """The plan's choice, with smaller clusters where this GPU does not run them (partitioned GPUs may not)."""
    for most in (*reversed(rules.CLUSTERS), 1):
        launch = rules.choose(problem, _device(device), most)
        if launch.cluster == 1 or torch.ops.tsbn._cuda_cluster_fits(_kernel(problem, launch), device.index or 0):
            return launch
    raise AssertionError("a launch without clusters always fits")


def _vector(v: Tensor | None) -> tuple[torch.dtype, tuple[int, ...]] | None:
    return None if v is None else (v.dtype, v.stride())


def _run(
    x: Tensor,
    dy: Tensor | None,
    out: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    statistics: tuple[Tensor | None, Tensor | None],
    results: tuple[Tensor | None, Tensor | None],
    options: tuple[int, float, str, str],
    training: bool,
    needs: tuple[bool, bool],
) -> None:
    num_tasks, eps, gate, stacking = options
    places = (_place(x), None if dy is None else _place(dy), None if out is None else _place(out))
    vectors = tuple(_vector(v) for v in (weight, bias, *statistics))
    prepared = _prepare(x.shape, x.dtype, *places, vectors, x.device, num_tasks, stacking, gate, training, *needs)
    partial = x.new_empty(prepared.partial_bytes, dtype=torch.uint8) if prepared.partial_bytes else None
    for kernel, numbers in prepared.launches:
        torch.ops.tsbn._cuda_launch(kernel, numbers, eps, x, dy, out, weight, bias, *statistics, *results, partial)


def _only_plain(epilogue: tuple[object, ...]) -> None:
    if any(argument not in (None, "none", 0.0, False) for argument in epilogue if not isinstance(argument, Tensor)):
        raise NotImplementedError("the epilogue has no CUDA kernels yet")


# ---- the operators -----------------------------------------------------------------------------------------------


def forward_training(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_tasks: int,
    eps: float,
    gate: str,
    stacking: str,
    *epilogue: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`tsbn_kernels.reference.forward_training`."""
    _only_plain(epilogue)
    y = layout.empty_like(x, stacking)
    mean, var = (weight.new_empty(weight.shape, dtype=accumulate_dtype(x.dtype)) for _ in range(2))
    if x.numel() == 0:
        return y, mean.zero_(), var.zero_()
    options = (num_tasks, eps, gate, stacking)
    _run(x, None, y, weight, bias, (None, None), (mean, var), options, True, (True, bias is not None))
    return y, mean, var


def forward_eval(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    num_tasks: int,
    eps: float,
    gate: str,
    stacking: str,
    *epilogue: object,
) -> Tensor:
    """See :func:`tsbn_kernels.reference.forward_eval`."""
    _only_plain(epilogue)
    y = layout.empty_like(x, stacking)
    if x.numel() > 0:
        options = (num_tasks, eps, gate, stacking)
        _run(x, None, y, weight, bias, (mean, var), (None, None), options, False, (True, bias is not None))
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    num_tasks: int,
    eps: float,
    gate: str,
    stacking: str,
    training: bool,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    *epilogue: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`tsbn_kernels.reference.backward`."""
    _only_plain(epilogue)
    dx = layout.empty_like(x, stacking) if need_dx else None
    dweight, dbias = (
        weight.new_empty(weight.shape) if needed else None for needed in (need_dweight, need_dbias)
    )  # contiguous: new_empty does not keep strides
    if x.numel() == 0:
        for vector in (dweight, dbias):
            if vector is not None:
                vector.zero_()
    elif need_dx or need_dweight or need_dbias:
        options = (num_tasks, eps, gate, stacking)
        _run(x, dy, dx, weight, None, (mean, var), (dweight, dbias), options, training, (need_dweight, need_dbias))
    nothing = weight.new_empty(0)
    return (
        x.new_empty(0) if dx is None else dx,
        nothing if dweight is None else dweight,
        nothing if dbias is None else dbias,
        x.new_empty(0),
    )
