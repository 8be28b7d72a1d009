"""Layers and models whose absent tasks are held, and the same as loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tsbn_kernels import (
    FusedTSigmaBN2d,
    FusedTSigmaLN,
    MultiTaskModel,
    convert_model,
    hold_absent_tasks,
)

T, N, C = 3, 2, 4
OPTIMISERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "lr": 0.1},
    "Rprop": {"lr": 0.01},
    **{
        name: {"lr": 0.1, "weight_decay": 0.1}
        for name in (
            "Adam",
            "AdamW",
            "Adamax",
            "NAdam",
            "RAdam",
            "Adagrad",
            "Adadelta",
            "RMSprop",
            "ASGD",
            "Adafactor",
        )
    },
}
KINDS: dict[str, tuple[Any, Any, Any]] = {
    "BN": (FusedTSigmaBN2d, nn.BatchNorm2d, C),
    "LN": (FusedTSigmaLN, nn.LayerNorm, (3, 3)),
}
Make = Callable[[Any], torch.optim.Optimizer]


def optimiser(name: str, **options: Any) -> Make:
    return lambda parameters: getattr(torch.optim, name)(parameters, **OPTIMISERS[name] | options)


class Pair:
    """A layer whose absent tasks are held, and the same as a loop, each with an optimiser."""

    def __init__(self, make: Make, dtype: torch.dtype = torch.float64, kind: str = "BN") -> None:
        fused, plain, shape = KINDS[kind]
        self.layer = fused(T, shape, gate="identity", bias=True, dtype=dtype)
        self.loop = nn.ModuleList(plain(shape, dtype=dtype) for _ in range(T))
        self.optimisers = make(self.layer.parameters()), make(self.loop.parameters())
        self.dtype = dtype
        hold_absent_tasks(self.optimisers[0], self.layer)

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        for one in self.optimisers:
            one.zero_grad(set_to_none)

    def losses(self, tasks: list[int], form: str, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Of the layer and of the loop; of the layer with ``tasks=``, or from some of all its streams."""
        streams = torch.randn(T, N, C, 3, 3, dtype=self.dtype)
        upstream = factor * torch.randn(T, N, C, 3, 3, dtype=self.dtype)
        if form == "tasks":
            got = (self.layer(streams[tasks].flatten(0, 1), tasks=tasks) * upstream[tasks].flatten(0, 1)).sum()
        else:
            ys = self.layer.streams(streams.flatten(0, 1))
            got = sum((ys[t] * upstream[t]).sum() for t in tasks)
        return got, sum((self.loop[t](streams[t]) * upstream[t]).sum() for t in tasks)

    def backward(self, *args: Any, **options: Any) -> None:
        for loss in self.losses(*args, **options):
            loss.backward()

    def step(self) -> None:
        for one in self.optimisers:
            one.step()

    def assert_equal(self) -> None:
        for name in ("weight", "bias"):
            stacked = torch.stack([getattr(one, name) for one in self.loop])
            torch.testing.assert_close(getattr(self.layer, name), stacked, rtol=1e-9, atol=1e-9)


SCHEDULE = [([0], "tasks"), ([1], "streams"), ([2, 0], "tasks"), ([1], "tasks"), ([2, 0], "streams"), ([1], "tasks")]


# ---- networks ------------------------------------------------------------------------------------------------------


def backbone() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, C, 3),
        nn.BatchNorm2d(C),
        nn.ReLU(),
        nn.Conv2d(C, C, 3),
        nn.BatchNorm2d(C),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def multitask() -> MultiTaskModel:
    torch.manual_seed(1)
    converted = convert_model(backbone(), T, variant="tsbn", pretrained=False)
    return MultiTaskModel(converted, {name: nn.Linear(C, 2) for name in "abc"}).double()
