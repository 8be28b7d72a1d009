"""Mixed batches by the kernels of equal tasks: each sample is a task of its own, and a part of the batch of its task.

No sample is moved, and all slabs have one size, whatever the mix. Forward: x is read for the moments of each sample,
which are joined by task, and read again when y is written. Backward: x and dy are read for the sums of each sample,
which are added up by task, and read again when dx is written. What is joined is ``[N, C]``. Joined sums depend neither
on the order of the samples nor on that of the threads, so the bits of y are those of any other order of the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsbn_kernels.definition import mixed_batch_norm as definition
from tsbn_kernels.definition.activations import NONE
from tsbn_kernels.definition.batch_norm import accumulate_dtype, gate_slope, gate_values
from tsbn_kernels.definition.mixed_batch_norm import samples_of, task_of_each_sample
from tsbn_kernels.definition.options import Backend, Gradients, Moments, Needs, Normalized, Options, Saved
from tsbn_kernels.operator.coefficients import coefficients

_TINY = 1e-300  # below this a float64 has few digits left


def exact_task_sums(values: Tensor, task_of_sample: Tensor, num_tasks: int) -> Tensor:
    """Sums ``[T, C]`` over the samples of each task, of float64 ``[N, C]``, that no order of the samples changes.

    Integers are added up: multiples of a unit for each task and channel, of which the largest value has so many that
    no sum overflows.
    """
    N, C = values.shape
    index = task_of_sample.unsqueeze(1).expand(N, C)
    largest = values.new_zeros(num_tasks, C).scatter_reduce(0, index, values.abs(), "amax")
    unit = largest.clamp_min(_TINY) / 2.0 ** (62 - N.bit_length())
    multiples = (values / unit.index_select(0, task_of_sample)).to(torch.int64)
    sums = multiples.new_zeros(num_tasks, C).index_add(0, task_of_sample, multiples)
    return sums * unit + (largest - largest)  # not finite where a value is not


def joined(moments: Moments, task_of_sample: Tensor, samples: Tensor) -> Moments:
    """Mean and biased variance, float64 ``[T, C]``, of those of each sample; see ``batch_norm.join_moments``."""
    (mean, var), counts = moments, samples.clamp_min(1).unsqueeze(1)

    def mean_of(values: Tensor) -> Tensor:
        return exact_task_sums(values, task_of_sample, len(samples)) / counts

    rough = mean_of(mean)
    exact = rough + mean_of(mean - rough.index_select(0, task_of_sample))
    return Moments(exact, mean_of(var + (mean - exact.index_select(0, task_of_sample)).square()))


def task_moments(compute: Backend, x: Tensor, task_of_sample: Tensor, options: Options) -> Moments:
    """Mean and biased variance of each task, float64 ``[T, C]``, by a backend for equal tasks; 0 without a value."""
    if x.numel() == 0:
        zeros = x.new_zeros(options.num_tasks, x.shape[1], dtype=torch.float64)
        return Moments(zeros, zeros.clone())
    of_each_sample = compute.moments(x, options._replace(num_tasks=x.shape[0]))
    return joined(of_each_sample, task_of_sample, samples_of(task_of_sample, options.num_tasks))


def input_gradient_of_tasks(
    compute: Backend,
    dy: Tensor,
    given: Saved,
    task_of_sample: Tensor,
    mean: Tensor,
    dot_mean: Tensor,
    need_residual: bool,
    options: Options,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of the residual, from the means ``[T, C]`` of ``dz`` and ``dz * xhat`` of each task."""
    if dy.numel() == 0:
        return torch.zeros_like(given.x), torch.zeros_like(given.x) if need_residual else None
    own, by_sample = task_of_each_sample(given, task_of_sample, options)
    mean, dot_mean = (vector.index_select(0, task_of_sample) for vector in (mean, dot_mean))
    dx, *_, dresidual = compute.input_gradient(dy, own, mean, dot_mean, need_residual, by_sample)
    return dx, dresidual


class Parts:
    """The operators of mixed batches by those of a backend for equal tasks.

    Args:
        compute: that backend, below autograd.
    """

    def __init__(self, compute: Backend) -> None:
        self._compute = compute

    def mixed_forward_training(
        self,
        x: Tensor,
        task_of_sample: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        options: Options,
    ) -> Normalized:
        if x.numel() == 0:
            return definition.mixed_forward_training(x, task_of_sample, weight, bias, residual, options)
        found = task_moments(self._compute, x, task_of_sample, options)
        mean, var = (vector.to(accumulate_dtype(x.dtype)) for vector in found)
        # A backward pass must compute the same z from what is stored, where it computes one.
        read = found if options.activation == NONE else Moments(mean.double(), var.double())
        saved = Saved(x, weight, bias, residual, *read)
        return Normalized(self.mixed_forward_eval(saved, task_of_sample, options), mean, var)

    def mixed_forward_tracked(self, *operands: Any) -> Normalized:
        return definition.mixed_forward_tracked(*operands, train=self.mixed_forward_training)

    def mixed_forward_eval(self, saved: Saved, task_of_sample: Tensor, options: Options) -> Tensor:
        if saved.x.numel() == 0:
            return definition.mixed_forward_eval(saved, task_of_sample, options)
        given, identity = coefficients(saved, options)
        return self._compute.forward_eval(*task_of_each_sample(given, task_of_sample, identity))

    def mixed_backward(
        self, dy: Tensor, saved: Saved, task_of_sample: Tensor, training: bool, needs: Needs, options: Options
    ) -> Gradients:
        x, weight = saved.x, saved.weight
        if x.numel() == 0:
            return definition.mixed_backward(dy, saved, task_of_sample, training, needs, options)
        wide = accumulate_dtype(x.dtype)
        gates = gate_values(weight.to(wide), options.gate)
        given, own = task_of_each_sample(
            saved._replace(weight=gates), task_of_sample, options._replace(gate="identity")
        )
        twice = training and needs.dx  # x and dy are read
        first = Needs(
            needs.dx and not twice, needs.dweight or twice, needs.dbias or twice, needs.dresidual and not twice
        )
        dx, dots, totals, dresidual = self._compute.backward(dy, given, False, first, own)
        samples = samples_of(task_of_sample, options.num_tasks).unsqueeze(1)
        dot, total = (
            None if sums is None else exact_task_sums(sums.double(), task_of_sample, options.num_tasks)
            for sums in (dots, totals)
        )
        if twice:
            assert total is not None
            assert dot is not None
            assert dots is not None
            values = samples.clamp_min(1) * (x.numel() // dots.numel())
            mean, dot_mean = ((sums / values).to(wide).index_select(0, task_of_sample) for sums in (total, dot))
            dx, *_, dresidual = self._compute.input_gradient(dy, given, mean, dot_mean, needs.dresidual, own)
        dweight = dbias = None
        if needs.dweight and dot is not None:
            slope = gate_slope(weight.to(wide), options.gate)
            dweight = torch.where(samples > 0, slope * dot.to(wide), 0).to(weight.dtype)
        if needs.dbias and total is not None:
            dbias = total.to(weight.dtype)
        return Gradients(dx, dweight, dbias, dresidual)
