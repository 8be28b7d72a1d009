"""The definition of mixed batches: layer normalisation where an index tells the task of each sample.

``x`` is ``[N, *, *normalized_shape]`` with samples in any order, and ``task_of_sample`` int64 ``[N]``, below T. Each
sample is a task of its own here, with the vectors of its task: so all else is what
:mod:`tsbn_kernels.definition.layer_norm` defines, or a backend for equal tasks computes. The functions are
differentiable to any order, and are a :class:`tsbn_kernels.definition.options.MixedLayerBackend`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tsbn_kernels.definition import layer_norm
from tsbn_kernels.definition.batch_norm import accumulate_dtype
from tsbn_kernels.definition.mixed_batch_norm import task_sums
from tsbn_kernels.definition.options import (
    LayerBackend,
    LayerGradients,
    LayerNeeds,
    LayerNormalized,
    LayerOptions,
    LayerSaved,
)


def vectors_of_samples(x: Tensor, task_of_sample: Tensor, *vectors: Tensor | None) -> list[Tensor | None]:
    """Gathers vectors ``[T, *normalized_shape]`` as those of N samples, in the accumulate dtype of x."""
    wide = accumulate_dtype(x.dtype)
    return [None if vector is None else vector.to(wide).index_select(0, task_of_sample) for vector in vectors]


class Gathered:
    """The operators of mixed batches by those of equal tasks.

    Args:
        compute: these operators.
        sums: makes sums ``[T, D]`` over the samples of each task, of values ``[N, D]``, the index and T.
    """

    def __init__(self, compute: LayerBackend, sums: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        self._compute, self._sums = compute, sums

    def mixed_layer_norm(
        self,
        x: Tensor,
        task_of_sample: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        options: LayerOptions,
    ) -> LayerNormalized:
        if x.shape[0] == 0:
            return self._compute.layer_norm(x, weight, bias, residual, options)
        weights, biases = vectors_of_samples(x, task_of_sample, weight, bias)
        assert weights is not None
        return self._compute.layer_norm(x, weights, biases, residual, options._replace(num_tasks=x.shape[0]))

    def mixed_layer_norm_backward(
        self,
        dy: Tensor,
        ds: Tensor | None,
        saved: LayerSaved,
        task_of_sample: Tensor,
        needs: LayerNeeds,
        options: LayerOptions,
    ) -> LayerGradients:
        s, weight = saved.s, saved.weight
        if s.shape[0] == 0:
            return self._compute.layer_norm_backward(dy, ds, saved, needs, options)
        (weights,) = vectors_of_samples(s, task_of_sample, weight)
        assert weights is not None
        of_samples = saved._replace(weight=weights), needs, options._replace(num_tasks=s.shape[0])
        dx, *gradients = self._compute.layer_norm_backward(dy, ds, *of_samples)

        def of_tasks(gradient: Tensor | None) -> Tensor | None:
            if gradient is None:
                return None
            sums = self._sums(gradient.flatten(1), task_of_sample, options.num_tasks)
            return sums.view(weight.shape).to(weight.dtype)

        return LayerGradients(dx, *map(of_tasks, gradients))


defined = Gathered(layer_norm, task_sums)
mixed_layer_norm, mixed_layer_norm_backward = defined.mixed_layer_norm, defined.mixed_layer_norm_backward
