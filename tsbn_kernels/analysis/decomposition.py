"""The capacity of each task, and which part of it the other tasks could make up for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tsbn_kernels.analysis.gates import Source, importance


@dataclass(frozen=True, eq=False)
class Capacity:
    """Capacities of T tasks, float64 ``[T]`` each; ``total**2 == shared**2 + independent**2``.

    Attributes:
        total: the mean importance of the filters for a task.
        shared: the part of it that lies in the span of the other tasks' importance.
        independent: the part at right angles to that span.
        tasks: their names.
    """

    total: Tensor
    shared: Tensor
    independent: Tensor
    tasks: tuple[str, ...]


def capacity(source: Source) -> Capacity:
    """Splits the capacity of each task into a shared and an independent part (arXiv 2512.20420, eq. 4 and 5).

    The importance vector of a task is projected onto those of the others by least squares. A single task has nothing to
    share. With as many tasks as filters or more, nothing need be independent.

    Args:
        source: see :func:`importance`.
    """
    found = importance(source)
    total = found.matrix.mean(1)
    # A rotation leaves all angles as they are: T coordinates of each task in place of F.
    coordinates = torch.linalg.qr(found.matrix.T, mode="r").R
    parts = [_split(coordinates, task) for task in range(len(total))]
    shared, independent = torch.tensor(parts, dtype=torch.float64).T
    length = found.matrix.norm(dim=1)
    scale = torch.where(length > 0, total / length, 0.0)
    return Capacity(total, scale * shared, scale * independent, found.tasks)


def _split(coordinates: Tensor, task: int) -> tuple[float, float]:
    """The lengths of a column's projection onto the span of the others, and of what remains."""
    own = coordinates[:, task]
    others = torch.cat([coordinates[:, :task], coordinates[:, task + 1 :]], 1)
    if not others.numel():
        return 0.0, float(own.norm())
    # By an orthonormal basis: gates near one half are nearly collinear, and (A^T A)^-1 would square their condition.
    basis, singular, _ = torch.linalg.svd(others, full_matrices=False)
    basis = basis[:, singular > singular[0] * max(others.shape) * torch.finfo(others.dtype).eps]
    shared = basis @ (basis.T @ own)
    rest = own - shared
    rest = rest - basis @ (basis.T @ rest)  # what rounding has left of the span
    return float(shared.norm()), float(rest.norm())
