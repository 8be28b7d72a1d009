"""The CelebA network by each method, of one layout and with the same heads."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.network.model import LINEARS, POOL_AFTER, CelebaNetwork, Layout, MakeNorm, norm_of
from benchmarks.records.network_run import VARIANTS
from tsbn_kernels import FusedTSigmaBN1d, FusedTSigmaBN2d


class SingleTasks(nn.Module):
    """T single-task networks, each a ``CelebaNetwork`` of one task with plain BatchNorms.

    They share nothing: their channels lie side by side, the convolutions are grouped, and a BatchNorm of T*C channels
    is T of them. On a CPU that is twice as fast as T networks one after the other.
    """

    def __init__(self, tasks: int, layout: Layout) -> None:
        super().__init__()
        self.tasks = tasks
        channels, features = layout.channels, layout.features
        inputs = (layout.inputs, *channels[:-1])
        groups = (1, *[tasks] * (len(channels) - 1))  # the images are one input for all of them
        self.convolutions = nn.ModuleList(
            nn.Conv2d(group * before, tasks * after, 3, padding=1, bias=False, groups=group)
            for group, before, after in zip(groups, inputs, channels, strict=True)
        )
        bound = features**-0.5  # of nn.Linear
        self.linears = nn.ParameterList(torch.empty(tasks, features, features) for _ in range(LINEARS))
        self.head_weight = nn.Parameter(torch.empty(tasks, features, 1))
        self.head_bias = nn.Parameter(torch.zeros(tasks, 1))
        for weight in (*self.linears, self.head_weight):
            nn.init.uniform_(weight, -bound, bound)
        self.norms = nn.ModuleList(
            [nn.BatchNorm2d(tasks * c) for c in channels] + [nn.BatchNorm1d(tasks * features) for _ in range(LINEARS)]
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[T, N]`` of images ``[N, inputs, H, W]``."""
        x = images
        norms = iter(self.norms)
        for index, convolution in enumerate(self.convolutions):
            x = functional.relu(next(norms)(convolution(x)), inplace=True)
            if index in POOL_AFTER:
                x = functional.max_pool2d(x, 2)
        x = x.mean((2, 3)).unflatten(1, (self.tasks, -1)).transpose(0, 1)  # [T, N, C]
        for weight in self.linears:
            x = (x @ weight).transpose(0, 1).flatten(1)
            x = functional.relu(next(norms)(x)).unflatten(1, (self.tasks, -1)).transpose(0, 1)
        logits: Tensor = (x @ self.head_weight).squeeze(2) + self.head_bias
        return logits


def plain_norm(channels: int, dims: int) -> nn.Module:
    """What hard sharing has: one BatchNorm for all tasks."""
    return nn.BatchNorm2d(channels) if dims == 2 else nn.BatchNorm1d(channels)


def _fused_norm(tasks: int, **options: Any) -> MakeNorm:
    def norm(channels: int, dims: int) -> nn.Module:
        module = FusedTSigmaBN2d if dims == 2 else FusedTSigmaBN1d
        return module(tasks, channels, activation="relu", **options)

    return norm


_FUSED = VARIANTS["and fan-out"]
_LOOP = VARIANTS["loop"]


def ts_sigma_bn(tasks: int, layout: Layout) -> nn.Module:
    """TS-sigma-BN: gates of each task."""
    return CelebaNetwork(tasks, _fused_norm(tasks), tasks, _FUSED, layout)


def tsbn(tasks: int, layout: Layout) -> nn.Module:
    """TSBN: scale and shift of each task."""
    return CelebaNetwork(tasks, _fused_norm(tasks, gate="identity", bias=True), tasks, _FUSED, layout)


def hard_sharing(tasks: int, layout: Layout) -> nn.Module:
    """Everything shared but the heads."""
    return CelebaNetwork(tasks, plain_norm, 1, layout=layout)


def loop(tasks: int, layout: Layout) -> nn.Module:
    """TS-sigma-BN by T BatchNorms in a loop, to be timed against."""
    return CelebaNetwork(tasks, partial(norm_of, _LOOP, tasks), tasks, _LOOP, layout)
