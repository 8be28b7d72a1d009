"""Layer normalisation, on every device and backend, against the definition in float64."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, product
from typing import Any

import pytest
import torch
from support.layer_problems import LayerProblem, LayerResults, assert_matches_definition, layer_problem, run
from support.problems import DTYPES, GATES, STACKINGS
from support.tolerances import assert_same_bits
from torch import Tensor

from tsbn_kernels.backends.plan.layer_norm import MOST
from tsbn_kernels.operator import layer_ops

# Rows of one value, of no alignment, of transformers, and the longest with one launch and with two.
SIZES: list[dict[str, Any]] = [
    {"N": 33, "tokens": (5,), "shape": (1,)},
    {"N": 9, "tokens": (7,), "shape": (67,)},
    {"N": 3, "tokens": (197,), "shape": (384,)},
    {"N": 3, "tokens": (128,), "shape": (768,)},
    {"N": 2, "tokens": (30,), "shape": (8192,)},
    {"N": 2, "tokens": (30,), "shape": (16384,)},
    {"N": 1, "tokens": (3,), "shape": (20000,)},
]
FORMS: list[dict[str, bool]] = [
    {"bias": True, "residual": True},
    {"bias": False},
    {"rms": True, "residual": True},
    {"bias": True, "fan_out": True},
    {"rms": True, "residual": True, "fan_out": True},
]


def on_device(p: LayerProblem, by: str, device: str) -> LayerResults:
    """What a backend computes, on the CPU."""
    there = LayerProblem(*(value.to(device) if isinstance(value, Tensor) else value for value in p))
    return LayerResults(*(found.cpu() for found in run(there, layer_ops.flat(layer_ops.operators(by)))))


def cases() -> Iterator[Any]:
    rounds = zip(cycle(DTYPES), cycle(STACKINGS), cycle(GATES), strict=False)
    for (size, form), (dtype, stacking, gate) in zip(product(SIZES, FORMS), rounds, strict=False):
        options = {"dtype": dtype, "stacking": stacking, "gate": gate}
        what = "+".join(name for name, has in form.items() if has) or "bare"
        name = f"{size['shape'][0]} {what} {str(dtype)[6:]} {stacking}"
        yield pytest.param({**size, **form, **options}, id=name)


@pytest.mark.parametrize("options", list(cases()))
def test_rows(device: str, by: str, options: dict[str, Any]) -> None:
    p = layer_problem(**options)
    if by in ("triton", "cuda") and p.weight[0].numel() > (MOST // 2 if p.x.dtype == torch.float64 else MOST):
        with pytest.raises(ValueError, match="longer than"):  # left to the reference where no backend is chosen
            on_device(p, by, device)
        return
    found = on_device(p, by, device)
    assert_matches_definition(p, found)
    for again, first in zip(on_device(p, by, device), found, strict=True):
        assert_same_bits(again, first)


@pytest.mark.parametrize("name", ["y", "rstd", "dx", "dweight", "dbias"])
def test_what_is_wrong_is_found(name: str) -> None:
    p = layer_problem(dtype=torch.float32)
    found = run(p)
    wrong = getattr(found, name) * (1 + 4e-5) + 4e-5
    with pytest.raises(AssertionError, match=r"out of bounds|relative error"):
        assert_matches_definition(p, found._replace(**{name: wrong}))
