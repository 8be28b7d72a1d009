"""The operators of :class:`tsbn_kernels.definition.options.MixedBackend` by the CUDA C++ kernels.

They are for samples of few positions: :func:`tsbn_kernels.backends.plan.mixed.walks`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsbn_kernels.backends.cuda import launches
from tsbn_kernels.backends.cuda.batch_norm import Call, prepared
from tsbn_kernels.backends.cuda.launches import Operands
from tsbn_kernels.backends.order import order_of, words_of
from tsbn_kernels.backends.plan.mixed_cuda import MixedCudaPlan, key_numbers, keyed
from tsbn_kernels.backends.plan.slots import PASSES, THREADS
from tsbn_kernels.definition import layout
from tsbn_kernels.definition import mixed_batch_norm as reference
from tsbn_kernels.definition.activations import NONE
from tsbn_kernels.definition.batch_norm import accumulate_dtype
from tsbn_kernels.definition.options import NOT_TRACKED, Gradients, Needs, Normalized, Options, Running, Saved

KEYS = "mixed_keys"
_KIND = {torch.int64: torch.float64, torch.int32: torch.float32, torch.int16: torch.float16}  # names of its kernels


def keys_of(tensors: tuple[Tensor | None, ...], columns: bool) -> Tensor | None:
    """A key of each sample, int64 ``[N]``, of what is given of the activations; None of nothing."""
    keys = None
    for tensor in tensors:
        if tensor is None:
            continue
        words, before = words_of(tensor, columns), keys
        device = launches.device_of(tensor.device)
        log_lanes, blocks = keyed(device, len(words), words.shape[1] * words.shape[2])
        kernel = [launches.code(_KIND[words.dtype]), 0, PASSES.index(KEYS), blocks, THREADS, 1, 0, 0]
        keys = torch.empty(len(words), dtype=torch.int64, device=tensor.device)
        numbers = list(key_numbers(log_lanes, words.shape, words.stride()))
        launches.launch(KEYS, kernel, numbers, 0.0, 0.0, Operands(words, weight=words, mean=before, first=keys))
    return keys


def _run(call: Call, task_of_sample: Tensor, tensors: Operands) -> None:
    found, tensors = prepared(call, tensors)
    plan, keys = found.plan, None
    assert isinstance(plan, MixedCudaPlan)
    if plan.work.reduces:
        backward = (tensors.dy, tensors.residual) if call.needs else ()
        keys = keys_of((tensors.x, *backward), plan.work.family == "columns")
    order = order_of(task_of_sample, plan.work.tasks, keys, plan.block, plan.blocks)
    found.launch(call.options, tensors._replace(mix=torch.cat(order)))


def mixed_forward_training(
    x: Tensor,
    task_of_sample: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    options: Options,
    running: Running = NOT_TRACKED,
) -> Normalized:
    """Updates the running statistics of a task, if any, in the launch that writes those of its samples."""
    if x.numel() == 0:
        return reference.mixed_forward_training(x, task_of_sample, weight, bias, residual, options)
    y = layout.empty_output(x, options)
    mean, var = weight.new_zeros((2, *weight.shape), dtype=accumulate_dtype(x.dtype)).unbind()
    given = Operands(x, residual=residual, out=y, weight=weight, bias=bias, first=mean, second=var)
    _run(Call(options, True, mixed=True), task_of_sample, given.tracking(running))
    return Normalized(y, mean, var)


def mixed_forward_tracked(
    x: Tensor,
    task_of_sample: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    running: Running,
    options: Options,
) -> Normalized:
    reference.check_batch(x, task_of_sample, options.num_tasks)
    return mixed_forward_training(x, task_of_sample, weight, bias, residual, options, running)


def mixed_forward_eval(saved: Saved, task_of_sample: Tensor, options: Options) -> Tensor:
    x, weight, bias, residual, mean, var = saved
    if x.numel() == 0:
        return reference.mixed_forward_eval(saved, task_of_sample, options)
    y = layout.empty_output(x, options)
    given = Operands(x, residual=residual, out=y, weight=weight, bias=bias, mean=mean, var=var)
    _run(Call(options, False, mixed=True), task_of_sample, given)
    return y


def mixed_backward(
    dy: Tensor, saved: Saved, task_of_sample: Tensor, training: bool, needs: Needs, options: Options
) -> Gradients:
    x, weight, bias, residual, mean, var = saved
    if x.numel() == 0:
        return reference.mixed_backward(dy, saved, task_of_sample, training, needs, options)
    if options.activation == NONE:  # z is not computed again
        bias = residual = None
    found = layout.empty_gradients(x, weight, needs, options)
    dx, dweight, dbias, dresidual = found
    for gradient in (dweight, dbias):
        if gradient is not None:
            gradient.zero_()  # of tasks without a sample
    if any(needs):
        given = Operands(x, dy, residual, dx, dresidual, weight, bias, mean, var, dweight, dbias)
        _run(Call(options, training, needs, mixed=True), task_of_sample, given)
    return found
