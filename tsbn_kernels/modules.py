"""Drop-in modules: parameters and running statistics with a leading task axis, no arithmetic."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tsbn_kernels.functional import GATES, task_batch_norm


class _TaskBatchNorm(nn.Module):
    _stacked_dims: ClassVar[tuple[int, ...]]  # of [T*N, C, *] inputs; one more is [T, N, C, *]
    _plain: ClassVar[type[nn.Module]]

    num_batches_tracked: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    bias: Tensor | None

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_tasks", num_tasks), ("num_features", num_features)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)}, got {gate!r}")
        if bias not in (True, False, "frozen"):
            raise ValueError(f"bias must be True, False or 'frozen', got {bias!r}")
        if stacking not in ("task_major", "sample_major"):
            raise ValueError(f"stacking must be 'task_major' or 'sample_major', got {stacking!r}")
        self.num_tasks = num_tasks
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.gate = gate
        self.stacking = stacking
        self.track_running_stats = track_running_stats
        shape = (num_tasks, num_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias == "frozen":
            self.register_buffer("bias", torch.empty(shape, device=device, dtype=dtype))
        elif bias:
            self.bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        statistics: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if track_running_stats:
            statistics = (
                torch.zeros(shape, device=device, dtype=dtype),
                torch.ones(shape, device=device, dtype=dtype),
                torch.zeros(num_tasks, device=device, dtype=torch.long),
            )
        for name, tensor in zip(("running_mean", "running_var", "num_batches_tracked"), statistics, strict=True):
            self.register_buffer(name, tensor)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Running mean 0, running variance 1, no batches seen."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Gates of one half (sigmoid of 0), or of one (identity); biases 0."""
        self.reset_running_stats()
        nn.init.constant_(self.weight, 0.0 if self.gate == "sigmoid" else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def gates(self) -> Tensor:
        """The factors of the normalised activation, ``[T, C]``: ``sigmoid(weight)``, or ``weight`` itself."""
        return torch.sigmoid(self.weight) if self.gate == "sigmoid" else self.weight

    def task(self, index: int) -> nn.Module:
        """The plain ``nn.BatchNorm`` of one task, a copy with the same outputs, in the same mode.

        Raises:
            IndexError: there is no such task.
        """
        if not -self.num_tasks <= index < self.num_tasks:
            raise IndexError(f"task {index} is out of range for num_tasks={self.num_tasks}")
        plain: Any = self._plain(
            self.num_features,
            eps=self.eps,
            momentum=self.momentum,
            track_running_stats=self.track_running_stats,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        with torch.no_grad():
            plain.weight.copy_(self.gates[index])
            if self.bias is not None:
                plain.bias.copy_(self.bias[index])
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                if (buffer := getattr(self, name)) is not None:
                    getattr(plain, name).copy_(buffer[index])
        plain.bias.requires_grad_(isinstance(self.bias, nn.Parameter) and self.bias.requires_grad)
        return plain.train(self.training)  # type: ignore[no-any-return]

    def _stacking_of(self, x: Tensor) -> str:
        if x.dim() in self._stacked_dims:
            return self.stacking
        if x.dim() == self._stacked_dims[-1] + 1:
            return "task_axis"
        expected = " or ".join(f"{dims}D" for dims in (*self._stacked_dims, self._stacked_dims[-1] + 1))
        raise ValueError(
            f"{type(self).__name__} expected {expected} input, the last with a leading task axis, "
            f"got {x.dim()}D input of shape {list(x.shape)}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``[T*N, C, *]`` in the module's stacking, or ``[T, N, C, *]``; returns the same shape."""
        stacking = self._stacking_of(x)
        tracking = self.training and self.track_running_stats
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if tracking and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative average
                momentum = 1.0 / self.num_batches_tracked.unsqueeze(1)
        keeps_statistics = not self.training or self.track_running_stats
        return task_batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean if keeps_statistics else None,
            self.running_var if keeps_statistics else None,
            num_tasks=self.num_tasks,
            training=self.training or self.running_mean is None,
            momentum=momentum,
            eps=self.eps,
            gate=self.gate,
            stacking=stacking,
        )

    def extra_repr(self) -> str:
        bias = "frozen" if self.bias is not None and not isinstance(self.bias, nn.Parameter) else self.bias is not None
        return (
            f"{self.num_tasks}, {self.num_features}, eps={self.eps}, momentum={self.momentum}, gate={self.gate!r}, "
            f"bias={bias!r}, stacking={self.stacking!r}, track_running_stats={self.track_running_stats}"
        )


_DOC = """Task-specific (sigmoid) batch normalisation of {dims}-dimensional streams, all tasks in one call.

    ``y[t] = sigmoid(weight[t]) * (x[t] - mean[t]) / sqrt(var[t] + eps) + bias[t]`` per channel, with statistics of each
    task's own (TS-sigma-BN, arXiv 2512.20420, eq. 3). Where it does not say otherwise it behaves as ``nn.{plain}``,
    and its parameters and buffers have the same names with a leading task axis: ``weight``, ``bias``,
    ``running_mean`` and ``running_var`` are ``[T, C]``, ``num_batches_tracked`` is ``[T]``.

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
        device, dtype: of the parameters and buffers.

    Shape:
        {shape}, and the output likewise.
    """


class FusedTSigmaBN1d(_TaskBatchNorm):
    __doc__ = _DOC.format(dims="0 or 1", plain="BatchNorm1d", shape="``[T*N, C]``, ``[T*N, C, L]`` or ``[T, N, C, L]``")
    _stacked_dims = (2, 3)
    _plain = nn.BatchNorm1d


class FusedTSigmaBN2d(_TaskBatchNorm):
    __doc__ = _DOC.format(dims="2", plain="BatchNorm2d", shape="``[T*N, C, H, W]`` or ``[T, N, C, H, W]``")
    _stacked_dims = (4,)
    _plain = nn.BatchNorm2d


class FusedTSigmaBN3d(_TaskBatchNorm):
    __doc__ = _DOC.format(dims="3", plain="BatchNorm3d", shape="``[T*N, C, D, H, W]`` or ``[T, N, C, D, H, W]``")
    _stacked_dims = (5,)
    _plain = nn.BatchNorm3d
