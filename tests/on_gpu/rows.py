"""Calls of layer normalisation that the check of a GPU makes: rows of every length, in each form and dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle, product
from typing import Any

from support.layer_problems import LayerProblem
from support.problems import DTYPES, GATES, STACKINGS
from torch import Tensor

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


def moved(p: LayerProblem, change: Callable[[Tensor], Tensor]) -> LayerProblem:
    """The call with each of its tensors changed."""
    tensors: Any = {name: change(value) for name, value in p._asdict().items() if isinstance(value, Tensor)}
    return p._replace(**tensors)


def calls() -> Iterator[tuple[str, dict[str, Any]]]:
    """A name, and the arguments of :func:`support.layer_problems.layer_problem`."""
    rounds = zip(cycle(DTYPES), cycle(STACKINGS), cycle(GATES), strict=False)
    for (size, form), (dtype, stacking, gate) in zip(product(SIZES, FORMS), rounds, strict=False):
        what = "+".join(name for name, has in form.items() if has) or "bare"
        name = f"{size['shape'][0]} {what} {str(dtype)[6:]} {stacking}"
        yield name, {**size, **form, "dtype": dtype, "stacking": stacking, "gate": gate}
