"""Drop-in modules: parameters and running statistics with a leading task axis, no arithmetic."""

from __future__ import annotations

import sys
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tsbn_kernels.definition.activations import EPILOGUES, NONE, Name, as_module
from tsbn_kernels.definition.options import Running
from tsbn_kernels.definition.plain import leaf_call
from tsbn_kernels.functional import normalize, normalize_mixed
from tsbn_kernels.layers import concurrent, mixing
from tsbn_kernels.layers.task_specific import Tasks, TaskSpecific
from tsbn_kernels.operator import autograd_synchronized, checks, mixed_checks, runs

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_VECTORS = ("weight", "bias", *STATISTICS)
_UNTRACKED = Running()
_LATER_OPTIONS = {
    "activation": None,
    "negative_slope": 0.01,
    "fan_out": False,
    "recover_input": False,
    "_process_group": None,
    "evaluate_single": False,
}


# A _BatchNorm by class, for torch.optim.swa_utils.update_bn, FSDP's mixed precision and users' own loops look for that.
class FusedTSigmaBN(TaskSpecific, _BatchNorm):
    """Task-specific (sigmoid) batch normalisation of streams of any dimensions, all tasks in one call.

    ``y[t] = sigmoid(weight[t]) * (x[t] - mean[t]) / sqrt(var[t] + eps) + bias[t]`` per channel, with statistics of each
    task's own (TS-sigma-BN, arXiv 2512.20420, eq. 3). Where it does not say otherwise it behaves as ``nn.BatchNorm2d``
    (``nn.SyncBatchNorm`` where it has a process group), and its parameters and buffers have the same names with a
    leading task axis: ``weight``, ``bias``, ``running_mean`` and ``running_var`` are ``[T, C]``,
    ``num_batches_tracked`` is ``[T]``. The state of a plain layer loads too: every task starts from it, with
    ``weight = logit(clip(plain weight))`` behind a sigmoid.

    Args:
        num_tasks: T.
        num_features: C.
        eps: added to the variance.
        momentum: share of the batch in the running statistics; None is the cumulative average.
        gate: ``"sigmoid"`` (TS-sigma-BN; weight starts at 0, the gates at one half) or ``"identity"`` (TSBN; weight
            starts at 1).
        bias: True (learned), False, or ``"frozen"`` (a buffer, not trained).
        stacking: of ``[T*N, C, *]`` inputs: ``"task_major"`` (what ``torch.cat`` of the streams gives) or
            ``"sample_major"`` (task t of sample n at ``n*T + t``).
        track_running_stats: keep running statistics; without them evaluation uses the batch's.
        activation: what follows in the same pass: None, or one of
            :data:`tsbn_kernels.definition.activations.ACTIVATIONS`, such as ``"relu"``. A residual that ``forward`` is
            given is added before it.
        negative_slope: of the leaky ReLU.
        fan_out: the layer takes one input ``[N, C, *]`` for all tasks, and gives T streams in ``stacking``.
        recover_input: save the output in place of the input for the backward pass
            (:mod:`tsbn_kernels.operator.recover_input`).
        process_group: in training mode, synchronise the statistics over the ranks of a
            ``torch.distributed.ProcessGroup``, or over all (``"world"``), as ``nn.SyncBatchNorm`` does. None: do not.
            Copies of the layer share the group.
        evaluate_single: in training, a task of a mixed batch that has one value per channel is normalised by its
            running statistics, which stay, as in evaluation. False: that is an error.
        device, dtype: of the parameters and buffers.

    Shape:
        ``[T*N, C, *]``, and the output likewise; with ``fan_out`` one stream in, T streams out.
    """

    _stacked_dims: ClassVar[tuple[int, ...]] = ()  # of [T*N, C, *] inputs, one more is [T, N, C, *]; empty: any
    _plain: ClassVar[type[nn.Module]] = nn.SyncBatchNorm

    stacking: Literal["task_major", "sample_major"]
    num_batches_tracked: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    bias: Tensor | None  # type: ignore[assignment]
    _plain_vectors = ("weight", "bias", "running_mean", "running_var")
    _plain_counts = ("num_batches_tracked",)

    def __init__(
        self,
        num_tasks: int,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        gate: Literal["sigmoid", "identity"] = "sigmoid",
        bias: bool | Literal["frozen"] = False,
        stacking: Literal["task_major", "sample_major"] = "task_major",
        track_running_stats: bool = True,
        activation: Name | None = None,
        negative_slope: float = 0.01,
        fan_out: bool = False,
        recover_input: bool = False,
        process_group: autograd_synchronized.GroupLike = None,
        evaluate_single: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # the parameters and buffers of the plain layer have other shapes
        num_tasks, num_features = checks.count("num_tasks", num_tasks), checks.count("num_features", num_features)
        eps, negative_slope = checks.number("eps", eps, 0.0), checks.number("negative_slope", negative_slope)
        momentum = None if momentum is None else checks.number("momentum", momentum)
        checks.check_options(gate, stacking, activation)
        checks.check_dtype(dtype)
        flags = {
            "track_running_stats": track_running_stats,
            "fan_out": fan_out,
            "recover_input": recover_input,
            "evaluate_single": evaluate_single,
        }
        for name, flag in flags.items():
            checks.check_flag(name, flag)
        if evaluate_single and not track_running_stats:
            raise ValueError("evaluate_single=True needs running statistics; use track_running_stats=True with it")
        checks.check_bias(bias)
        checks.check_layer_stacking(stacking)
        if recover_input:
            checks.check_recovery(activation, negative_slope, fan_out, process_group is not None)
        self.num_tasks = num_tasks
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.gate = gate
        self.stacking = stacking
        self.track_running_stats = track_running_stats
        self.activation = activation
        self.negative_slope = negative_slope
        self.fan_out = fan_out
        self.recover_input = recover_input
        self.process_group = process_group
        self.evaluate_single = evaluate_single

        self.weight = nn.Parameter(torch.empty((num_tasks, num_features), device=device, dtype=dtype))
        self._add_bias(bias)
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.empty_like(self.weight.detach()) if track_running_stats else None)
        batches = torch.empty(num_tasks, device=device, dtype=torch.long) if track_running_stats else None
        self.register_buffer("num_batches_tracked", batches)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Sets the running mean to 0 and the running variance to 1, as if no batch had been seen."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Sets the gates to one half (sigmoid of 0) or to one (identity), and the biases to 0."""
        self.reset_running_stats()
        super().reset_parameters()

    @property
    def affine(self) -> bool:  # type: ignore[override]
        """True: the layer has a weight, as ``nn.BatchNorm`` says it.

        Raises:
            TypeError: a ``convert_sync_batchnorm`` asks, which would put one plain layer in the place of T. PyTorch's
                own knows better (:mod:`tsbn_kernels.models.sync_conversion`); timm has one of its own.
        """
        if sys._getframe(1).f_code.co_name == "convert_sync_batchnorm":
            raise TypeError(
                f"{type(self).__name__} has the statistics of {self.num_tasks} tasks, and cannot become one plain "
                f"SyncBatchNorm; call torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) or, for task-specific "
                f"layers alone, tsbn_kernels.convert_sync_batchnorm(model)"
            )
        return True

    @property
    def process_group(self) -> autograd_synchronized.GroupLike:
        """What the statistics are synchronised over: a process group, ``"world"`` or None."""
        group = self._process_group
        return group.group if isinstance(group, autograd_synchronized.SharedGroup) else group

    @process_group.setter
    def process_group(self, group: autograd_synchronized.GroupLike) -> None:
        self._process_group = group if group is None or group == "world" else autograd_synchronized.SharedGroup(group)

    def task(self, index: int) -> nn.Module:
        """The plain ``nn.BatchNorm`` of one task, a copy with the same outputs, in the same mode.

        Where the layer has an activation it is ``nn.Sequential`` of the ``nn.BatchNorm`` and the activation. Of a layer
        whose parameters are distributed over processes, all of these must ask for it.

        Raises:
            IndexError: there is no such task.
            TypeError: ``index`` is no integer.
        """
        plain: Any = self._plain(
            self.num_features,
            eps=self.eps,
            momentum=self.momentum,
            track_running_stats=self.running_mean is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        plain.track_running_stats = self.track_running_stats
        if isinstance(plain, nn.SyncBatchNorm) and self.process_group != "world":  # which is its default
            plain.process_group = self.process_group
        self._take_row(plain, index, *STATISTICS)
        if self.activation is not None:
            plain = nn.Sequential(plain, as_module(self.activation, self.negative_slope)).train(self.training)
        return plain  # type: ignore[no-any-return]

    def _stacking_of(self, x: Tensor, fan_out: bool) -> str:
        if not self._stacked_dims or x.dim() in self._stacked_dims:
            return self.stacking
        if x.dim() == self._stacked_dims[-1] + 1 and not fan_out:
            return "task_axis"
        checks.check_tensor("input", x)  # a nested one has no shape to be told
        dims = self._stacked_dims if fan_out else (*self._stacked_dims, self._stacked_dims[-1] + 1)
        expected = " or ".join(f"{d}D" for d in dims)
        explained = " for all tasks" if fan_out else ", the last with a leading task axis"
        raise ValueError(
            f"{type(self).__name__} expected {expected} input{explained}, got {x.dim()}D input of shape {list(x.shape)}"
        )

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        tasks: Tasks = None,
        fan_out: bool | None = None,
        task_of_sample: Tensor | None = None,
    ) -> Tensor:
        """Normalises ``[T*N, C, *]`` in the module's stacking, or ``[T, N, C, *]``; returns the same shape.

        Args:
            input: the streams of the tasks; with ``fan_out`` one input ``[N, C, *]`` for all of them.
            residual: added before the activation, in the shape of the result.
            tasks: indices (a sequence, or int64 ``[K]``; each once) of the tasks whose K streams there are; the
                statistics of the others are left alone, and the gradient of their gates is zero, which an optimiser
                with momentum or decay passes by under :func:`~tsbn_kernels.hold_absent_tasks` alone. None stands for
                all T in their order.
            fan_out: overrides the module's own for this call.
            task_of_sample: the input is a mixed batch ``[N, C, *]`` and has samples of any tasks in any order; int64
                ``[N]`` tells the task of each. Tasks without a sample are left alone as those that ``tasks`` leaves
                out. The whole input is kept for the backward pass, ``recover_input`` or not.
        """
        if task_of_sample is not None or (mixing.used and mixing.routed() is not None):
            return self._mixed(input, residual, tasks, fan_out, task_of_sample)
        y: Tensor
        (y,) = self._call(False, input, residual, tasks, fan_out)
        return y

    def streams(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        tasks: Tasks = None,
        fan_out: bool | None = None,
    ) -> tuple[Tensor, ...]:
        """Computes :meth:`forward`, and returns the streams ``[N, C, *]`` of the tasks as tensors of their own.

        A backward pass from some of them computes those tasks alone: see :func:`functional.task_streams`.
        """
        if mixing.used and mixing.routed() is not None:
            raise ValueError("a mixed batch has no streams; call the layer, and take y[task_of_sample == task]")
        return tuple(self._call(True, input, residual, tasks, fan_out))

    def _call(self, as_streams: bool, x: Tensor, residual: Tensor | None, tasks: Tasks, fan_out: bool | None) -> Any:
        if not isinstance(x, Tensor):
            if as_streams:
                checks.check_tensor("input", x)
            return (leaf_call(self, x, residual=residual, tasks=tasks, fan_out=fan_out),)
        if self._routers:
            tasks, fan_out = self._route(x, tasks, fan_out)
        if fan_out is None:
            fan_out = self.fan_out
        else:
            checks.check_flag("fan_out", fan_out)
        stacking = self._stacking_of(x, fan_out)
        vectors = self._vectors()
        if tasks is not None or self._tasks is not None:
            vectors, tasks = self._own_rows(vectors, tasks)
        weight, bias, running_mean, running_var, num_batches_tracked = vectors
        training = self.training
        tracked = training and self.track_running_stats and not runs.is_repetition()
        running = _UNTRACKED
        if tracked:
            momentum = 0.0 if self.momentum is None and num_batches_tracked is None else self.momentum
            running = Running(running_mean, running_var, num_batches_tracked, momentum, tasks)
        if training and (tasks is not None or not tracked):  # not read, and updated, if at all, by their rows
            running_mean = running_var = None
        if tasks is not None:
            weight, bias, running_mean, running_var = (
                None if vector is None else concurrent.rows(vector, tasks)
                for vector in (weight, bias, running_mean, running_var)
            )
        passes = None
        if self._participation is not None:
            weight, passes = self._take_part(weight, tasks, own_streams=as_streams)
        tensors = x, weight, bias, running_mean, running_var, residual
        of_batch = training or running_mean is None
        arithmetic = self.eps, self.gate, stacking, self.activation, self.negative_slope
        settings = weight.shape[0], of_batch, *arithmetic, fan_out, self.recover_input
        group = self.process_group if training else None
        result = normalize(tensors, settings, running, group, as_streams)
        if passes is not None and as_streams:
            for index, stream in enumerate(result):
                passes.watch(index, [stream])
        return result

    def _mixed(
        self, x: Tensor, residual: Tensor | None, tasks: Tasks, fan_out: bool | None, index: Tensor | None
    ) -> Tensor:
        if not isinstance(x, Tensor):
            return leaf_call(self, x, residual=residual, fan_out=fan_out, task_of_sample=index)
        task_of_sample, routed = self._task_of_sample(x, index)
        fan_out = self.fan_out if fan_out is None else fan_out
        if fan_out or tasks is not None:
            mixed_checks.check_alone(tasks=(tasks, None), fan_out=(fan_out, False))
        if self._stacking_of(x, False) == "task_axis":
            raise ValueError(f"a mixed batch has no task axis; got input of shape {list(x.shape)} and task_of_sample")
        vectors = self._vectors()
        if self._tasks is not None:
            vectors, _ = self._own_rows(vectors, None)
        weight, bias, running_mean, running_var, num_batches_tracked = vectors
        training = self.training
        running = _UNTRACKED
        if training and self.track_running_stats and not runs.is_repetition():
            momentum = 0.0 if self.momentum is None and num_batches_tracked is None else self.momentum
            running = Running(running_mean, running_var, num_batches_tracked, momentum)
        if self._participation is not None and torch.is_grad_enabled():
            weight = self._participation.take_part_of(weight, task_of_sample, x)
        of_batch = training or running_mean is None
        arithmetic = self.eps, self.gate, "task_major", self.activation, self.negative_slope
        y = normalize_mixed(
            (x, weight, bias, running_mean, running_var, residual),
            task_of_sample,
            (weight.shape[0], of_batch, *arithmetic, False, False),
            running,
            self.process_group if training else None,
            self.evaluate_single,
        )
        if routed:
            mixing.remember(y)
        return y

    def _vectors(self) -> tuple[Any, ...]:
        """Parameters and statistics ``[T, C]``; a module's own way to its attributes costs as much as a small layer."""
        own, buffers = self._parameters, self._buffers
        if "weight" in own and "bias" in own and "running_mean" in buffers:
            statistics = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
            return own["weight"], own["bias"], *statistics
        return tuple(getattr(self, name) for name in _VECTORS)  # pruned, parametrized, frozen, or taken by FSDP

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes pickles from before the layer had all of its options."""
        super().__setstate__({**_LATER_OPTIONS, **state})  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return (
            f"{self.num_tasks}, {self.num_features}, eps={self.eps}, momentum={self.momentum}, gate={self.gate!r}, "
            f"bias={self._bias_kind()!r}, stacking={self.stacking!r}, track_running_stats={self.track_running_stats}"
            + (f", activation={self.activation!r}" if self.activation else "")
            + (f", negative_slope={self.negative_slope}" if EPILOGUES[self.activation or NONE].sloped else "")
            + ", fan_out=True" * self.fan_out
            + ", recover_input=True" * self.recover_input
            + (f", process_group={self.process_group!r}" if self.process_group is not None else "")
            + ", evaluate_single=True" * self.evaluate_single
        )


class FusedTSigmaBN1d(FusedTSigmaBN):
    """Task-specific (sigmoid) batch normalisation of 0 or 1-dimensional streams: see :class:`FusedTSigmaBN`.

    Shape:
        ``[T*N, C]``, ``[T*N, C, L]`` or ``[T, N, C, L]``, and the output likewise.
    """

    _stacked_dims = (2, 3)
    _plain = nn.BatchNorm1d


class FusedTSigmaBN2d(FusedTSigmaBN):
    """Task-specific (sigmoid) batch normalisation of 2-dimensional streams: see :class:`FusedTSigmaBN`.

    Shape:
        ``[T*N, C, H, W]`` or ``[T, N, C, H, W]``, and the output likewise.
    """

    _stacked_dims = (4,)
    _plain = nn.BatchNorm2d


class FusedTSigmaBN3d(FusedTSigmaBN):
    """Task-specific (sigmoid) batch normalisation of 3-dimensional streams: see :class:`FusedTSigmaBN`.

    Shape:
        ``[T*N, C, D, H, W]`` or ``[T, N, C, D, H, W]``, and the output likewise.
    """

    _stacked_dims = (5,)
    _plain = nn.BatchNorm3d
