"""MTAN on SegNet and on a dilated residual network."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from experiments.dense_tasks.deeplab import EXPANSION, Bottleneck, DilatedResNet
from experiments.dense_tasks.segnet import Down, SegNet, Up, convolution
from experiments.training.mtan import Features, Mtan, attention


class MtanSegNet(Mtan):
    """MTAN on SegNet: masks of each stage's last features, made of its first ones."""

    def __init__(self, backbone: SegNet, heads: Mapping[str, nn.Module]) -> None:
        super().__init__(backbone, heads)
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

    def masks_of(self, task: str) -> list[nn.Module]:
        return [*self.down_masks[task].children(), *self.up_masks[task].children()]

    def hand_on(self, stage: int, y: Tensor) -> Tensor:
        decoded = stage + 1 - len(self.down)
        if decoded <= 0:
            y = functional.max_pool2d(self.down[stage](y), 2)
        if decoded >= 0:
            y = self.up[decoded](functional.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=True))
        return y

    def features(self, images: Tensor) -> list[Features]:
        found: list[Features] = []
        kept, x = [], images
        for stage in self.backbone.stages:
            if isinstance(stage, Down):
                first = stage.first(x)
                last = stage.rest(first)
                x, indices = stage.pool(last)
                kept.append(indices)
                found.append((first, last))
            elif isinstance(stage, Up):
                first = stage.unpool(x, kept.pop())
                x = stage.rest(stage.first(first))
                found.append((first, x))
        return found


class MtanResNet(Mtan):
    """MTAN on a residual network: a stage's last block is masked by what the blocks before it give."""

    def __init__(self, backbone: DilatedResNet, heads: Mapping[str, nn.Module]) -> None:
        super().__init__(backbone, heads)
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

    def masks_of(self, task: str) -> list[nn.Module]:
        return [*self.masks[task].children()]

    def hand_on(self, stage: int, y: Tensor) -> Tensor:
        y = self.between[stage](y)
        return functional.max_pool2d(y, 2) if stage == 0 else y  # the second stage strides, and no other does

    def features(self, images: Tensor) -> list[Features]:
        found: list[Features] = []
        x = self.backbone.stem(images)
        for layer in self.backbone.layers():
            first = layer[:-1](x)
            x = layer[-1](first)
            found.append((first, x))
        return found
