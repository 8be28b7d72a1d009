"""The definition of mixed batches: batch normalisation where an index tells the task of each sample.

``x`` is ``[N, C, *]`` with samples in any order, and ``task_of_sample`` int64 ``[N]``, below T. Mean and variance of a
task are those of its samples, of which it may have any number; y is in the order of x::

    mean[t,c] = mean of x[n,c,s] over all s and the n of task t       (var[t,c] likewise; both 0 without a sample)
    y[n] = act(g(weight[t]) * (x[n] - mean[t]) / sqrt(var[t] + eps) + bias[t] + residual[n])    (t = task_of_sample[n])

Each sample is a task of its own here, with one sample and the vectors of its task: so all but the statistics is what
:mod:`tsbn_kernels.definition.batch_norm` defines. The functions are differentiable to any order, and are a
:class:`tsbn_kernels.definition.options.MixedBackend`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tsbn_kernels.definition import batch_norm
from tsbn_kernels.definition.batch_norm import accumulate_dtype, before_activation, centred, gate_slope, spread
from tsbn_kernels.definition.options import Gradients, Moments, Needs, Normalized, Options, Running, Saved


def samples_of(task_of_sample: Tensor, num_tasks: int) -> Tensor:
    """How many samples each task has, int64 ``[T]``."""
    return task_of_sample.new_zeros(num_tasks).index_add(0, task_of_sample, torch.ones_like(task_of_sample))


def task_sums(values: Tensor, task_of_sample: Tensor, num_tasks: int) -> Tensor:
    """Sums ``[T, C]`` over the samples of each task, of ``[N, C]`` values."""
    return values.new_zeros(num_tasks, values.shape[1]).index_add(0, task_of_sample, values)


def task_of_each_sample(saved: Saved, task_of_sample: Tensor, options: Options) -> tuple[Saved, Options]:
    """Makes each sample a task of its own: a call of equal tasks, whose vectors are ``[N, C]``.

    Parameters come in the accumulate dtype, in which their gradients are summed over the samples.
    """
    x, weight, bias, residual, mean, var = saved
    wide = accumulate_dtype(x.dtype)
    weight, mean, var = (vector.index_select(0, task_of_sample) for vector in (weight.to(wide), mean, var))
    bias = None if bias is None else bias.to(wide).index_select(0, task_of_sample)
    return Saved(x, weight, bias, residual, mean, var), options._replace(num_tasks=x.shape[0])


def mixed_statistics(x: Tensor, task_of_sample: Tensor, num_tasks: int) -> Moments:
    """Mean and biased variance per task and channel, each ``[T, C]``; 0 of a task without a sample."""
    wide = x.to(accumulate_dtype(x.dtype)).flatten(2) if x.dim() > 2 else x.to(accumulate_dtype(x.dtype)).unsqueeze(2)
    samples = samples_of(task_of_sample, num_tasks).clamp_min(1).unsqueeze(1)
    positions = max(1, wide.shape[2])

    def mean_of(values: Tensor) -> Tensor:
        return task_sums(values.sum(2) / positions, task_of_sample, num_tasks) / samples

    mean = mean_of(wide)
    return Moments(mean, mean_of((wide - mean.index_select(0, task_of_sample).unsqueeze(2)).square()))


def mixed_forward_training(
    x: Tensor, task_of_sample: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, options: Options
) -> Normalized:
    """Normalises each task by the statistics of its samples. Returns y, mean ``[T, C]`` and biased variance."""
    mean, var = mixed_statistics(x, task_of_sample, options.num_tasks)
    return Normalized(
        mixed_forward_eval(Saved(x, weight, bias, residual, mean, var), task_of_sample, options), mean, var
    )


def mixed_forward_tracked(
    x: Tensor,
    task_of_sample: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    running: Running,
    options: Options,
    *,
    train: Callable[..., Normalized] = mixed_forward_training,
) -> Normalized:
    """Computes :func:`mixed_forward_training`, by ``train``, and updates the running statistics by those found.

    Raises:
        RuntimeError: a task has one value per channel; other devices than the CPU raise it later.
    """
    samples, positions = samples_of(task_of_sample, options.num_tasks), x.numel() // (x.shape[0] * x.shape[1])
    if positions == 1:
        check_values(samples)
    found = train(x, task_of_sample, weight, bias, residual, options)
    track(running, found.mean.detach(), found.var.detach(), samples, positions)
    return found


def check_values(values: Tensor) -> None:
    """Lets the device raise an error where a task has one value per channel; ``values`` are ``[T]``."""
    torch._assert_async((values != 1).all(), "Expected more than 1 value per task and channel when training")


def check_batch(x: Tensor, task_of_sample: Tensor, num_tasks: int) -> None:
    """Lets the device raise an error where a task has one sample, of one position."""
    if x.numel() == x.shape[0] * x.shape[1]:
        check_values(samples_of(task_of_sample, num_tasks))


def mixed_forward_eval(saved: Saved, task_of_sample: Tensor, options: Options) -> Tensor:
    """Normalises by given statistics ``[T, C]``."""
    if saved.x.numel() == 0:
        return saved.x.clone()
    return batch_norm.forward_eval(*task_of_each_sample(saved, task_of_sample, options))


def mixed_backward(
    dy: Tensor, saved: Saved, task_of_sample: Tensor, training: bool, needs: Needs, options: Options
) -> Gradients:
    """Gradients of x, weight, bias and residual, those that are needed; zero for parameters of absent tasks.

    In training the statistics are functions of x, so they are computed anew: the result can be differentiated again
    with respect to dy, x, weight, bias and residual.
    """
    x, weight, num_tasks = saved.x, saved.weight, options.num_tasks
    if x.numel() == 0:
        zeros = torch.zeros_like(weight)
        of_each = torch.zeros_like(x), zeros, zeros.clone(), torch.zeros_like(x)
        return Gradients(*(zero if need else None for zero, need in zip(of_each, needs, strict=True)))
    if training:
        mean, var = mixed_statistics(x, task_of_sample, num_tasks)
        saved = saved._replace(mean=mean, var=var)
    dz, xhat, scale = before_activation(dy, *task_of_each_sample(saved, task_of_sample, options))
    total, dot = (task_sums(values.sum(dim=(1, 3)), task_of_sample, num_tasks) for values in (dz, dz * xhat))
    samples = samples_of(task_of_sample, num_tasks).unsqueeze(1)

    dx = dweight = dbias = dresidual = None
    own = options._replace(num_tasks=x.shape[0])
    if needs.dresidual:
        dresidual = batch_norm.stacked(dz, x, own)
    if needs.dx:
        if training:
            values = samples.clamp_min(1) * dz.shape[3]
            means = ((sums / values).index_select(0, task_of_sample) for sums in (total, dot))
            dz = centred(dz, xhat, *means)
        dx = batch_norm.stacked(dz * spread(scale), x, own)
    if needs.dweight:
        dweight = gate_slope(weight.to(dot.dtype), options.gate) * dot
        dweight = torch.where(samples > 0, dweight, 0).to(weight.dtype)
    if needs.dbias:
        dbias = total.to(weight.dtype)
    return Gradients(dx, dweight, dbias, dresidual)


def track(running: Running, mean: Tensor, var: Tensor, samples: Tensor, positions: int) -> None:
    """Updates the running statistics of the tasks that have samples, each of ``positions`` values a channel.

    Samples without values count as a batch.
    """
    present, batches, share = samples > 0, running.batches, running.momentum
    if batches is not None:
        batches.add_(present)
    if positions == 0:
        return
    if share is None:
        assert batches is not None
        share = 1.0 / batches.to(mean.dtype).unsqueeze(1)
    values = (samples * positions).unsqueeze(1).to(mean.dtype)
    for old, found in ((running.mean, mean), (running.var, var * (values / (values - 1).clamp_min(1)))):
        if old is not None:
            dtype = torch.promote_types(old.dtype, found.dtype)
            before, share = old.to(dtype), share.to(dtype) if isinstance(share, Tensor) else share
            after = before + (found.to(dtype) - before) * share
            old.copy_(torch.where(present.unsqueeze(1), after, before))
