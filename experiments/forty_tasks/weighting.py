"""LibMTL's weightings of the tasks' gradients, with and without task-specific normalisation.

They need LibMTL of its repository: the release on PyPI, 1.1.5, does not import beside a torchvision of today, and its
CAGrad is written for three tasks.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.network.model import Layout
from experiments.forty_tasks.place import Place
from experiments.forty_tasks.staged import PlainBackbone
from experiments.forty_tasks.train_run import Recipe
from experiments.training.methods import TS_SIGMA_BN

WEIGHTINGS: dict[str, dict[str, float]] = {"PCGrad": {}, "CAGrad": {"calpha": 0.5, "rescale": 1}}  # LibMTL's defaults
NEEDS = "pip install git+https://github.com/median-research-group/LibMTL"


class WeightedNetwork(nn.Module):
    """A network of LibMTL, its architecture and its weighting in one class as its trainer makes it.

    Args:
        name: of the weighting in LibMTL.
        method: hard sharing or TS-sigma-BN.
        tasks: T.
        layout: of the backbone.

    Attributes:
        streams: what the model is asked for, one after the other: each task alone where its stream is its own, so that
            its backward pass is through that stream; all at once where they share one.
    """

    def __init__(self, name: str, method: str, tasks: int, layout: Layout) -> None:
        super().__init__()
        from LibMTL import architecture, weighting

        from tsbn_kernels.models.libmtl import TSSigmaBN

        own_streams = method == TS_SIGMA_BN
        base = TSSigmaBN if own_streams else architecture.HPS
        made = type("Model", (base, getattr(weighting, name)), {})
        self.names = [f"task {index}" for index in range(tasks)]
        heads = nn.ModuleDict({name: nn.Linear(layout.features, 1) for name in self.names})
        for head in heads.values():
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]  # as in CelebaNetwork
        options = {"pretrained": False} if own_streams else {}
        device = torch.device("cpu")
        self.model: Any = made(self.names, partial(PlainBackbone, layout), heads, False, False, device, **options)
        self.model.init_param()
        self.streams = self.names if own_streams else [None]

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[T, N]`` of images ``[N, inputs, H, W]``."""
        logits = self.model(images)
        return torch.cat([logits[name] for name in self.names], 1).T

    def losses(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Binary cross entropy of each task; labels are ``[N, T]``.

        They are a list: were they one tensor, a backward pass from one of them would run through the streams of all.
        """
        logits: dict[str, Tensor] = {}
        for stream in self.streams:
            logits |= self.model(images, stream)
        return [
            functional.binary_cross_entropy_with_logits(logits[name].squeeze(1), truth)
            for name, truth in zip(self.names, labels.T, strict=True)
        ]


@dataclass(frozen=True)
class WeightedStep:
    """A training step of a :class:`WeightedNetwork`; ``arguments`` are those of its weighting."""

    arguments: dict[str, float]

    def __call__(self, network: nn.Module, optimizer: torch.optim.Optimizer, samples: Tensor, labels: Tensor) -> Tensor:
        """Runs forward, a backward pass for each task, and the optimiser's step; returns the sum of the losses."""
        assert isinstance(network, WeightedNetwork)
        random.seed(int(torch.randint(2**31, ())))  # PCGrad shuffles tasks by it: a resumed run must shuffle the same
        network.model.device = samples.device
        optimizer.zero_grad(set_to_none=True)
        losses = network.losses(samples, labels)
        network.model.backward(losses, **self.arguments)
        optimizer.step()
        return torch.stack(losses).detach().sum()


def with_weightings(place: Place) -> list[Place]:
    """Gives a place for each of :data:`WEIGHTINGS`.

    Raises:
        ImportError: LibMTL is not installed, or cannot be imported.
    """
    try:
        from LibMTL import weighting  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the study of weightings needs LibMTL ({error}): {NEEDS}") from error
    return [
        place.varied(
            name,
            # LibMTL takes views of gradients, which are laid out as their weights are.
            recipe=Recipe(partial(WeightedNetwork, name), WeightedStep(arguments), torch.contiguous_format),
        )
        for name, arguments in WEIGHTINGS.items()
    ]
