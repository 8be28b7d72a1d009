"""The dense tasks: what a head gives, what it is trained by, and how good it is; pixels without truth do not count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

MISSING = -1  # label of a pixel without a class; depth and normals are zero there
ANGLES = 11.25, 22.5, 30.0  # degrees, of the shares of normals
SEGMENTATION, DEPTH, NORMALS = "segmentation", "depth", "normals"


@dataclass(frozen=True)
class Metric:
    """A number that tells how good predictions are: its name, and whether less is better."""

    name: str
    less_is_better: bool


class Scores(ABC):
    """What predictions of one task have scored, added up over batches; ``values`` are those of its metrics."""

    @abstractmethod
    def add(self, prediction: Tensor, truth: Tensor) -> None:
        """Takes a batch."""

    @abstractmethod
    def values(self) -> list[float]:
        """The metrics, in the order of ``Task.metrics``; NaN where no pixel had truth."""


class Task(ABC):
    """A dense task.

    Attributes:
        name: of the task.
        outputs: channels of the prediction ``[N, outputs, H, W]``.
        metrics: by which it is reported.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    outputs: int

    @abstractmethod
    def loss(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """Mean over the pixels that have truth; 0 where none has."""

    @abstractmethod
    def scores(self) -> Scores:
        """Begins to add up."""


class Segmentation(Task):
    """A class for each pixel: logits ``[N, classes, H, W]``, truth int64 ``[N, H, W]``; cross-entropy."""

    name = SEGMENTATION
    metrics = Metric("mIoU", False), Metric("pixel accuracy", False)

    def __init__(self, classes: int) -> None:
        self.outputs = classes

    def loss(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """Cross-entropy."""
        total = functional.cross_entropy(_wide(prediction), truth, ignore_index=MISSING, reduction="sum")
        return total / (truth != MISSING).sum().clamp_min(1)

    def scores(self) -> Scores:
        """Begins to add up."""
        return _Confusion(self.outputs)


class _Confusion(Scores):
    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.long)  # truth, prediction

    def add(self, prediction: Tensor, truth: Tensor) -> None:
        classes = len(self.counts)
        known = truth != MISSING
        pairs = classes * truth[known] + prediction.argmax(1)[known]
        self.counts += torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu()

    def values(self) -> list[float]:
        """Mean intersection over union, of the classes that occur in truth or prediction, and pixel accuracy."""
        right, true, said = self.counts.diagonal().double(), self.counts.sum(1), self.counts.sum(0)
        union = true + said - self.counts.diagonal()
        return [float((right / union)[union > 0].mean()), float(right.sum() / self.counts.sum())]


class Depth(Task):
    """The distance of each pixel: ``[N, 1, H, W]``, and truth of 0 where it is missing; L1."""

    name = DEPTH
    metrics = Metric("absolute error", True), Metric("relative error", True)
    outputs = 1

    def loss(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """Mean absolute error."""
        known = truth != 0
        return ((_wide(prediction) - truth).abs() * known).sum() / known.sum().clamp_min(1)

    def scores(self) -> Scores:
        """Begins to add up."""
        return _Errors()


class _Errors(Scores):
    def __init__(self) -> None:
        self.sums, self.count = torch.zeros(2, dtype=torch.double), 0

    def add(self, prediction: Tensor, truth: Tensor) -> None:
        known = truth != 0
        true = truth[known].double()
        error = (prediction[known].double() - true).abs()
        self.sums += torch.stack([error.sum(), (error / true.abs()).sum()]).cpu()
        self.count += len(true)

    def values(self) -> list[float]:
        return [float(total / self.count) if self.count else float("nan") for total in self.sums]


class Normals(Task):
    """The direction of each pixel's surface: ``[N, 3, H, W]`` of any length, truth of length 1 or 0; dot product."""

    name = NORMALS
    metrics = (
        Metric("mean angle", True),
        Metric("median angle", True),
        *(Metric(f"within {angle:g}°", False) for angle in ANGLES),
    )
    outputs = 3

    def loss(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """One minus the cosine of the angle between prediction and truth."""
        known = (truth != 0).any(1)
        cosine = functional.normalize(_wide(prediction), dim=1).mul(truth).sum(1)
        return ((1 - cosine) * known).sum() / known.sum().clamp_min(1)

    def scores(self) -> Scores:
        """Begins to add up."""
        return _Angles()


class _Angles(Scores):
    """Keeps the angle of every pixel, for the median is of all."""

    def __init__(self) -> None:
        self.angles: list[Tensor] = []

    def add(self, prediction: Tensor, truth: Tensor) -> None:
        known = (truth != 0).any(1)
        ours, true = (x.movedim(1, -1)[known].double() for x in (prediction, truth))
        cosine = functional.cosine_similarity(ours, true, dim=1, eps=1e-12)
        self.angles.append(torch.rad2deg(torch.acos(cosine.clamp(-1, 1))).float().cpu())

    def values(self) -> list[float]:
        """Mean and median angle in degrees, and the shares of pixels below :data:`ANGLES`."""
        angles = torch.cat(self.angles).double() if self.angles else torch.empty(0)
        if not len(angles):
            return [float("nan")] * (2 + len(ANGLES))
        ordered = angles.sort().values
        middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        return [float(angles.mean()), float(middle), *(float((angles < limit).double().mean()) for limit in ANGLES)]


def _wide(prediction: Tensor) -> Tensor:
    """At least float32, for sums over many pixels."""
    return prediction.to(torch.promote_types(prediction.dtype, torch.float32))


def total_loss(tasks: Mapping[str, Task], predictions: Mapping[str, Tensor], truths: Mapping[str, Tensor]) -> Tensor:
    """The sum of the tasks' losses, all of equal weight."""
    return torch.stack([task.loss(predictions[name], truths[name]) for name, task in tasks.items()]).sum()
