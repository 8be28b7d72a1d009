"""Multi-Task Attention Networks (Liu, Johns, Davison, CVPR 2019): a shared backbone, and masks of each task on it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.dense_tasks.deeplab import EXPANSION, Bottleneck, DilatedResNet
from experiments.dense_tasks.segnet import Down, SegNet, Up, convolution


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


def _modules(found: nn.Module) -> list[nn.Module]:
    """What a ``ModuleList`` has that a ``ModuleDict`` gave."""
    return list(found.children())


class MtanSegNet(nn.Module):
    """MTAN on SegNet: each stage's second features, masked, go on to the task's next mask through what tasks share.

    Args:
        backbone: whose stages are looked into.
        heads: of the tasks, by their names.
    """

    def __init__(self, backbone: SegNet, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, nn.ModuleDict(heads)
        channels = backbone.channels
        before = (channels[0], *channels[:-1])  # what the decoder's stages return
        after = (*channels[1:], channels[-1])
        self.down = nn.ModuleList(convolution(c, n) for c, n in zip(channels, after, strict=True))
        self.up = nn.ModuleList(convolution(c, b) for c, b in reversed([*zip(channels, before, strict=True)]))
        self.down_masks, self.up_masks = nn.ModuleDict(), nn.ModuleDict()
        for name in heads:
            self.down_masks[name] = nn.ModuleList(
                attention(c if level == 0 else 2 * c, c, c) for level, c in enumerate(channels)
            )
            self.up_masks[name] = nn.ModuleList(
                attention(c + b, b, b) for c, b in reversed([*zip(channels, before, strict=True)])
            )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        downs, ups = self._features(images)
        found = {}
        for name, head in self.heads.items():
            y: Tensor | None = None
            for (first, last), mask, shared in zip(downs, _modules(self.down_masks[name]), self.down, strict=True):
                masked = mask(first if y is None else torch.cat([first, y], 1)) * last
                y = functional.max_pool2d(shared(masked), 2)
            for (first, last), mask, shared in zip(ups, _modules(self.up_masks[name]), self.up, strict=True):
                assert y is not None
                y = shared(functional.interpolate(y, first.shape[-2:], mode="bilinear", align_corners=True))
                y = mask(torch.cat([first, y], 1)) * last
            found[name] = head(y)
        return found

    def _features(self, images: Tensor) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """What masks are made of and what they mask, in each stage of the encoder and of the decoder."""
        downs, ups, kept, x = [], [], [], images
        for stage in self.backbone.stages:
            if isinstance(stage, Down):
                first = stage.first(x)
                last = stage.rest(first)
                x, indices = stage.pool(last)
                kept.append(indices)
                downs.append((first, last))
            elif isinstance(stage, Up):
                first = stage.unpool(x, kept.pop())
                x = stage.rest(stage.first(first))
                ups.append((first, x))
        return downs, ups


class MtanResNet(nn.Module):
    """MTAN on a residual network: a stage's last block is masked by what the blocks before it give.

    Args:
        backbone: whose stages are looked into.
        heads: of the tasks, by their names.
    """

    def __init__(self, backbone: DilatedResNet, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, nn.ModuleDict(heads)
        widths = [backbone.width * 2**stage for stage in range(backbone.count)]
        self.between = nn.ModuleList(Bottleneck(EXPANSION * width, after, 1, 1) for width, after in pairwise(widths))
        self.masks = nn.ModuleDict(
            {
                name: nn.ModuleList(
                    attention(EXPANSION * width * (1 if stage == 0 else 2), width, EXPANSION * width)
                    for stage, width in enumerate(widths)
                )
                for name in heads
            }
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features, x = [], self.backbone.stem(images)
        for layer in self.backbone.layers():
            first = layer[:-1](x)
            x = layer[-1](first)
            features.append((first, x))
        found = {}
        for name, head in self.heads.items():
            y: Tensor | None = None
            for (first, last), mask, between in zip(
                features, _modules(self.masks[name]), [*self.between, None], strict=True
            ):
                if y is not None and y.shape[-2:] != first.shape[-2:]:
                    y = functional.max_pool2d(y, 2)
                y = mask(first if y is None else torch.cat([first, y], 1)) * last
                y = y if between is None else between(y)
            found[name] = head(y)
        return found
