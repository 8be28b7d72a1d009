"""The operators of layer normalisation of mixed batches: schemas, adapters and fake kernels.

``x``, ``residual`` and ``dy`` are ``[N, *, *normalized_shape]``, ``task_of_sample`` is int64 ``[N]``. All else is as in
:mod:`tsbn_kernels.operator.layer_ops`. The CPU and Triton have kernels that look up the vectors of a sample's task;
elsewhere, and where a row is too long for Triton's, the vectors are gathered for the kernels of equal tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from tsbn_kernels.backends.plan.mixed_layer_norm import fits
from tsbn_kernels.definition.layer_norm import empty_gradients, empty_outputs
from tsbn_kernels.definition.mixed_layer_norm import Gathered
from tsbn_kernels.definition.options import (
    LayerGradients,
    LayerNeeds,
    LayerNormalized,
    LayerOptions,
    LayerSaved,
    MixedLayerBackend,
)
from tsbn_kernels.operator import direct, layer_ops
from tsbn_kernels.operator.mixed_parts import exact_task_sums
from tsbn_kernels.operator.registry import MixedNormalization, Operator, or_empty

if TYPE_CHECKING:
    from tsbn_kernels.definition import mixed_layer_norm as reference

    _backends: tuple[MixedLayerBackend, ...] = (reference,)


class MixedLayerOperators(NamedTuple):
    """The functions of a backend, by the names of the operators."""

    mixed_layer_norm: Callable[..., Any]
    mixed_layer_norm_backward: Callable[..., Any]


def _options(given: dict[str, Any]) -> LayerOptions:
    eps, gate, rms = (given.pop(name) for name in ("eps", "gate", "rms"))
    return LayerOptions(given["weight"].size(0), eps, gate, "task_major", rms)


def _backward(
    run: Callable[..., LayerGradients],
    options: LayerOptions,
    *,
    dy: Tensor,
    ds: Tensor | None,
    task_of_sample: Tensor,
    **more: Any,
) -> tuple[Tensor, ...]:
    needs = LayerNeeds(*(more.pop(f"need_{gradient}") for gradient in LayerGradients._fields))
    saved = LayerSaved(**more | ({"mean": None} if options.rms else {}))
    found = run(dy, ds, saved, task_of_sample, needs, options)
    return tuple(map(or_empty, found, (saved.s, saved.weight, saved.weight)))


class Dispatched:
    """The operators by the backend that the dispatcher picks.

    Args:
        flat: the operators of ``torch.ops``.
    """

    def __init__(self, flat: MixedLayerOperators) -> None:
        self.flat = flat

    def mixed_layer_norm(
        self,
        x: Tensor,
        task_of_sample: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        options: LayerOptions,
    ) -> LayerNormalized:
        _, eps, gate, _, rms, _ = options
        y, s, mean, rstd = self.flat.mixed_layer_norm(x, task_of_sample, weight, bias, residual, eps, gate, rms)
        return LayerNormalized(y, None if residual is None else s, None if rms else mean, rstd)

    def mixed_layer_norm_backward(
        self,
        dy: Tensor,
        ds: Tensor | None,
        saved: LayerSaved,
        task_of_sample: Tensor,
        needs: LayerNeeds,
        options: LayerOptions,
    ) -> LayerGradients:
        s, weight, mean, rstd = saved
        mean = rstd.new_empty(0) if mean is None else mean
        tensors = dy, ds, s, task_of_sample, weight, mean, rstd
        found = self.flat.mixed_layer_norm_backward(*tensors, options.gate, options.rms, *needs)
        return LayerGradients(*(gradient if need else None for gradient, need in zip(found, needs, strict=True)))


class _Fake:
    """A backend that allocates its results."""

    @staticmethod
    def mixed_layer_norm(
        x: Tensor,
        task_of_sample: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        options: LayerOptions,
    ) -> LayerNormalized:
        return empty_outputs(x, weight, residual, options)

    @staticmethod
    def mixed_layer_norm_backward(
        dy: Tensor,
        ds: Tensor | None,
        saved: LayerSaved,
        task_of_sample: Tensor,
        needs: LayerNeeds,
        options: LayerOptions,
    ) -> LayerGradients:
        return empty_gradients(saved.s, saved.weight, needs)


def _sums(values: Tensor, task_of_sample: Tensor, num_tasks: int) -> Tensor:
    """Sums over samples that no order of them changes."""
    return exact_task_sums(values.double(), task_of_sample, num_tasks)


def _held(x: Tensor, _: Tensor, third: Tensor | LayerSaved, *__: Any) -> bool:
    """Whether a program holds a row, by x, or by dy, which has its shape; and by the weight, or what is saved."""
    return fits(x, third.weight if isinstance(third, LayerSaved) else third)


mixed_layer_norm: MixedNormalization[MixedLayerBackend] = MixedNormalization(
    lambda backend: Gathered(layer_ops.eager_operators(backend), _sums),
    _held,
    MixedLayerOperators,
    {
        "mixed_layer_norm": Operator(
            "(Tensor x, Tensor task_of_sample, Tensor weight, Tensor? bias, Tensor? residual, float eps, str gate,"
            " bool rms=False) -> (Tensor y, Tensor s, Tensor mean, Tensor rstd)",
            layer_ops.normalized,
        ),
        "mixed_layer_norm_backward": Operator(
            "(Tensor dy, Tensor? ds, Tensor s, Tensor task_of_sample, Tensor weight, Tensor mean, Tensor rstd,"
            " str gate, bool rms=False, bool need_dx=True, bool need_dweight=True, bool need_dbias=False)"
            " -> (Tensor dx, Tensor dweight, Tensor dbias)",
            _backward,
        ),
    },
    _options,
    {"eps": 0.0},  # of the backward pass, which reads rstd
    Dispatched,
    _Fake(),
)
operators, eager_operators = mixed_layer_norm.operators, mixed_layer_norm.eager


def again(
    options: LayerOptions, backend: str | None, weight: Tensor, bias: Tensor | None, s: Tensor, task_of_sample: Tensor
) -> Tensor:
    """Computes y anew from what was normalised."""
    return operators(direct.of_later_pass(backend)).mixed_layer_norm(s, task_of_sample, weight, bias, None, options).y
