"""Cross-Stitch networks (Misra and others, CVPR 2016): a backbone for each task, and units that mix their features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiments.training.staged import Staged

OWN = 0.9  # weight of a task's own features in a new unit


class CrossStitch(nn.Module):
    """T backbones that mix their features behind each stage but the last.

    Args:
        backbones: of the tasks, one for each.
        heads: of the tasks, by their names.

    Attributes:
        units: ``[stages - 1, T, T]``: how much of the features of each task (columns) a task (rows) goes on with.
    """

    backbones: Any  # a ModuleList of Staged

    def __init__(self, backbones: Sequence[Staged], heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        tasks = len(heads)
        self.backbones, self.heads = nn.ModuleList(backbones), nn.ModuleDict(heads)
        own = torch.eye(tasks)
        others = (1 - OWN) / max(1, tasks - 1) * (1 - own)
        self.units = nn.Parameter((OWN * own + others).repeat(backbones[0].count - 1, 1, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Predictions by the tasks' names."""
        streams: list[Tensor] = [images] * len(self.heads)
        kept: list[list[Tensor]] = [[] for _ in streams]
        for stage in range(len(self.units) + 1):
            streams = [
                backbone.run_stage(stage, x, own)
                for backbone, x, own in zip(self.backbones, streams, kept, strict=True)
            ]
            if stage < len(self.units):
                streams = _mixed(self.units[stage], streams)
        return {name: head(x) for (name, head), x in zip(self.heads.items(), streams, strict=True)}


def _mixed(unit: Tensor, streams: list[Tensor]) -> list[Tensor]:
    """Sums of the streams by the rows of a unit, channels last in memory, in one matrix product."""
    stacked = torch.stack([x.movedim(1, -1) for x in streams])
    return [x.movedim(-1, 1) for x in torch.tensordot(unit, stacked, 1)]
