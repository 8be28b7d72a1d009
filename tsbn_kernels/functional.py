"""The functional form: checks the input, runs the operator, updates the running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tsbn_kernels.backends import capture
from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.definition import layout, mixed_batch_norm
from tsbn_kernels.definition.options import LayerOptions, Options, Running, Saved, of_input
from tsbn_kernels.operator import (
    autograd,
    autograd_streams,
    autograd_synchronized,
    checks,
    direct,
    layer_autograd,
    layer_checks,
    layer_ops,
    layer_streams,
    mixed_autograd,
    mixed_checks,
    mixed_layer_autograd,
    mixed_layer_ops,
    recompute_outputs,
    runs,
)

_INT64 = torch.int64


def task_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    num_tasks: int,
    training: bool = True,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    gate: str = "sigmoid",
    stacking: str = "task_major",
    activation: str | None = None,
    negative_slope: float = 0.01,
    fan_out: bool = False,
    recover_input: bool = False,
    process_group: autograd_synchronized.GroupLike = None,
    task_of_sample: Tensor | None = None,
    evaluate_single: bool = False,
) -> Tensor:
    """Batch normalisation with statistics, gate and bias of its own for each task, and what follows it in a network.

    ``y[t] = act(g(weight[t]) * (x[t] - mean[t]) / sqrt(var[t] + eps) + bias[t] + residual[t])`` per channel, where
    ``g`` is the sigmoid (TS-sigma-BN) or the identity (TSBN): arXiv 2512.20420, eq. 3. Statistics of float16 and
    bfloat16 input are float32, and y is rounded once.

    Args:
        x: float32, float64, float16 or bfloat16 activation of all tasks: ``[T*N, C, *]`` stacked task-major or
            sample-major, or ``[T, N, C, *]`` with ``stacking="task_axis"``. Contiguous and channels_last inputs, and
            strided views of them, are read in place.
        weight: the raw gate parameter gamma, ``[T, C]``.
        bias: ``[T, C]``, or None.
        running_mean, running_var: ``[T, C]``. Updated in place in training, except by a forward pass that activation
            checkpointing repeats (:func:`tsbn_kernels.operator.runs.is_repetition`); read in evaluation.
        residual: added before the activation; shape of y. Where its dtype is not that of x, as in autocast, both are
            promoted as in ``x + residual``, and so is y: in one copy of what is narrower.
        num_tasks: T.
        training: normalise by the statistics of the batch instead of the running ones.
        momentum: share of the batch in the running statistics; a tensor broadcasts over ``[T, C]``.
        eps: added to the variance; positive, in evaluation also 0.
        gate: ``"sigmoid"`` or ``"identity"``.
        stacking: ``"task_major"`` (sample n of task t at ``t*N + n``), ``"sample_major"`` (at ``n*T + t``) or
            ``"task_axis"``.
        activation: None, or one of :data:`tsbn_kernels.definition.activations.ACTIVATIONS`, such as ``"relu"``.
        negative_slope: of the leaky ReLU.
        fan_out: x is one input ``[N, C, *]`` for all tasks. It is read, normalised and saved for the backward once; y
            has T streams in ``stacking``.
        recover_input: save y in place of x for the backward pass, see :mod:`tsbn_kernels.operator.recover_input`. It
            spares memory where a convolution follows, which saves y anyway. No effect inside ``torch.compile`` and
            while a CUDA graph is captured; elsewhere on a GPU each forward pass waits for it.
        process_group: in training, normalise by the statistics of the batches of all ranks of a
            ``torch.distributed.ProcessGroup`` taken together (``"world"``: of all ranks), which may have different
            sizes, or none: see :mod:`tsbn_kernels.operator.autograd_synchronized`. All ranks must make the same calls
            in the same order. None: those of this process alone.
        task_of_sample: of a mixed batch ``[N, C, *]``, the task of each sample: int64 ``[N]``, from 0 to T-1, in any
            order. Statistics and running statistics of a task are those of its own samples, of which it may have any
            number; one without a sample keeps its running statistics, and its gradients are zero. With a
            ``process_group`` they are those of all ranks' samples, of which a rank may have any, or none. Neither
            ``stacking``, ``fan_out`` nor ``recover_input`` go with it.
        evaluate_single: in training, normalise a task of a mixed batch that has one value per channel by its running
            statistics, which stay, instead of raising an error.

    Returns:
        y, in the shape (with ``fan_out`` stacked), dtype (promoted by a residual's) and memory format of ``x``.

    Raises:
        ValueError: a shape or option does not fit, training has one value per channel (of a task), a sample has no
            such task, or running statistics require a gradient, or share memory in training, which writes them.
        TypeError: a dtype is not supported, a tensor is not dense, or an argument is of another type.
        RuntimeError: tensors lie on different devices, or were made in inference mode and are to be written or saved.
            With a ``process_group``: ``torch.distributed`` is not initialised, the ranks' tasks or channels differ, or
            a second derivative is asked for.
    """
    tensors = x, weight, bias, running_mean, running_var, residual
    settings = num_tasks, training, eps, gate, stacking, activation, negative_slope, fan_out, recover_input
    running = _running(running_mean, running_var, momentum, training)
    if task_of_sample is not None:
        mixed_checks.check_alone(
            stacking=(stacking, "task_major"),
            fan_out=(fan_out, False),
            recover_input=(recover_input, False),
        )
        checks.check_flag("evaluate_single", evaluate_single)
        return normalize_mixed(tensors, task_of_sample, settings, running, process_group, evaluate_single)
    y: Tensor
    (y,) = normalize(tensors, settings, running, process_group)
    return y


def task_streams(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    momentum: float | Tensor = 0.1,
    process_group: autograd_synchronized.GroupLike = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Computes :func:`task_batch_norm`, and returns the T streams ``[N, C, *]`` of the tasks as tensors of their own.

    A backward pass that comes from some of them computes those tasks alone: with ``fan_out`` T backward passes over a
    retained graph, as multi-task weighting methods make them, cost one task each. Where all come at once their
    gradients are first copied into one stack. With a ``process_group``, and inside ``torch.compile``, a backward pass
    computes all tasks.

    Raises:
        ValueError: also where ``recover_input`` is set.
    """
    tensors = x, weight, bias, running_mean, running_var, residual
    settings = checks.Settings(**options)
    running = _running(running_mean, running_var, momentum, settings.training)
    return tuple(normalize(tensors, settings, running, process_group, as_streams=True))


def _running(mean: Any, var: Any, momentum: Any, training: bool) -> Running:
    """What a call updates: nothing in evaluation, and where activation checkpointing repeats it."""
    if training is False or runs.is_repetition():
        return Running(momentum=momentum)
    return Running(mean, var, None, momentum)


def normalize(
    tensors: tuple[Any, ...],
    settings: tuple[Any, ...],
    running: Running,
    process_group: autograd_synchronized.GroupLike,
    as_streams: bool = False,
) -> Sequence[Tensor]:
    """Computes :func:`task_batch_norm`, and returns y alone, or the streams of its tasks.

    Args:
        tensors: the six of :func:`task_batch_norm`, in its order.
        settings: a :class:`checks.Settings`, or its values: a plain tuple is made at a third of the cost.
        running: the statistics to update, if any.
        process_group: as there.
        as_streams: return the streams.
    """
    compiling, (_, training, *_, recover_input) = torch.compiler.is_compiling(), settings
    group = None
    if process_group is not None:
        checks.check_flag("training", training)
        group = autograd_synchronized.group_of(process_group) if training else None
    check = checks.check_call if compiling else checks.checked
    options, channels, values = check(tensors, settings, process_group is not None, group is None)
    x, weight, bias, running_mean, running_var, residual = tensors
    running = checks.running_of_call(running, x, options, channels)
    if residual is None:
        x = layout.supported(x, of_input(options).stacking)
    else:
        x, residual = _promoted(x, residual)
        x, residual = layout.readable(x, options, residual)

    if recover_input and as_streams:
        raise ValueError("recover_input=True keeps the streams as one stack; use task_batch_norm, and split its result")
    if recover_input:  # which channels it keeps depends on data, of which graphs know nothing
        recover_input = not compiling and not capture.is_capturing()
    backend = direct.backend_of(x, weight, bias, running_mean, running_var, residual)
    tracked = running.mean is not None or running.var is not None or running.batches is not None
    outputs: Sequence[Tensor]
    if group is not None:
        y, mean, var, count = autograd_synchronized.apply(x, None, weight, bias, residual, options, group, backend)
        outputs = autograd_streams.of_a_stack(y, options) if as_streams else (y,)
        if tracked:
            momentum = reference.advance(running, mean.dtype)
            momentum = momentum * (count > 0).to(count.dtype)  # an empty batch leaves the running statistics alone
            reference.move(running, mean, var * (count / (count - 1).clamp_min(1)), momentum)
    else:
        function = autograd_streams if as_streams else autograd
        apply = function.apply_in_graph if compiling else function.apply
        given = (None, None) if training else checks.constant(running_mean, running_var)
        at_once = running if tracked and not compiling and values > 0 and _by_an_operator(running, x) else None
        *outputs, mean, var = apply(x, weight, bias, residual, *given, at_once, options, recover_input, backend)
        if at_once is not None:
            torch.autograd.graph.increment_version([v for v in running[:3] if v is not None])
        elif tracked:
            reference.track(running, mean, var, values)
    if not compiling and recompute_outputs.wanted() and not recover_input:
        saved = Saved(x, weight, bias, residual, mean, var)
        recompute_outputs.offer_normalized(outputs, saved, (), options, group, backend)
    return outputs


def normalize_mixed(
    tensors: tuple[Any, ...],
    task_of_sample: Any,
    settings: tuple[Any, ...],
    running: Running,
    process_group: autograd_synchronized.GroupLike = None,
    evaluate_single: bool = False,
) -> Tensor:
    """Computes :func:`task_batch_norm` of a mixed batch; takes what :func:`normalize` does, and the index."""
    compiling, (num_tasks, training, *arithmetic, _, _) = torch.compiler.is_compiling(), settings
    x, weight, bias, running_mean, running_var, residual = tensors
    # Of the shape of one input that all tasks share.
    of_x = num_tasks, training, *arithmetic, True, False
    check = checks.check_call if compiling else checks.checked
    options, channels, values = check((*tensors[:5], None), of_x, False, False)
    options = Options(*options[:-1])  # without fan-out
    mixed_checks.check_index(task_of_sample, x)
    group = autograd_synchronized.group_of(process_group) if training and process_group is not None else None
    running = checks.running_of_call(running, x, options, channels)
    if residual is None:
        x = layout.supported(x, options.stacking)
    else:
        checks.check_residual(residual, x, options)
        x, residual = _promoted(x, residual)
        x, residual = layout.readable(x, options, residual)
    positions, alone = values // max(1, x.shape[0]), None
    backend = direct.backend_of(x, task_of_sample, weight, bias, running_mean, running_var, residual)
    given = (None, None) if training else checks.constant(running_mean, running_var)
    inputs = x, task_of_sample, weight, bias, residual
    beside = compiling or group is not None or x.numel() == 0 or (evaluate_single and positions == 1)
    if not beside and _by_an_operator(running, x):
        at_once = running if training else None
        try:
            y, mean, var = mixed_autograd.apply(*inputs, *given, at_once, options, backend)
        except (IndexError, RuntimeError):  # of an operator, which knows neither arguments nor remedies
            mixed_checks.check_samples(task_of_sample, x, options, training)
            raise
        torch.autograd.graph.increment_version([v for v in running[:3] if v is not None])
    else:
        samples = mixed_checks.samples_of(task_of_sample, x, num_tasks)
        if group is not None:
            y, mean, var, samples = autograd_synchronized.apply(*inputs, options, group, backend)
            positions = 1  # it counts values of all ranks, whose samples may have other sizes
        if training and positions == 1:
            if not evaluate_single:
                mixed_checks.check_values(samples, x.shape)
            elif mixed_checks.may_be_alone(samples):
                if running_mean is None or running_var is None:
                    raise ValueError(
                        "evaluate_single=True needs running_mean and running_var; pass them, or leave it False"
                    )
                alone = samples == 1
                samples = samples.masked_fill(alone, 0)
        if group is None:
            apply = mixed_autograd.apply_in_graph if compiling else mixed_autograd.apply
            y, mean, var = apply(*inputs, *given, None, options, backend)
        if running.mean is not None or running.var is not None or running.batches is not None:
            mixed_batch_norm.track(running, mean.detach(), var.detach(), samples, positions)
    if not compiling and recompute_outputs.wanted():
        saved = Saved(x, weight, bias, residual, mean, var)
        recompute_outputs.offer_normalized([y], saved, (task_of_sample,), options, group, backend)
    if alone is None:
        return y
    # Those of the other tasks may hold anything: their gradients of zero must not be multiplied by it.
    own = alone.unsqueeze(1)
    vectors = weight, bias, torch.where(own, running_mean, 0), torch.where(own, running_var, 1)
    evaluated = normalize_mixed(
        (tensors[0], *vectors, residual), task_of_sample, (num_tasks, False, *settings[2:]), Running()
    )
    return torch.where(alone.index_select(0, task_of_sample).view(-1, *(1,) * (y.dim() - 1)), evaluated, y)


def _promoted(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of ``x + residual``."""
    if residual.dtype == x.dtype:
        return x, residual
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)


def _by_an_operator(running: Running, x: Tensor) -> bool:
    """Whether the operator that computes the batch's statistics can update the running ones."""
    mean, var, batches, momentum, _ = running
    return (
        (type(momentum) is float or momentum is None)
        and not torch._C._are_functorch_transforms_active()
        and (mean is None or mean.is_contiguous())
        and (var is None or var.is_contiguous())
        and (batches is None or (batches.dtype is _INT64 and batches.is_contiguous() and batches.device == x.device))
    )


# ---- layer normalisation ---------------------------------------------------------------------------------------------


def task_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    num_tasks: int,
    eps: float = 1e-5,
    gate: str = "sigmoid",
    stacking: str = "task_major",
    fan_out: bool = False,
    task_of_sample: Tensor | None = None,
) -> Tensor:
    """Layer normalisation with a gate and a bias of its own for each task.

    ``y[t] = g(weight[t]) * (x[t] - mean) / sqrt(var + eps) + bias[t]``, where mean and variance are those of each row
    of ``normalized_shape``, and ``g`` is the sigmoid (TS-sigma-LN) or the identity (TSLN). Statistics of float16 and
    bfloat16 input are float32, and y is rounded once.

    Args:
        x: float32, float64, float16 or bfloat16 activation of all tasks: ``[T*N, *, *normalized_shape]`` stacked
            task-major or sample-major, or ``[T, N, *, *normalized_shape]`` with ``stacking="task_axis"``.
        weight: the raw gate parameter gamma, ``[T, *normalized_shape]``.
        bias: of the shape of weight, or None.
        num_tasks: T.
        eps: added to the variance.
        gate: ``"sigmoid"`` or ``"identity"``.
        stacking: ``"task_major"`` (sample n of task t at ``t*N + n``), ``"sample_major"`` (at ``n*T + t``) or
            ``"task_axis"``.
        fan_out: x is one input ``[N, *, *normalized_shape]`` for all tasks. It is read, normalised and saved for the
            backward once; y has T streams in ``stacking``.
        task_of_sample: of a mixed batch ``[N, *, *normalized_shape]``, the task of each sample: int64 ``[N]``, from 0
            to T-1, in any order. Neither ``stacking`` nor ``fan_out`` goes with it.

    Returns:
        y, in the shape (with ``fan_out`` stacked) and dtype of ``x``, contiguous.

    Raises:
        ValueError: a shape or option does not fit.
        TypeError: a dtype is not supported, a tensor is not dense, or an argument is of another type.
        RuntimeError: tensors lie on different devices.
    """
    return any_rows((x, weight, bias, None), (num_tasks, eps, gate, stacking, False, fan_out), task_of_sample)[0]


def add_task_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    num_tasks: int,
    eps: float = 1e-5,
    gate: str = "sigmoid",
    stacking: str = "task_major",
    fan_out: bool = False,
    task_of_sample: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes ``s = x + residual`` and :func:`task_layer_norm` of it, in one pass: pre-norm blocks need both.

    Args:
        x, weight, bias, num_tasks, eps, gate, stacking, fan_out, task_of_sample: as there.
        residual: of the shape of x. Where its dtype is not that of x, both are promoted as in ``x + residual``.

    Returns:
        y, and s in the shape and dtype of ``x + residual``. Raises as :func:`task_layer_norm` does.
    """
    checks.check_tensor("residual", residual)
    y, s = any_rows((x, weight, bias, residual), (num_tasks, eps, gate, stacking, False, fan_out), task_of_sample)
    return y, s


def task_rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    num_tasks: int,
    eps: float | None = None,
    gate: str = "sigmoid",
    stacking: str = "task_major",
    fan_out: bool = False,
    task_of_sample: Tensor | None = None,
) -> Tensor:
    """Computes ``y[t] = g(weight[t]) * x[t] / sqrt(mean(x[t]^2) + eps)`` for each row of ``normalized_shape``.

    Arguments are those of :func:`task_layer_norm`; without ``eps`` it is that of the dtype that is computed in, as in
    ``nn.RMSNorm``.
    """
    return any_rows((x, weight, None, None), (num_tasks, eps, gate, stacking, True, fan_out), task_of_sample)[0]


def add_task_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    num_tasks: int,
    eps: float | None = None,
    gate: str = "sigmoid",
    stacking: str = "task_major",
    fan_out: bool = False,
    task_of_sample: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes ``s = x + residual`` and :func:`task_rms_norm` of it; see :func:`add_task_layer_norm`."""
    checks.check_tensor("residual", residual)
    y, s = any_rows((x, weight, None, residual), (num_tasks, eps, gate, stacking, True, fan_out), task_of_sample)
    return y, s


def normalize_rows(tensors: tuple[Any, ...], options: tuple[Any, ...], as_streams: bool = False) -> tuple[Tensor, ...]:
    """Computes :func:`task_layer_norm` or one like it.

    Args:
        tensors: x, weight, bias and residual.
        options: the values of a :class:`~tsbn_kernels.definition.options.LayerOptions`.
        as_streams: return the streams of the tasks; there is no residual then.

    Returns:
        y, and with a residual ``x + residual`` too; or the streams.
    """
    compiling = torch.compiler.is_compiling()
    call = (layer_checks.check_call if compiling else layer_checks.checked)(tensors, options)
    x, weight, bias, residual = tensors
    if residual is not None:
        x, residual = _promoted(x, residual)
        residual = residual.contiguous()
    backend = direct.backend_of(x, weight, bias, residual)
    function = layer_streams if as_streams else layer_autograd
    apply = function.apply_in_graph if compiling else function.apply
    x = x.contiguous()
    outputs: tuple[Tensor, ...] = apply(x, weight, bias, residual, call, backend)
    outputs = outputs[: call.num_tasks if as_streams else 1 if residual is None else 2]
    if not compiling and recompute_outputs.wanted():
        s = x if residual is None else outputs[1]
        recompute_outputs.offer(outputs, partial(_rows_again, call, backend), (weight, bias), (s,))
    return outputs


def any_rows(tensors: tuple[Any, ...], options: tuple[Any, ...], task_of_sample: Any) -> tuple[Tensor, ...]:
    """Computes :func:`normalize_rows`, where there is an index of a mixed batch: each sample has its task's vectors."""
    if task_of_sample is None:
        return normalize_rows(tensors, options)
    compiling = torch.compiler.is_compiling()
    x, weight, bias, residual = tensors
    num_tasks, eps, gate, stacking, rms, fan_out = options
    mixed_checks.check_alone(stacking=(stacking, "task_major"), fan_out=(fan_out, False))
    mixed_checks.samples_of(task_of_sample, x, num_tasks)
    of_x = num_tasks, eps, gate, stacking, rms, True  # of the shape of one input that all tasks share
    call = (layer_checks.check_call if compiling else layer_checks.checked)(tensors, of_x)._replace(fan_out=False)
    if residual is not None:
        x, residual = _promoted(x, residual)
        residual = residual.contiguous()
    backend = direct.backend_of(x, task_of_sample, weight, bias, residual)
    apply = mixed_layer_autograd.apply_in_graph if compiling else mixed_layer_autograd.apply
    x = x.contiguous()
    outputs = tuple(apply(x, task_of_sample, weight, bias, residual, call, backend)[: 1 if residual is None else 2])
    if not compiling and recompute_outputs.wanted():
        again = partial(mixed_layer_ops.again, call, backend)
        recompute_outputs.offer(outputs, again, (weight, bias), (x if residual is None else outputs[1], task_of_sample))
    return outputs


def _rows_again(options: LayerOptions, backend: str | None, weight: Tensor, bias: Tensor | None, s: Tensor) -> Tensor:
    return layer_ops.operators(direct.of_later_pass(backend)).layer_norm(s, weight, bias, None, options).y
