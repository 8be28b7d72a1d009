"""The operators of layer normalisation: schemas, adapters and fake kernels.

``x`` and ``residual`` are stacked, or where ``shared`` (``fan_out``) is set those of one input ``[N, *]`` for all
tasks; ``dy`` is stacked. ``weight`` and ``bias`` are ``[T, *normalized_shape]``, and tell T and how many dimensions are
normalised; statistics are ``[R]``, float64 for float64 input, else float32. Operands may have any strides, results are
contiguous. What there is not (``s`` without a residual, ``mean`` in the RMS form, a gradient that is not needed) is an
empty tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tsbn_kernels.definition.layer_norm import empty_gradients, empty_outputs
from tsbn_kernels.definition.options import (
    LayerBackend,
    LayerGradients,
    LayerNeeds,
    LayerNormalized,
    LayerOptions,
    LayerSaved,
)
from tsbn_kernels.operator.registry import Normalization, Operator, or_empty

if TYPE_CHECKING:
    from tsbn_kernels.definition import layer_norm as reference

    _backends: tuple[LayerBackend, ...] = (reference,)


class LayerOperators(NamedTuple):
    """The functions of a backend, by the names of the operators."""

    layer_norm: Callable[..., Any]
    layer_norm_backward: Callable[..., Any]
    layer_norm_double_backward: Callable[..., Any]


def _options(given: dict[str, Any]) -> LayerOptions:
    own = (given.pop(name) for name in ("eps", "gate", "stacking", "rms", "shared"))
    return LayerOptions(given["weight"].size(0), *own)


def normalized(run: Callable[..., LayerNormalized], options: LayerOptions, **tensors: Any) -> tuple[Tensor, ...]:
    """Results of a forward pass as tensors."""
    y, s, mean, rstd = run(**tensors, options=options)
    return y, or_empty(s, y), or_empty(mean, rstd), rstd


def _layer_norm_backward(
    run: Callable[..., LayerGradients], options: LayerOptions, *, dy: Tensor, ds: Tensor | None, **more: Any
) -> tuple[Tensor, ...]:
    needs = LayerNeeds(*(more.pop(f"need_{gradient}") for gradient in LayerGradients._fields))
    saved = LayerSaved(**more | ({"mean": None} if options.rms else {}))
    return tuple(map(or_empty, run(dy, ds, saved, needs, options), (saved.s, saved.weight, saved.weight)))


def _layer_norm_double_backward(
    run: Callable[..., tuple[Tensor, Tensor, Tensor]],
    options: LayerOptions,
    *,
    ddx: Tensor,
    dy: Tensor,
    factors: Tensor,
    **saved: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return run(ddx, dy, LayerSaved(**saved | ({"mean": None} if options.rms else {})), factors, options)


class Dispatched:
    """The operators by the backend that the dispatcher picks.

    Args:
        flat: the operators of ``torch.ops``.
    """

    def __init__(self, flat: LayerOperators) -> None:
        self.flat = flat

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, options: LayerOptions
    ) -> LayerNormalized:
        y, s, mean, rstd = self.flat.layer_norm(x, weight, bias, residual, *options[1:])
        return LayerNormalized(y, None if residual is None else s, None if options.rms else mean, rstd)

    def layer_norm_backward(
        self, dy: Tensor, ds: Tensor | None, saved: LayerSaved, needs: LayerNeeds, options: LayerOptions
    ) -> LayerGradients:
        s, weight, mean, rstd = saved
        _, _, *how = options
        mean = rstd.new_empty(0) if mean is None else mean
        dx, dweight, dbias = self.flat.layer_norm_backward(dy, ds, s, weight, mean, rstd, *how, *needs)
        need_dx, need_dweight, need_dbias = needs
        return LayerGradients(dx if need_dx else None, dweight if need_dweight else None, dbias if need_dbias else None)

    def layer_norm_double_backward(
        self, ddx: Tensor, dy: Tensor, saved: LayerSaved, factors: Tensor, options: LayerOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        s, weight, mean, rstd = saved
        mean = rstd.new_empty(0) if mean is None else mean
        found: tuple[Tensor, Tensor, Tensor] = self.flat.layer_norm_double_backward(
            ddx, dy, s, weight, mean, rstd, factors, options.stacking, options.rms, options.fan_out
        )
        return found


class _Fake:
    """A backend that allocates its results."""

    @staticmethod
    def layer_norm(
        x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, options: LayerOptions
    ) -> LayerNormalized:
        return empty_outputs(x, weight, residual, options)

    @staticmethod
    def layer_norm_backward(
        dy: Tensor, ds: Tensor | None, saved: LayerSaved, needs: LayerNeeds, options: LayerOptions
    ) -> LayerGradients:
        return empty_gradients(saved.s, saved.weight, needs)

    @staticmethod
    def layer_norm_double_backward(
        ddx: Tensor, dy: Tensor, saved: LayerSaved, factors: Tensor, options: LayerOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums = factors.new_empty((2, *saved.weight.shape), dtype=torch.float64)
        return dy.new_empty(dy.shape), dy.new_empty(dy.shape), sums


layer_norm: Normalization[LayerBackend] = Normalization(
    LayerOperators,
    {
        "layer_norm": Operator(
            "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps, str gate, str stacking,"
            " bool rms=False, bool shared=False) -> (Tensor y, Tensor s, Tensor mean, Tensor rstd)",
            normalized,
        ),
        "layer_norm_backward": Operator(
            "(Tensor dy, Tensor? ds, Tensor s, Tensor weight, Tensor mean, Tensor rstd, str gate, str stacking,"
            " bool rms=False, bool shared=False, bool need_dx=True, bool need_dweight=True, bool need_dbias=False)"
            " -> (Tensor dx, Tensor dweight, Tensor dbias)",
            _layer_norm_backward,
        ),
        # Of the second derivative: see tsbn_kernels/operator/layer_double_backward.py.
        "layer_norm_double_backward": Operator(
            "(Tensor ddx, Tensor dy, Tensor s, Tensor weight, Tensor mean, Tensor rstd, Tensor factors, str stacking,"
            " bool rms=False, bool shared=False) -> (Tensor ddy, Tensor ds, Tensor sums)",
            _layer_norm_double_backward,
        ),
    },
    _options,
    {"eps": 0.0, "gate": "identity"},  # of what reads rstd, and factors
    Dispatched,
    _Fake(),
)
flat, operators, eager_operators = layer_norm.flat, layer_norm.operators, layer_norm.eager
