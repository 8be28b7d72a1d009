"""Where the gates of a converted layer start from, and what of it a user should know."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tsbn_kernels.layers.task_specific import GATE_EPS, VISIBLE
from tsbn_kernels.operator import checks


class Starts:
    """The plain weights that gates start from, for all layers of a model.

    Args:
        sigmoid: the gates are sigmoids of the weights, and not the weights.
        pretrained: True takes the weights of the plain layers; None does so unless a layer is new.
        remedy: the option that gives gates which keep any weight.
    """

    def __init__(self, sigmoid: bool, pretrained: bool | None, remedy: str) -> None:
        self.sigmoid, self.pretrained, self.remedy = sigmoid, pretrained, remedy
        self.clipped: dict[str, Tensor] = {}  # by how much
        self.ones: list[str] = []

    def weight(self, module: nn.Module, name: str, weight: Tensor) -> Tensor:
        """The plain weight that the gates of a layer are to stand for."""
        if not self.sigmoid or weight.is_meta:
            return weight
        if self.pretrained is None and _is_new(module):
            return torch.full_like(weight, 0.5)
        if self.pretrained is None and bool((weight == 1).all()):
            self.ones.append(name)
        clipped = weight.clamp(GATE_EPS, 1 - GATE_EPS)
        if bool(((changes := (clipped - weight).abs()) > VISIBLE).any()):
            self.clipped[name] = changes[changes > VISIBLE]
        return clipped

    def complaints(self) -> list[str]:
        """What a user should know."""
        complaints = []
        if self.clipped:
            count, most = sum(map(len, self.clipped.values())), max(float(c.max()) for c in self.clipped.values())
            complaints.append(
                f"{count} scales of {len(self.clipped)} layers, {checks.some(map(repr, self.clipped))}, lie outside "
                f"of (0, 1), where a sigmoid gate cannot be, and were clipped, by up to {most:.3g}: the tasks do not "
                f"start as the plain model; {self.remedy} keeps its function"
            )
        if self.ones:
            complaints.append(
                f"gates start at {1 - GATE_EPS}, where they hardly learn, in {checks.some(map(repr, self.ones))}: all "
                f"scales are 1, as those of a new layer; pretrained=False starts from new layers, with gates of one "
                f"half, and pretrained=True says that this is meant"
            )
        return complaints


def _is_new(module: nn.Module) -> bool:
    """Whether a layer is as its constructor has left it; new residual branches have weights of 0."""
    weight, batches = getattr(module, "weight", None), getattr(module, "num_batches_tracked", None)
    if weight is None and batches is None:
        return False  # which nothing shows
    others = {"bias": 0, "running_mean": 0, "running_var": 1}
    starts = (batches, 0), *((getattr(module, name, None), start) for name, start in others.items())
    return (weight is None or bool((weight == 1).all()) or bool((weight == 0).all())) and all(
        tensor is None or bool((tensor == start).all()) for tensor, start in starts
    )
