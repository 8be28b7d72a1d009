"""DeepLabV3 in plain PyTorch: a dilated ResNet-50, and for each task a head with pooling at several widths (ASPP)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.training.staged import Staged

RESNET50 = (3, 4, 6, 3)  # blocks of each stage
STRIDE = 8  # pixels of the image for one of the features, along each axis
EXPANSION = 4  # of the channels of a block over its width
_RATES = (12, 24, 36)  # dilations of ASPP
_ASPP = 256  # its channels, where the features have 2048


class Bottleneck(nn.Module):
    """A residual block of three convolutions; names as in torchvision."""

    def __init__(self, inputs: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(y)))))
        found: Tensor = self.relu3(y + (x if self.downsample is None else self.downsample(x)))
        return found


class DilatedResNet(Staged):
    """Features ``[N, 32 * width, H/8, W/8]`` of images ``[N, 3, H, W]``; the last two stages dilate and do not stride.

    Its parameters have torchvision's names and, with 64 as ``width``, shapes: ``load_state_dict`` takes those of a
    pretrained ``resnet50``, but for its ``fc``.

    The first stage begins with what is before the residual blocks.

    Attributes:
        width: of its first layer.
        multiple: of which height and width have to be.
    """

    multiple = STRIDE
    count = len(RESNET50)

    def __init__(self, width: int = 64, blocks: Sequence[int] = RESNET50) -> None:
        super().__init__()
        self.width = width
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        inputs, dilation = width, 1
        for stage, count in enumerate(blocks):
            layers = []
            before, dilation = dilation, 2 ** max(0, stage - 1)
            for block in range(count):
                stride = 2 if stage == 1 and block == 0 else 1
                layers.append(Bottleneck(inputs, width * 2**stage, stride, dilation if block else before))
                inputs = EXPANSION * width * 2**stage
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.features = inputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def run_stage(self, index: int, x: Tensor, kept: list[Tensor]) -> Tensor:
        """A stage; nothing is kept for another one."""
        found: Tensor = self.layers()[index](self.stem(x) if index == 0 else x)
        return found

    def stem(self, images: Tensor) -> Tensor:
        """What comes before the residual blocks, ``[N, width, H/4, W/4]``."""
        x: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return x

    def layers(self) -> list[nn.Sequential]:
        """The residual blocks of each stage."""
        return [self.layer1, self.layer2, self.layer3, self.layer4]  # type: ignore[list-item]


def _branch(inputs: int, outputs: int, size: int, dilation: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, padding=dilation * (size // 2), dilation=dilation, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class Aspp(nn.Module):
    """Convolutions of several dilations and the mean over all positions, side by side, and one convolution of all."""

    def __init__(self, inputs: int, outputs: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.branches = nn.ModuleList([_branch(inputs, outputs, 1), *(_branch(inputs, outputs, 3, r) for r in _RATES)])
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_branch(inputs, outputs, 1))
        self.project = nn.Sequential(*_branch((len(_RATES) + 2) * outputs, outputs, 1), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        pooled = functional.interpolate(self.pooled(x), x.shape[-2:], mode="bilinear", align_corners=False)
        found: Tensor = self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], 1))
        return found


class Enlarge(nn.Module):
    """Scales predictions up to the size of the images."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.interpolate(x, scale_factor=float(STRIDE), mode="bilinear", align_corners=False)


def deeplab_head(inputs: int, outputs: int) -> nn.Module:
    """ASPP, a convolution, and one that gives the prediction, at the size of the images."""
    width = max(1, inputs * _ASPP // 2048)
    return nn.Sequential(Aspp(inputs, width), _branch(width, width, 3), nn.Conv2d(width, outputs, 1), Enlarge())
