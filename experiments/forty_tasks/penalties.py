"""What may be added to a loss: penalties of gates, and of gradients that stand in each other's way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.forty_tasks.place import Place
from experiments.forty_tasks.train_run import Recipe
from tsbn_kernels.regularizers import l1_of_gates, orthogonal_gradients, receding_importance

L1, RECEDING, ORTHOGONAL = "L1", "receding", "orthogonal"


def _orthogonal(network: Any, losses: Tensor, strength: float) -> Tensor:
    """Takes the gradients of the last layer that all tasks share."""
    return orthogonal_gradients(list(losses), network.linears[-1].weight, strength)


# By name: a function of a CelebA network, the loss of each task and the strength.
PENALTIES: dict[str, Callable[[Any, Tensor, float], Tensor]] = {
    L1: lambda network, _, strength: l1_of_gates(network, strength),
    RECEDING: lambda network, _, strength: receding_importance(network, strength),
    ORTHOGONAL: _orthogonal,
}


@dataclass(frozen=True)
class PenalisedStep:
    """A training step of the CelebA network with a penalty, one of :data:`PENALTIES`."""

    penalty: str
    strength: float

    def __call__(self, network: nn.Module, optimizer: torch.optim.Optimizer, samples: Tensor, labels: Tensor) -> Tensor:
        """Runs forward, backward and the optimiser's step; returns the loss without the penalty."""
        optimizer.zero_grad(set_to_none=True)
        losses = functional.binary_cross_entropy_with_logits(network(samples), labels.T, reduction="none").mean(1)
        loss = losses.sum()
        (loss + PENALTIES[self.penalty](network, losses, self.strength)).backward()
        optimizer.step()
        return loss.detach()


def with_penalties(place: Place, penalties: Sequence[tuple[str, float]]) -> list[Place]:
    """Gives a place for each penalty, by its name and its strength."""
    return [
        place.varied(f"{name} {strength:g}", recipe=Recipe(step=PenalisedStep(name, strength)))
        for name, strength in penalties
    ]
