"""SegNet as the field uses it for dense tasks, in plain PyTorch: an encoder that pools, a decoder that unpools."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from experiments.training.staged import Staged

SEGNET = (64, 128, 256, 512, 512)  # channels of the stages
_CONVOLUTIONS = (2, 2, 3, 3, 3)  # in each stage, of the encoder and of the decoder: 26 in all


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    """A 3x3 convolution, its BatchNorm and ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class Down(nn.Module):
    """A stage of the encoder: convolutions, and a pooling whose indices it appends to what is kept."""

    def __init__(self, inputs: int, outputs: int, count: int) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs)
        self.rest = nn.Sequential(*(convolution(outputs, outputs) for _ in range(count - 1)))
        self.pool = nn.MaxPool2d(2, return_indices=True)

    def forward(self, x: Tensor, kept: list[Tensor]) -> Tensor:
        x, indices = self.pool(self.rest(self.first(x)))
        kept.append(indices)
        return x


class Up(nn.Module):
    """A stage of the decoder: unpools by the indices that were kept last, and convolves."""

    def __init__(self, inputs: int, outputs: int, count: int) -> None:
        super().__init__()
        self.unpool = nn.MaxUnpool2d(2)
        self.first = convolution(inputs, outputs)
        self.rest = nn.Sequential(*(convolution(outputs, outputs) for _ in range(count - 1)))

    def forward(self, x: Tensor, kept: list[Tensor]) -> Tensor:
        found: Tensor = self.rest(self.first(self.unpool(x, kept.pop())))
        return found


class SegNet(Staged):
    """Features ``[N, channels[0], H, W]`` of images ``[N, 3, H, W]``, with H and W multiples of 32.

    Attributes:
        multiple: of which height and width have to be.
    """

    multiple = 32
    count = 2 * len(_CONVOLUTIONS)

    def __init__(self, channels: Sequence[int] = SEGNET) -> None:
        super().__init__()
        self.channels, self.features = tuple(channels), channels[0]
        inputs = (3, *channels[:-1])
        downs = zip(inputs, channels, _CONVOLUTIONS, strict=True)
        ups = zip(channels, (channels[0], *channels[:-1]), _CONVOLUTIONS, strict=True)
        self.stages = nn.ModuleList([Down(*sizes) for sizes in downs] + [Up(*sizes) for sizes in [*ups][::-1]])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def run_stage(self, index: int, x: Tensor, kept: list[Tensor]) -> Tensor:
        """A stage of the encoder, which appends its indices to what is kept, or of the decoder, which takes them."""
        found: Tensor = self.stages[index](x, kept)
        return found


def segnet_head(inputs: int, outputs: int) -> nn.Module:
    """Two convolutions, 3x3 and 1x1, without normalisation."""
    return nn.Sequential(nn.Conv2d(inputs, inputs, 3, padding=1), nn.Conv2d(inputs, outputs, 1))
