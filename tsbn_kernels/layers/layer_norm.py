"""Drop-in modules of layer normalisation: parameters with a leading task axis, no arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tsbn_kernels.definition.layout import Stacking
from tsbn_kernels.definition.plain import leaf_call
from tsbn_kernels.functional import any_rows, normalize_rows
from tsbn_kernels.layers import concurrent, mixing
from tsbn_kernels.layers.task_specific import Tasks, TaskSpecific
from tsbn_kernels.operator import checks, layer_checks, mixed_checks


class TaskRowNorm(TaskSpecific):
    """What layers have in common that normalise the rows of a ``normalized_shape``."""

    _rms: ClassVar[bool] = False
    _plain: ClassVar[Any] = nn.LayerNorm

    normalized_shape: tuple[int, ...]
    eps: float | None
    fan_out: bool

    def __init__(
        self,
        num_tasks: int,
        normalized_shape: int | Sequence[int],
        eps: float | None = 1e-5,
        *,
        gate: Literal["sigmoid", "identity"] = "sigmoid",
        bias: bool | Literal["frozen"] = False,
        stacking: Stacking = "task_major",
        fan_out: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_options(gate, stacking, None)
        checks.check_dtype(dtype)
        checks.check_flag("fan_out", fan_out)
        checks.check_bias(bias)
        self.num_tasks = checks.count("num_tasks", num_tasks)
        self.normalized_shape = layer_checks.normalized_shape(normalized_shape)
        self.eps = eps if eps is None and self._rms else checks.number("eps", eps, 0.0)
        self.gate = gate
        self.stacking = stacking
        self.fan_out = fan_out
        shape = self.num_tasks, *self.normalized_shape
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self._add_bias(bias)
        self.reset_parameters()

    def task(self, index: int) -> nn.Module:
        """The plain ``nn.LayerNorm`` or ``nn.RMSNorm`` of one task, a copy with the same outputs, in the same mode.

        Of a layer whose parameters are distributed over processes, all of these must ask for it.

        Raises:
            IndexError: there is no such task.
            TypeError: ``index`` is no integer.
        """
        has_bias = {} if self._rms else {"bias": self.bias is not None}
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        plain = self._plain(self.normalized_shape, self.eps, **has_bias, **like)
        self._take_row(plain, index)
        return plain  # type: ignore[no-any-return]

    def forward(
        self,
        input: Tensor,
        *,
        tasks: Tasks = None,
        fan_out: bool | None = None,
        task_of_sample: Tensor | None = None,
    ) -> Tensor:
        """Normalises the rows of all streams; returns the same shape.

        Args:
            input: the streams of the tasks in the module's stacking; with ``fan_out`` one input for all of them.
            tasks: indices (a sequence, or int64 ``[K]``; each once) of the tasks whose K streams there are; the
                gradient of the others' gates is zero, which an optimiser with momentum or decay passes by under
                :func:`~tsbn_kernels.hold_absent_tasks` alone. None stands for all T in their order.
            fan_out: overrides the module's own for this call.
            task_of_sample: the input is a mixed batch ``[N, *]`` and has samples of any tasks in any order; int64
                ``[N]`` tells the task of each.
        """
        if not isinstance(input, Tensor):
            return leaf_call(self, input, tasks=tasks, fan_out=fan_out, task_of_sample=task_of_sample)
        return self._call(input, None, tasks, fan_out, False, task_of_sample)[0]

    def add(
        self,
        input: Tensor,
        residual: Tensor,
        *,
        tasks: Tasks = None,
        fan_out: bool | None = None,
        task_of_sample: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Computes ``s = input + residual`` and :meth:`forward` of it, in one pass; returns the latter and s.

        ``residual`` has the shape of ``input``.
        """
        checks.check_tensor("residual", residual)
        y, s = self._call(input, residual, tasks, fan_out, False, task_of_sample)
        return y, s

    def streams(self, input: Tensor, *, tasks: Tasks = None, fan_out: bool | None = None) -> tuple[Tensor, ...]:
        """Computes :meth:`forward`, and returns the streams of the tasks as tensors of their own.

        A backward pass from some of them computes those tasks alone.
        """
        return self._call(input, None, tasks, fan_out, as_streams=True)

    def _call(
        self,
        x: Tensor,
        residual: Tensor | None,
        tasks: Tasks,
        fan_out: bool | None,
        as_streams: bool = False,
        task_of_sample: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Returns y, with a residual the sum too, or the streams."""
        checks.check_tensor("input", x)
        if task_of_sample is not None or (mixing.used and mixing.routed() is not None):
            if as_streams:
                raise ValueError("a mixed batch has no streams; call the layer, and take y[task_of_sample == task]")
            return self._mixed(x, residual, tasks, fan_out, task_of_sample)
        if self._routers:
            tasks, fan_out = self._route(x, tasks, fan_out)
        if fan_out is None:
            fan_out = self.fan_out
        vectors = self._vectors()
        if tasks is not None or self._tasks is not None:
            vectors, tasks = self._own_rows(vectors, tasks)
        weight, bias = vectors
        if tasks is not None:
            weight, bias = (None if vector is None else concurrent.rows(vector, tasks) for vector in vectors)
        passes = None
        if self._participation is not None:
            weight, passes = self._take_part(weight, tasks, own_streams=as_streams)
        options = weight.shape[0], self.eps, self.gate, self.stacking, self._rms, fan_out
        result = normalize_rows((x, weight, bias, residual), options, as_streams)
        if passes is not None and as_streams:
            for index, stream in enumerate(result):
                passes.watch(index, [stream])
        return result

    def _mixed(
        self, x: Tensor, residual: Tensor | None, tasks: Tasks, fan_out: bool | None, index: Tensor | None
    ) -> tuple[Tensor, ...]:
        task_of_sample, routed = self._task_of_sample(x, index)
        mixed_checks.check_alone(tasks=(tasks, None), fan_out=(self.fan_out if fan_out is None else fan_out, False))
        (weight, bias), _ = self._own_rows(self._vectors(), None)
        if self._participation is not None and torch.is_grad_enabled():
            weight = self._participation.take_part_of(weight, task_of_sample, x)
        options = len(weight), self.eps, self.gate, "task_major", self._rms, False
        result = any_rows((x, weight, bias, residual), options, task_of_sample)
        if routed:
            mixing.remember(result[0])
        return result

    def _vectors(self) -> tuple[Any, ...]:
        """Weight and bias; a module's own way to its attributes costs as much as a small layer."""
        own = self._parameters
        if "weight" in own and "bias" in own:
            return own["weight"], own["bias"]
        return self.weight, self.bias  # pruned, parametrized, frozen, or taken by FSDP

    def extra_repr(self) -> str:
        return (
            f"{self.num_tasks}, {self.normalized_shape}, eps={self.eps}, gate={self.gate!r}, "
            + ("" if self._rms else f"bias={self._bias_kind()!r}, ")
            + f"stacking={self.stacking!r}"
            + ", fan_out=True" * self.fan_out
        )


class FusedTSigmaLN(TaskRowNorm):
    """Task-specific (sigmoid) layer normalisation, all tasks in one call.

    ``y[t] = sigmoid(weight[t]) * (x[t] - mean) / sqrt(var + eps) + bias[t]``, with mean and variance of each row of
    ``normalized_shape`` (TS-sigma-LN, arXiv 2512.20420). Where it does not say otherwise it behaves as
    ``nn.LayerNorm``, and its parameters have the same names with a leading task axis: ``weight`` and ``bias`` are
    ``[T, *normalized_shape]``. The state of a plain layer loads too: every task starts from it, with
    ``weight = logit(clip(plain weight))`` behind a sigmoid. Training and evaluation do not differ.

    Args:
        num_tasks: T.
        normalized_shape: the last dimensions of the input, an int or several.
        eps: added to the variance.
        gate: ``"sigmoid"`` (TS-sigma-LN; weight starts at 0, the gates at one half) or ``"identity"`` (TSLN; weight
            starts at 1).
        bias: True (learned), False, or ``"frozen"`` (a buffer, not trained).
        stacking: ``"task_major"`` (what ``torch.cat`` of the streams gives), ``"sample_major"`` (task t of sample n at
            ``n*T + t``) or ``"task_axis"``.
        fan_out: the layer takes one input ``[N, *, *normalized_shape]`` for all tasks, and gives T streams in
            ``stacking``.
        device, dtype: of the parameters.

    Shape:
        ``[T*N, *, *normalized_shape]``, with ``stacking="task_axis"`` ``[T, N, *, *normalized_shape]``, and the output
        likewise; with ``fan_out`` one stream in, T streams out.
    """


class FusedTSigmaRMSNorm(TaskRowNorm):
    """Task-specific (sigmoid) root-mean-square normalisation, all tasks in one call: see :class:`FusedTSigmaLN`.

    ``y[t] = sigmoid(weight[t]) * x[t] / sqrt(mean(x[t]^2) + eps)``. It behaves as ``nn.RMSNorm``: there is no bias, and
    without ``eps`` it is that of the dtype that is computed in.

    Args:
        num_tasks, normalized_shape, gate, stacking, fan_out, device, dtype: as there.
        eps: added to the mean square.
    """

    _rms = True
    _plain = nn.RMSNorm

    def __init__(
        self,
        num_tasks: int,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        *,
        gate: Literal["sigmoid", "identity"] = "sigmoid",
        stacking: Stacking = "task_major",
        fan_out: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_tasks,
            normalized_shape,
            eps,
            gate=gate,
            stacking=stacking,
            fan_out=fan_out,
            device=device,
            dtype=dtype,
        )


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation of the channels of ``[N, C, H, W]``: the plain layer of :class:`FusedTSigmaLN2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(-3, -1)).movedim(-1, -3)


class FusedTSigmaLN2d(FusedTSigmaLN):
    """Task-specific (sigmoid) layer normalisation of channels, as ConvNeXt has it: see :class:`FusedTSigmaLN`.

    An input in ``channels_last`` is read in place, and the output is in that memory format.

    Shape:
        ``[T*N, C, H, W]``, with ``stacking="task_axis"`` ``[T, N, C, H, W]``, and the output likewise;
        ``normalized_shape`` is C.
    """

    _plain = LayerNorm2d

    def task(self, index: int) -> nn.Module:
        """The plain :class:`LayerNorm2d` of one task; see :meth:`FusedTSigmaLN.task`."""
        return super().task(index)

    def _call(
        self,
        x: Tensor,
        residual: Tensor | None,
        tasks: Tasks,
        fan_out: bool | None,
        as_streams: bool = False,
        task_of_sample: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        checks.check_tensor("input", x)
        mixed = task_of_sample is not None or (mixing.used and mixing.routed() is not None)
        shared = mixed or (self.fan_out if fan_out is None else fan_out)
        dims = 4 + (self.stacking == "task_axis" and not shared)
        for name, tensor in (("input", x), ("residual", residual)):
            if tensor is not None and tensor.dim() != dims:
                raise ValueError(
                    f"{type(self).__name__} expected {dims}D {name}, got {tensor.dim()}D {name} of shape "
                    f"{list(tensor.shape)}"
                )
        residual = None if residual is None else residual.movedim(-3, -1)
        outputs = super()._call(x.movedim(-3, -1), residual, tasks, fan_out, as_streams, task_of_sample)
        return tuple(out.movedim(-1, -3) for out in outputs)
