"""Combinations of the operators' options, in odd sizes and places, against the definition in float64."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from support.epilogues import Call, make_call
from support.tolerances import BACKWARD, STATISTICS, Tolerance, assert_relative, assert_within
from torch import Tensor

from on_gpu.calls import PLACES, check, on_device
from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.definition import layout
from tsbn_kernels.definition.activations import ACTIVATIONS, NONE
from tsbn_kernels.operator import ops

SIZES: dict[str, tuple[Any, ...]] = {  # T, N, C, spatial
    "3 tasks 4x5x6x7": (3, 4, 5, (6, 7)),
    "2 tasks 3x33x20x21": (2, 3, 33, (20, 21)),
    "4 tasks 2x64x8x8": (4, 2, 64, (8, 8)),
    "1 task 5x7x1x1": (1, 5, 7, (1, 1)),
    "5 tasks 9x130": (5, 9, 130, ()),
    "2 tasks 40x3x31x33": (2, 40, 3, (31, 33)),
    "1 task 2x2x160x170": (1, 2, 2, (160, 170)),
    "2 tasks 2x6x3x5x4": (2, 2, 6, (3, 5, 4)),
}
FACTORS: dict[str, Sequence[Any]] = {
    "dtype": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "size": tuple(SIZES),
    "stacking": layout.STACKINGS,
    "memory_format": ("contiguous", "channels_last"),
    "activation": (NONE, *ACTIVATIONS),
    "residual": (False, True),
    "shared": (False, True),
    "training": (True, False),
    "gate": ("sigmoid", "identity"),
    "bias": (True, False),
    "wide_parameters": (True, False),
    "place": PLACES,
}
WORDS = {
    "residual": ("", "residual"),
    "shared": ("", "fan-out"),
    "training": ("evaluation", "training"),
    "bias": ("no bias", "bias"),
    "wide_parameters": ("parameters as x", ""),
}
MOST = 400

Options = Mapping[str, Any]


def name_of(options: Options) -> str:
    """Such as ``bfloat16, 3 tasks 4x5x6x7, task_major, contiguous, relu, residual, training, ...``."""
    words = (str(WORDS[key][value] if key in WORDS else value) for key, value in options.items())
    return ", ".join(word.removeprefix("torch.") for word in words if word)


def compare(options: Options, backend: str, device: str) -> None:
    """Runs one combination.

    Raises:
        AssertionError: a result is wrong.
    """
    rest = dict(options)
    size, place, wide = SIZES[rest.pop("size")], rest.pop("place"), rest.pop("wide_parameters")
    call = make_call(*size, parameter_dtype=None if wide else options["dtype"], **rest)
    check(call, backend, device, place)


def apart(dtype: torch.dtype, memory_format: str, backend: str, device: str) -> None:
    """Runs the halves of a pass that a batch spread over processes takes: moments, and the gradient by given sums.

    Raises:
        AssertionError: a result is wrong.
    """
    options: dict[str, Any] = {"dtype": dtype, "memory_format": memory_format, "residual": True, "training": False}
    call = make_call(3, 4, 33, (6, 7), activation="silu", **options)
    there, by = on_device(call, device), ops.flat(ops.operators(backend))

    mean, var = (vector.cpu() for vector in by.moments(there.p.x, call.p.num_tasks, call.p.stacking))
    defined = ops.flat(reference)
    exact_mean, exact_var = defined.moments(call.p.x, call.p.num_tasks, call.p.stacking)
    size = torch.maximum(exact_mean.abs(), exact_var.sqrt())
    assert_within(mean, exact_mean, Tolerance(STATISTICS[dtype], 1), size)
    assert_relative(var, exact_var, STATISTICS[dtype])

    sums = torch.linspace(-0.1, 0.2, call.p.weight.numel(), dtype=call.p.weight.dtype).view_as(call.p.weight)
    wanted = _input_gradient(call.in_double(), (sums.double(), sums.double().flip(0)), defined)
    got = _input_gradient(there, (sums.to(device), sums.flip(0).to(device)), by)
    # A backend may compute the gradient in two passes, and round what is between them to the dtype.
    bound = Tolerance(max(BACKWARD[dtype].absolute, torch.finfo(dtype).eps), 1)
    for one, exact in zip(got, wanted, strict=True):
        assert_within(one.cpu(), exact, bound, max(1.0, float(exact.abs().max())))


def _input_gradient(call: Call, sums: tuple[Tensor, Tensor], by: Any) -> tuple[Tensor, Tensor]:
    p, given = call.p, call.given
    assert given is not None
    dx, dresidual = by.input_gradient(p.dy, p.x, p.weight, *given, *sums, *p.options, p.bias, *call.epilogue, True)
    return dx, dresidual


# ---- covering arrays ---------------------------------------------------------------------------------------------


def combinations(factors: Mapping[str, Sequence[Any]], count: int) -> list[dict[str, Any]]:
    """``count`` distinct combinations, the first of which hold every pair of values of two factors; always the same."""
    rng = random.Random(0)
    names = list(factors)
    open_pairs = set(_all_pairs(factors))
    chosen: dict[tuple[int, ...], None] = {}
    while open_pairs:
        first, a, second, b = min(open_pairs)
        tries = []
        for _ in range(40):
            row = [rng.randrange(len(factors[name])) for name in names]
            row[first], row[second] = a, b
            tries.append(tuple(row))
        best = max(tries, key=lambda row: len(open_pairs & _pairs(row)))
        open_pairs -= _pairs(best)
        chosen[best] = None
    while len(chosen) < count:
        chosen[tuple(rng.randrange(len(factors[name])) for name in names)] = None
    return [{name: factors[name][index] for name, index in zip(names, row, strict=True)} for row in chosen]


def covering_length(factors: Mapping[str, Sequence[Any]], rows: Sequence[Options]) -> int:
    """How many of the first rows hold every pair."""
    open_pairs = set(_all_pairs(factors))
    for count, row in enumerate(rows, 1):
        open_pairs -= _pairs(tuple(factors[name].index(row[name]) for name in factors))
        if not open_pairs:
            return count
    raise ValueError(f"{len(rows)} rows leave {len(open_pairs)} pairs open")


def _all_pairs(factors: Mapping[str, Sequence[Any]]) -> list[tuple[int, int, int, int]]:
    sizes = [len(values) for values in factors.values()]
    return [
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(sizes)), 2)
        for a, b in itertools.product(range(sizes[i]), range(sizes[j]))
    ]


def _pairs(row: Sequence[int]) -> set[tuple[int, int, int, int]]:
    return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}
