"""What the tests share: inputs in every layout, tolerances, comparison with the definition, fresh interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tsbn_kernels import layout, memory, ops, reference
from tsbn_kernels.backends import cpu, triton

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)
STACKINGS = layout.STACKINGS
FORMATS = ("contiguous", "channels_last")
GATES = ("sigmoid", "identity")
BACKENDS = ("native", "triton") if triton.available else ("native",)
defined = ops.flat(reference)  # the definition, as functions of flat arguments
ROOT = Path(__file__).parent.parent


# ---- tolerances --------------------------------------------------------------------------------------------------


class Tolerance(NamedTuple):
    """``|actual - expected| <= absolute * scale + units * (one unit in the last place of expected)``."""

    absolute: float
    units: float


# Against the definition in float64 on the same rounded input, for results of a size near 1 (`scale` says otherwise).
FORWARD = {
    torch.float64: Tolerance(1e-13, 2),  # sums of a few thousand terms
    torch.float32: Tolerance(5e-6, 0),  # the promise of the package for |mean| / std up to 1
    # Computed in float32 and rounded once: half a unit, and one where the float32 value lies near a midpoint. The
    # absolute part is float32's error where gate * xhat and bias cancel.
    torch.float16: Tolerance(5e-7, 1),
    torch.bfloat16: Tolerance(5e-7, 1),
}
BACKWARD = {
    torch.float64: Tolerance(1e-12, 4),
    torch.float32: Tolerance(1e-5, 0),  # dy - mean(dy) - xhat * mean(dy * xhat) cancels a little
    torch.float16: Tolerance(5e-6, 1),
    torch.bfloat16: Tolerance(5e-6, 1),
}
STATISTICS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}  # relative


def unit_in_last_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance, in float64, between neighbours of ``dtype`` around ``values``."""
    info = torch.finfo(dtype)
    values = values.double().abs().clamp_min(info.smallest_normal)
    return torch.ldexp(torch.full_like(values, info.eps), torch.frexp(values).exponent - 1)


def assert_within(actual: Tensor, expected: Tensor, tolerance: Tolerance, scale: float | Tensor = 1.0) -> None:
    """Elementwise comparison in float64; NaN and infinity never pass."""
    assert actual.shape == expected.shape
    wanted = expected.detach().double()
    bound = tolerance.absolute * scale + tolerance.units * unit_in_last_place(wanted, actual.dtype)
    error = (actual.detach().double() - wanted).abs()
    bad = ~(error <= bound)
    if bad.any():
        worst = int(torch.where(error.isnan(), torch.inf, error / bound).argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} values are out of bounds; worst at {index}: "
            f"got {actual[index].item()!r}, expected {wanted[index].item()!r}, error {error[index].item():.3g}"
        )


def assert_relative(actual: Tensor, expected: Tensor, bound: float) -> None:
    """``|actual - expected| <= bound * |expected|``, elementwise, in float64."""
    assert actual.shape == expected.shape
    wanted = expected.double()
    error = (actual.double() - wanted).abs()
    assert (error <= bound * wanted.abs()).all(), f"relative error {(error / wanted.abs()).max().item():.3g} > {bound}"


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[actual.element_size()]
    assert torch.equal(actual.contiguous().view(kind), expected.contiguous().view(kind))


# ---- inputs ------------------------------------------------------------------------------------------------------


def in_memory_format(x: Tensor, stacking: str, memory_format: str) -> Tensor:
    """A dense copy of ``x``; channels_last for any number of dimensions."""
    if memory_format == "contiguous":
        return x.contiguous(memory_format=torch.contiguous_format)
    axis = layout.channel_axis(stacking)
    return x.movedim(axis, -1).clone(memory_format=torch.contiguous_format).movedim(-1, axis)


def stack(streams: Tensor, stacking: str, memory_format: str = "contiguous") -> Tensor:
    """Puts streams ``[T, N, C, *]`` into a stacking and a memory format."""
    if stacking == "sample_major":
        streams = streams.transpose(0, 1)
    stacked = streams if stacking == "task_axis" else streams.reshape(-1, *streams.shape[2:])
    return in_memory_format(stacked, stacking, memory_format)


def unstack(x: Tensor, num_tasks: int, stacking: str) -> Tensor:
    """The streams ``[T, N, C, *]`` of a stacked tensor."""
    if stacking == "task_axis":
        return x
    if stacking == "task_major":
        return x.unflatten(0, (num_tasks, -1))
    return x.unflatten(0, (-1, num_tasks)).transpose(0, 1)


class Problem(NamedTuple):
    """One call of the operators, with a random upstream gradient (never a constant: it would make dx zero)."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor | None
    num_tasks: int
    gate: str
    stacking: str
    eps: float = 1e-5

    @property
    def options(self) -> tuple[int, float, str, str]:
        return self.num_tasks, self.eps, self.gate, self.stacking


def problem(
    T: int = 3,
    N: int = 4,
    C: int = 5,
    spatial: tuple[int, ...] = (6, 7),
    *,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    stacking: str = "task_major",
    memory_format: str = "contiguous",
    gate: str = "sigmoid",
    bias: bool = True,
    mean: float = 0.5,
    std: float = 1.0,
    seed: int = 0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).double()

    x = (normal(T, N, C, *spatial) * std + mean * torch.linspace(-1, 1, T * C).view(T, 1, C, *(1 for _ in spatial))).to(
        dtype
    )
    dy = normal(T, N, C, *spatial).to(dtype)
    parameters = parameter_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    weight, offset = normal(T, C).to(parameters), normal(T, C).to(parameters)
    return Problem(
        stack(x, stacking, memory_format),
        stack(dy, stacking, memory_format),
        weight,
        offset if bias else None,
        T,
        gate,
        stacking,
    )


def in_double(p: Problem) -> Problem:
    """The same numbers, as rounded, in float64: what the definition is computed on."""
    bias = None if p.bias is None else p.bias.double()
    return p._replace(x=p.x.double(), dy=p.dy.double(), weight=p.weight.double(), bias=bias)


# ---- results -----------------------------------------------------------------------------------------------------


class Results(NamedTuple):
    y: Tensor
    mean: Tensor
    var: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor


def run(p: Problem) -> Results:
    """Training forward and backward through the operators that the dispatcher picks."""
    y, mean, var = torch.ops.tsbn.forward_training(p.x, p.weight, p.bias, *p.options)
    return Results(
        y, mean, var, *torch.ops.tsbn.backward(p.dy, p.x, p.weight, mean, var, *p.options, True, True, True, True)[:3]
    )


def definition(p: Problem) -> Results:
    """The same from the reference in float64."""
    p = in_double(p)
    y, mean, var = defined.forward_training(p.x, p.weight, p.bias, *p.options)
    return Results(
        y, mean, var, *defined.backward(p.dy, p.x, p.weight, mean, var, *p.options, True, True, True, True)[:3]
    )


def assert_matches_definition(p: Problem, actual: Results) -> None:
    expected = definition(p)
    assert_within(actual.y, expected.y, FORWARD[p.x.dtype], scale=max(1.0, float(expected.y.abs().max()) / 4))
    rstd = torch.rsqrt(expected.var + p.eps)
    deviation = torch.maximum(expected.mean.abs(), 1 / rstd)
    assert_within(actual.mean, expected.mean, Tolerance(STATISTICS[p.x.dtype], 1), scale=deviation)
    assert_relative(actual.var, expected.var, STATISTICS[p.x.dtype])
    tolerance = BACKWARD[p.x.dtype]
    assert_within(actual.dx, expected.dx, tolerance, scale=max(1.0, float(expected.dx.abs().max()) / 4))
    positions = p.x.numel() // p.weight.numel()
    for got, wanted in ((actual.dweight, expected.dweight), (actual.dbias, expected.dbias)):
        exact_enough = Tolerance(STATISTICS[p.x.dtype], 1)  # sums of `positions` random terms
        assert_within(got, wanted, exact_enough, scale=max(1.0, positions**0.5) * 4)


@contextmanager
def on_backend(name: str) -> Iterator[None]:
    """Runs the operators on Triton's kernels where ``name`` is "triton": on CPU tensors, interpreted, slowly.

    The plans are those of a device on which a slab of more than 2048 values is read in tiles of 256.
    """
    if name != "triton":
        yield
        return
    import interpreter

    with interpreter.dispatched(interpreter.device(threads=64)):
        yield


# ---- memory ------------------------------------------------------------------------------------------------------


def fill_cache_with_nan(like: Tensor, blocks: int = 3) -> None:
    """Leaves pooled blocks full of NaN behind, so that a value that a kernel does not write is seen."""
    zeros = torch.zeros(like.shape[0], like.shape[1])
    outputs = [
        torch.ops.tsbn.forward_eval(like, zeros[:1], None, zeros[:1], zeros[:1] + 1, 1, 1e-5, "sigmoid", "task_major")
        for _ in range(blocks)
    ]
    for output in outputs:
        output.fill_(float("nan"))
    del outputs
    assert (
        not cpu.available or like.nbytes < 1 << 20 or memory.cache_limit() == 0 or memory.cached_bytes() >= like.nbytes
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def cache_limit(num_bytes: int) -> Iterator[None]:
    before = memory.cache_limit()
    memory.set_cache_limit(num_bytes)
    try:
        yield
    finally:
        memory.set_cache_limit(before)


def instruction_sets() -> list[str]:
    """Those that this processor runs."""
    if not cpu.available:
        return []
    return [name for name in ("avx512_bf16", "avx512", "avx2", "portable") if _runs(name)]


def _runs(name: str) -> bool:
    try:
        cpu.set_instruction_set(name)
    except ValueError:
        return False
    finally:
        cpu.set_instruction_set("")
    return True


def python(program: str, *, path: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in a fresh interpreter that finds the package in ``path``."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("TSBN_")}
    variables.update(environment, PYTHONPATH=os.pathsep.join((str(path), str(ROOT / "tests"))))
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=path, env=variables, capture_output=True, text=True, timeout=240, check=False)


def python_output(program: str, *, path: Path = ROOT, **environment: str) -> str:
    """What a program prints; fails with its errors where it fails."""
    done = python(program, path=path, **environment)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    return done.stdout
