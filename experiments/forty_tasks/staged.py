"""The CelebA network in stages of two layers, in plain PyTorch, and the methods that look between them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.network.model import Layout
from experiments.training.cross_stitch import CrossStitch
from experiments.training.mtan import Features, Mtan, attention
from experiments.training.staged import Staged


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    """A 3x3 convolution, its BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def linear(width: int) -> nn.Sequential:
    """A linear layer, its BatchNorm and ReLU."""
    return nn.Sequential(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True))


class Stage(nn.Module):
    """Two layers, and what follows them: a pooling, the mean over all positions, or nothing."""

    def __init__(self, first: nn.Module, last: nn.Module, end: nn.Module) -> None:
        super().__init__()
        self.first, self.last, self.end = first, last, end

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.end(self.last(self.first(x)))
        return found


class PlainBackbone(Staged):
    """Features ``[N, features]`` of images ``[N, inputs, H, W]``, as ``CelebaNetwork`` has them before its heads.

    The stages are two convolutions each, and the two linear layers. One convolution lies before the first.

    Attributes:
        widths: channels of the first and of the last layer of each stage.
    """

    stages: Any

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        channels, self.features = layout.channels, layout.features
        self.stem = nn.Sequential(convolution(layout.inputs, channels[0]), nn.MaxPool2d(2))
        pairs = [*zip(channels[:-2:2], channels[1::2], channels[2::2], strict=True)]
        ends = [*(nn.MaxPool2d(2) for _ in pairs[1:]), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())]
        self.stages = nn.ModuleList(
            Stage(convolution(before, middle), convolution(middle, after), end)
            for (before, middle, after), end in zip(pairs, ends, strict=True)
        )
        self.stages.append(Stage(linear(self.features), linear(self.features), nn.Identity()))
        self.count = len(self.stages)
        self.widths = [(middle, after) for _, middle, after in pairs] + [(self.features, self.features)]

    def run_stage(self, index: int, x: Tensor, kept: list[Tensor]) -> Tensor:
        """Runs a stage, the first with what is before it; nothing is kept for another one."""
        found: Tensor = self.stages[index](self.stem(x) if index == 0 else x)
        return found


def heads(tasks: int, features: int) -> dict[str, nn.Module]:
    """A linear layer for each task, which begins without a bias."""
    found = {f"task{task}": nn.Linear(features, 1) for task in range(tasks)}
    for head in found.values():
        nn.init.zeros_(head.bias)
    return dict(found)


class Logits(nn.Module):
    """Logits ``[T, N]`` of a network that gives ``[N, 1]`` by the tasks' names."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([*self.network(images).values()], 1).T


class MtanConvolutional(Mtan):
    """MTAN on the backbone's stages: their second layer is masked by what the first gives."""

    def __init__(self, backbone: PlainBackbone, tasks: int) -> None:
        found = heads(tasks, backbone.features)
        super().__init__(backbone, {name: nn.Sequential(nn.Flatten(), head) for name, head in found.items()})
        widths = backbone.widths
        self.between = nn.ModuleList(convolution(after, middle) for (_, after), (middle, _) in pairwise(widths))
        self.masks = nn.ModuleDict(
            {
                name: nn.ModuleList(
                    attention(middle * (1 if stage == 0 else 2), middle, after)
                    for stage, (middle, after) in enumerate(widths)
                )
                for name in found
            }
        )

    def masks_of(self, task: str) -> list[nn.Module]:
        return [*self.masks[task].children()]

    def hand_on(self, stage: int, y: Tensor) -> Tensor:
        return _with_positions(self.backbone.stages[stage].end(self.between[stage](y)))

    def features(self, images: Tensor) -> list[Features]:
        found: list[Features] = []
        x = self.backbone.stem(images)
        for stage in self.backbone.stages:
            first = stage.first(x)
            last = stage.last(first)
            x = stage.end(last)
            found.append((_with_positions(first), _with_positions(last)))
        return found


def _with_positions(x: Tensor) -> Tensor:
    """Features ``[N, C]`` as ``[N, C, 1, 1]``."""
    return x[..., None, None] if x.dim() == 2 else x


def cross_stitch(tasks: int, layout: Layout) -> nn.Module:
    """T backbones, whose stages mix."""
    return Logits(CrossStitch([PlainBackbone(layout) for _ in range(tasks)], heads(tasks, layout.features)))


def mtan(tasks: int, layout: Layout) -> nn.Module:
    """One backbone, and masks of each task on its stages."""
    return Logits(MtanConvolutional(PlainBackbone(layout), tasks))
