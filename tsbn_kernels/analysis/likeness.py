"""How alike tasks are in what they use, and whether other runs say the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tsbn_kernels.analysis.gates import Source, importance, same_tasks


def similarity(source: Source) -> Tensor:
    """The cosine between the importance vectors of all pairs of tasks.

    Args:
        source: see :func:`importance`.

    Returns:
        Float64 ``[T, T]``, with 1 on the diagonal. A task whose gates are all 0 has 0 with all others.
    """
    matrix = importance(source).matrix
    return cosines(matrix @ matrix.T, matrix.norm(dim=1))


def similarity_by_layer(source: Source) -> dict[str, Tensor]:
    """The :func:`similarity` of tasks in each layer alone, by its name.

    Args:
        source: see :func:`importance`.
    """
    return {layer: similarity(part) for layer, part in importance(source).by_layer().items()}


def cosines(gram: Tensor, lengths: Tensor) -> Tensor:
    """Inner products ``[T, T]`` over the lengths ``[T]`` of both vectors, in [-1, 1]; 0 where one of them is 0."""
    products = lengths[:, None] * lengths
    found = torch.where(products > 0, gram / products, 0.0).clamp(-1.0, 1.0)
    found.fill_diagonal_(1.0)
    return found


def stability(runs: Sequence[Source]) -> float:
    """How far several runs agree on which tasks are alike: the mean of :func:`rank_correlations` over pairs of runs.

    The paper finds about 0.8 for seven seeds.

    Args:
        runs: two or more, each as :func:`importance` takes it.

    Raises:
        ValueError: fewer than two runs, or see :func:`rank_correlations`.
    """
    found = rank_correlations(runs)
    if len(found) < 2:
        raise ValueError(f"stability needs two runs or more, got {len(found)}")
    return float(found[_pairs(len(found))].mean())


def rank_correlations(runs: Sequence[Source]) -> Tensor:
    """Spearman's correlation between the similarities of the pairs of tasks in one run and in another.

    Args:
        runs: R of them, each as :func:`importance` takes it.

    Returns:
        Float64 ``[R, R]``.

    Raises:
        ValueError: the runs have different tasks, or fewer than three, whose pairs have no order; all pairs of a run
            are equally alike.
    """
    found = same_tasks(runs)
    if not found or len(found[0].tasks) < 3:
        raise ValueError(f"ranks need runs of three tasks or more, got {[list(run.tasks) for run in found]}")
    pairs = _pairs(len(found[0].tasks))
    ranked = torch.stack([ranks(similarity(run)[pairs]) for run in found])
    ranked = ranked - ranked.mean(1, keepdim=True)
    lengths = ranked.norm(dim=1)
    if bool((lengths == 0).any()):
        raise ValueError("all pairs of tasks of a run are equally alike, and have no order; its gates are untrained")
    return cosines(ranked @ ranked.T, lengths)


def ranks(values: Tensor) -> Tensor:
    """The ranks of values ``[N]``, from 1 on; equal values have the mean of their ranks."""
    _, group, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    mean: Tensor = counts.cumsum(0).double() - (counts - 1) / 2
    return mean[group]


def _pairs(count: int) -> tuple[Tensor, Tensor]:
    """Indices of the pairs of different things, each once."""
    rows, columns = torch.triu_indices(count, count, 1)
    return rows, columns
