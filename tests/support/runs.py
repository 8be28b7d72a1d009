"""Models with random gates for the analyses: of this package's layers, and of a user's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tsbn_kernels import FusedTSigmaBN2d, FusedTSigmaLN, LateFanOut, MultiTaskModel

T = 3


class OwnNorm(nn.Module):
    """A user's normalisation, which follows the documented protocol: gates, and the weight that they are of."""

    gate = "sigmoid"

    def __init__(self, tasks: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(tasks, channels))
        self.inner = nn.BatchNorm2d(channels, affine=False)

    @property
    def gates(self) -> Tensor:
        return torch.sigmoid(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        streams = self.inner(x).unflatten(0, (len(self.weight), -1))
        return (streams * self.gates[:, None, :, None, None]).flatten(0, 1)


class Tokens(nn.Module):
    """Images ``[N, C, H, W]`` as tokens ``[N, H*W, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


def random_gates(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "gates"):
                module.weight.normal_(std=2.0)
    return model


def every_layer() -> nn.Sequential:
    """One of each kind of gates, of T streams ``[T*N, 3, H, W]``."""
    return random_gates(
        nn.Sequential(
            nn.Conv2d(3, 4, 1),
            FusedTSigmaBN2d(T, 4, bias="frozen"),
            OwnNorm(T, 4),
            FusedTSigmaBN2d(T, 4, gate="identity", bias=True),
            Tokens(),
            FusedTSigmaLN(T, 4),
        )
    )  # type: ignore[return-value]


def late() -> nn.Sequential:
    return random_gates(nn.Sequential(LateFanOut(T, 3), nn.Conv2d(3, 4, 1), FusedTSigmaBN2d(T, 4)))  # type: ignore[return-value]


def multitask() -> MultiTaskModel:
    backbone = nn.Sequential(
        nn.Conv2d(3, 4, 3), FusedTSigmaBN2d(T, 4, activation="relu"), nn.Conv2d(4, 6, 1), FusedTSigmaBN2d(T, 6)
    )
    heads = {
        name: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 1)) for name in ("age", "hat", "smile")
    }
    return random_gates(MultiTaskModel(backbone, heads))  # type: ignore[return-value]
