"""The peers of other packages, where these are installed: kernels of apex and of inplace_abn on the folded form, and of
Liger in the loop of layer normalisations.

Their layers have a weight where ours has a gate: its sigmoid is given to them at every step.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.layers.cases import Case, Inputs
from benchmarks.layers.peer import EPS, Peer
from benchmarks.layers.peers import MOMENTUM, SLOPE, BatchNormOutcome, Folded
from benchmarks.layers.peers_layer_norm import LoopOfLayerNorms
from benchmarks.records.workloads import NO_ACTIVATION


def _found(module: str, name: str) -> tuple[Any, str | None]:
    """What an installed module calls so; or else why there is none: the package may be missing, or built without it."""
    package = module.partition(".")[0]
    if find_spec(package) is None:
        return None, f"{package} is not installed"
    try:
        return getattr(import_module(module), name), None
    except Exception as error:  # whatever a broken build raises
        return None, f"the installed {package} has no {module}.{name}: {error}"


class _Apex(Folded):
    """A layer of apex on ``[N, H, W, T*C]``: how its NHWC kernels take what is in channels_last."""

    source: ClassVar[tuple[str, str]]  # module and name
    dtypes: ClassVar[tuple[str, ...]]

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        self.x, self.dy = self.x.detach().permute(0, 2, 3, 1).requires_grad_(), self.dy.permute(0, 2, 3, 1)
        self.module = self.layer(_found(*self.source)[0], case.activation == "relu").to(case.device)
        self.module.bias.requires_grad_(False)
        del self.module.weight  # no parameter, but what a step puts there

    def layer(self, kind: Any, relu: bool) -> Any:
        """A module of this kind, its weight, bias and statistics in float32."""
        raise NotImplementedError

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        return _found(*cls.source)[1] if device.type == "cuda" else "apex runs on CUDA alone"

    @classmethod
    def unsupported(cls, case: Case) -> str | None:
        if case.memory_format != "channels_last":
            return "it takes channels_last alone"
        if case.dtype not in cls.dtypes:
            return f"it takes {' and '.join(cls.dtypes)} alone"
        return None if case.activation in (NO_ACTIVATION, "relu") else "of the activations it knows ReLU alone"

    def forward(self) -> Tensor:
        self.module.weight = torch.sigmoid(self.gamma)
        return self.module(self.x)  # type: ignore[no-any-return]

    def statistics(self) -> tuple[Tensor, Tensor]:
        shape = self.tasks, self.channels
        return self.module.running_mean.view(shape), self.module.running_var.view(shape)

    def task_major(self, tensor: Tensor) -> Tensor:
        return super().task_major(tensor.permute(0, 3, 1, 2))


class ApexGroupBN(_Apex):
    """``apex.contrib.groupbn.BatchNorm2d_NHWC`` on one process. Its eps and momentum are ours, and cannot be set."""

    name = "apex_groupbn"
    source = "apex.contrib.groupbn", "BatchNorm2d_NHWC"
    dtypes = ("float16",)

    def layer(self, kind: Any, relu: bool) -> Any:
        return kind(self.tasks * self.channels, fuse_relu=relu)


class ApexSyncBN(_Apex):
    """``apex.parallel.SyncBatchNorm`` on one process; apex had it until 2025."""

    name = "apex_syncbn"
    source = "apex.parallel", "SyncBatchNorm"
    dtypes = ("float32", "float16")

    def layer(self, kind: Any, relu: bool) -> Any:
        return kind(self.tasks * self.channels, EPS, MOMENTUM, channel_last=True, fuse_relu=relu)


class _Overwritable(torch.autograd.Function):
    """Gives a leaf's memory as no leaf: like the output of a convolution it may be overwritten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


class InPlaceABN(Folded):
    """``inplace_abn``: it writes y over x, so that from the second step on its x is the y of the step before."""

    name = "inplace_abn"
    source = "inplace_abn.functions", "inplace_abn"
    activations: ClassVar[dict[str, str]] = {NO_ACTIVATION: "identity", "leaky_relu": "leaky_relu"}

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        self.values = self.x.detach()
        self.x = self.values.clone().requires_grad_()
        self.function, _ = _found(*self.source)
        self.bias = torch.zeros_like(self.running_mean)
        self.step_function = self._step

    def _step(self, x: Tensor, gamma: Tensor, running_mean: Tensor, running_var: Tensor, activation: str) -> Tensor:
        weight = torch.sigmoid(gamma) - EPS  # to whose absolute value it adds eps
        vectors = weight, self.bias, running_mean, running_var
        options = True, MOMENTUM, EPS, self.activations[activation], SLOPE
        return self.function(_Overwritable.apply(x), *vectors, *options)  # type: ignore[no-any-return]

    def step(self) -> BatchNormOutcome:
        """One forward and backward on the case's values, which an earlier step has overwritten."""
        with torch.no_grad():
            self.x.copy_(self.values)
        return super().step()

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        return _found(*cls.source)[1]

    @classmethod
    def unsupported(cls, case: Case) -> str | None:
        if case.memory_format == "channels_last":
            return "it takes contiguous input alone"
        if case.dtype == "bfloat16" or (case.dtype == "float16" and case.device.type == "cpu"):
            return f"it takes no {case.dtype} on {case.device.type}"
        if case.activation not in cls.activations:
            return f"of the activations it knows {', '.join(cls.activations)}"
        return None


class _LigerNorm(nn.Module):
    """One task's layer normalisation by Liger, with sigmoid(weight) as its weight and a bias of zeros."""

    def __init__(self, function: Any, gamma: Tensor) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(gamma.clone())
        self.register_buffer("bias", torch.zeros_like(gamma))

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x, torch.sigmoid(self.weight), self.bias, EPS)  # type: ignore[no-any-return]


class Liger(LoopOfLayerNorms):
    """The loop with ``LigerLayerNormFunction`` for the layer normalisation of each task."""

    name = "liger"
    source = "liger_kernel.ops.layer_norm", "LigerLayerNormFunction"

    def one(self, case: Case, gamma: Tensor) -> nn.Module:
        return _LigerNorm(_found(*self.source)[0], gamma)

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        return "Liger's kernels run on GPUs alone" if device.type == "cpu" else _found(*cls.source)[1]

    @classmethod
    def unsupported(cls, case: Case) -> str | None:
        return "it computes in float32 alone" if case.dtype == "float64" else None


INSTALLED: tuple[type[Peer], ...] = (ApexGroupBN, ApexSyncBN, InPlaceABN, Liger)
