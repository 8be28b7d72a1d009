"""Multi-Task Attention Networks (Liu, Johns, Davison, CVPR 2019): a shared backbone, and masks of each task on it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Features = tuple[Tensor, Tensor]  # of a stage: what its masks are made of, and what they mask


def attention(inputs: int, middle: int, outputs: int) -> nn.Sequential:
    """A mask in (0, 1): two 1x1 convolutions with BatchNorms, ReLU and sigmoid."""
    return nn.Sequential(
        nn.Conv2d(inputs, middle, 1),
        nn.BatchNorm2d(middle),
        nn.ReLU(),
        nn.Conv2d(middle, outputs, 1),
        nn.BatchNorm2d(outputs),
        nn.Sigmoid(),
    )


class Mtan(nn.Module):
    """MTAN on a backbone: of each stage a task masks the last features, and hands them on to its next mask.

    A subclass makes the masks, looks into its backbone, and has the layers that tasks share between two masks.

    Args:
        backbone: that all tasks share.
        heads: of the tasks, by their names.
    """

    backbone: Any
    heads: Any

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, nn.ModuleDict(heads)

    @abstractmethod
    def features(self, images: Tensor) -> list[Features]:
        """Runs the backbone."""

    @abstractmethod
    def masks_of(self, task: str) -> Sequence[nn.Module]:
        """The masks of a task, one for each stage."""

    @abstractmethod
    def hand_on(self, stage: int, y: Tensor) -> Tensor:
        """What a task's masked features of a stage, not the last, are beside the features of the next one."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Predictions by the tasks' names."""
        features = self.features(images)
        found = {}
        for name, head in self.heads.items():
            y: Tensor | None = None
            for stage, ((first, last), mask) in enumerate(zip(features, self.masks_of(name), strict=True)):
                inputs = first if y is None else torch.cat([first, self.hand_on(stage - 1, y)], 1)
                y = mask(inputs) * last
            found[name] = head(y)
        return found
