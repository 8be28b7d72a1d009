"""Small plain networks for conversion: residual (basic and bottleneck), SegNet, and the CelebA layout."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.network.model import CELEBA, POOL_AFTER


class Residual(nn.Module):
    """torchvision's basic block, or its bottleneck, with the same names and one ReLU for several places."""

    def __init__(self, inputs: int, width: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        self.conv1 = nn.Conv2d(inputs, width, 1 if bottleneck else 3, 1 if bottleneck else stride, bias=False)
        self.conv1.padding = (0, 0) if bottleneck else (1, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride if bottleneck else 1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        if bottleneck:
            self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(outputs)
        self.bottleneck = bottleneck
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            out = self.bn3(self.conv3(self.relu(out)))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    """The layout of ResNet-18 ``(2, 2, 2, 2)`` or ResNet-50 ``(3, 4, 6, 3)``, narrow."""

    def __init__(self, blocks: tuple[int, ...], width: int = 4, *, bottleneck: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages, inputs = [], width
        for stage, count in enumerate(blocks):
            layers = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(Residual(inputs, width << stage, stride, bottleneck=bottleneck))
                inputs = (width << stage) * (4 if bottleneck else 1)
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.features = inputs

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.stages(x).mean((2, 3))


class SegNet(nn.Module):
    """An encoder and a decoder that unpools by the encoder's indices; convolutions have a bias."""

    def __init__(self, widths: tuple[int, ...] = (4, 8)) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for before, after in zip((3, *widths[:-1]), widths, strict=True):
            self.encoder.append(self._block(before, after))
            self.decoder.insert(0, self._block(after, max(before, widths[0])))
        self.features = widths[0]

    @staticmethod
    def _block(before: int, after: int) -> nn.Module:
        convolution = nn.Conv2d(before, after, 3, padding=1)
        return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True))

    @staticmethod
    def _unpool(x: Tensor, indices: Tensor) -> Tensor:
        """``functional.max_unpool2d``, which has no deterministic form."""
        height, width = 2 * x.shape[2], 2 * x.shape[3]
        flat = x.new_zeros(x.shape[0], x.shape[1], height * width).scatter(2, indices.flatten(2), x.flatten(2))
        return flat.unflatten(2, (height, width))

    def forward(self, x: Tensor) -> Tensor:
        pooled = []
        for block in self.encoder:
            x, indices = functional.max_pool2d(block(x), 2, return_indices=True)
            pooled.append(indices)
        for block in self.decoder:
            x = block(self._unpool(x, pooled.pop()))
        return x


class CelebA(nn.Sequential):
    """The CelebA backbone with a plain BatchNorm after each convolution and linear layer, narrowed 32 times."""

    def __init__(self) -> None:
        channels = [c // 32 for c in CELEBA.channels]
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(zip([3, *channels[:-1]], channels, strict=True)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(True)]
            layers += [nn.MaxPool2d(2)] if index in POOL_AFTER else []
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        width = channels[-1]
        for _ in range(2):
            layers += [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        super().__init__(*layers)
        self.features = width


class Transformer(nn.Module):
    """A vision transformer of one pre-norm block, narrow, with a norm of its patches: 16 of an image of 32 by 32."""

    features = 8

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        width = self.features
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.norm0, self.norm1, self.norm2, self.norm = (norm(width) for _ in range(4))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.patches(x).flatten(2).mT)
        x = x + self.out(functional.scaled_dot_product_attention(*self.qkv(self.norm1(x)).chunk(3, -1)))
        x = x + self.mlp(self.norm2(x))
        return self.norm(x).mean(1)


BATCH_NORMALISED = {
    "resnet18": lambda: ResNet((2, 2, 2, 2)),
    "bottleneck": lambda: ResNet((2, 2), bottleneck=True),
    "resnet50": lambda: ResNet((3, 4, 6, 3), bottleneck=True),
    "segnet": SegNet,
    "celeba": CelebA,
}
NETWORKS = {
    **BATCH_NORMALISED,
    "transformer": Transformer,
    "transformer, RMS": partial(Transformer, nn.RMSNorm),
}


def pretrained(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One of these networks that looks trained."""
    return look_trained(NETWORKS[name]().to(dtype))


def look_trained(network: nn.Module) -> nn.Module:
    """Gives its normalisation layers weights in (0, 1), biases and running statistics."""
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            with torch.no_grad():
                module.weight.uniform_(0.2, 0.95)
                module.bias.uniform_(0.0, 0.5)  # narrow as they are, the networks have no channel to lose to a ReLU
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                module.num_batches_tracked.fill_(7)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            for parameter in module.parameters():
                nn.init.uniform_(parameter, 0.2, 0.95)
    return network
