"""Calls of the operators of layer normalisation of mixed batches, and what their results are held to."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from support.layer_problems import LayerProblem, LayerResults, assert_matches_definition
from support.mixed import T
from tsbn_kernels.definition.options import LayerNeeds, LayerOptions, LayerSaved

# Of a sample and of a row: one row or several, as tiles, by pairs, by fours; a row in a vector or in many.
SHAPES = [((), (5,)), ((), (37,)), ((3,), (4, 5)), ((9,), (3,)), ((20,), (8,)), ((2, 5), (66,))]
_OF_SAMPLES = "x", "residual", "dy", "ds"


class Call(NamedTuple):
    """One call of the operators, with random upstream gradients of y and s."""

    index: Tensor
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    dy: Tensor
    ds: Tensor | None
    options: LayerOptions

    def run(self, compute: Any) -> LayerResults:
        y, s, mean, rstd = compute.mixed_layer_norm(
            self.x, self.index, self.weight, self.bias, self.residual, self.options
        )
        saved = LayerSaved(self.x if s is None else s, self.weight, mean, rstd)
        needs = LayerNeeds(True, True, True)
        gradients = compute.mixed_layer_norm_backward(self.dy, self.ds, saved, self.index, needs, self.options)
        return LayerResults(y, s, mean, rstd, *gradients)

    def permuted(self, order: Tensor) -> Call:
        """The same with its samples in another order."""
        return self._replace(
            **{name: None if (t := getattr(self, name)) is None else t[order] for name in ("index", *_OF_SAMPLES)}
        )

    def in_double(self) -> Call:
        """The same numbers, as rounded, in float64; with ``x + residual`` as that of the dtype of x."""
        given = self._asdict()
        wide = {name: given[name].double() for name in ("weight", "bias", *_OF_SAMPLES) if given[name] is not None}
        if self.residual is not None:
            wide["x"] = (wide["x"] + wide["residual"]).to(self.x.dtype).double()
            wide["residual"] = torch.zeros_like(wide["x"])
        return self._replace(**wide)


def call_of(
    index: Tensor, tokens: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, rms: bool, gate: str = "sigmoid"
) -> Call:
    torch.manual_seed(len(index) + len(shape))
    x, residual, dy, ds = (torch.randn(len(index), *tokens, *shape).to(dtype) for _ in range(4))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = torch.randn(T, *shape, dtype=wide), None if rms else torch.randn(T, *shape, dtype=wide)
    more = (None, None) if rms else (residual, ds)
    return Call(index, x, weight, bias, more[0], dy, more[1], LayerOptions(T, 1e-5, gate, "task_major", rms))


def check(call: Call, found: LayerResults, expected: LayerResults) -> None:
    """Compares results within the tolerances of equal tasks."""
    how = call.options
    assert_matches_definition(LayerProblem(*call[1:7], how.gate, "task_major", rms=how.rms), found, expected)
