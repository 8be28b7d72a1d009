"""Groups of tasks that use the same filters, in one run or in most of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tsbn_kernels.analysis.gates import Importance, Source, same_tasks
from tsbn_kernels.analysis.likeness import similarity
from tsbn_kernels.operator import checks


@dataclass(frozen=True, eq=False)
class Clusters:
    """Groups of T tasks, from R runs.

    Attributes:
        labels: int64 ``[T]``: the cluster of each task, from 0 on, in the order of ``order``.
        runs: int64 ``[R, T]``: the same of each run alone.
        together: float64 ``[T, T]``: the share of the runs in which two tasks are in one cluster.
        tree: float64 ``[T-1, 4]``: the linkage matrix of SciPy that the labels are cut from; of one run by the
            distances of its tasks, of several by ``1 - together``.
        order: int64 ``[T]``: the tasks as the leaves of the tree stand side by side.
        tasks: their names.
    """

    labels: Tensor
    runs: Tensor
    together: Tensor
    tree: Tensor
    order: Tensor
    tasks: tuple[str, ...]

    def groups(self) -> list[list[str]]:
        """The names of the tasks of each cluster."""
        return [
            [self.tasks[task] for task in self.order.tolist() if self.labels[task] == label]
            for label in range(int(self.labels.max()) + 1)
        ]


def cluster_tasks(runs: Source | Sequence[Source], clusters: int | None = None) -> Clusters:
    """Groups tasks by the cosine of their importance vectors, hierarchically, with the mean distance between groups.

    Several runs are grouped one by one. How often two tasks fall into one cluster is then what they are grouped by.

    Args:
        runs: one run or several, each as :func:`importance` takes it.
        clusters: how many; by default a quarter of the tasks (ten of forty, as in the paper), and two at least.

    Raises:
        ImportError: SciPy is not installed.
        ValueError: fewer than two tasks, more clusters than tasks, or runs with different tasks.
    """
    single = isinstance(runs, (nn.Module, Mapping, Importance, Tensor))
    found = same_tasks([runs] if single else runs)  # type: ignore[list-item, arg-type]
    if not found:
        raise ValueError("expected one run or more, got none")
    count = len(found[0].tasks)
    if count < 2:
        raise ValueError("there is nothing to group: the model has one task")
    clusters = max(2, -(-count // 4)) if clusters is None else checks.count("clusters", clusters)
    if clusters > count:
        raise ValueError(f"clusters must be at most the {count} tasks, got {clusters}")
    trees = [_tree(1 - similarity(run)) for run in found]
    labels = torch.stack([_cut(tree, clusters) for tree in trees])
    together = (labels[:, :, None] == labels[:, None, :]).double().mean(0)
    tree = trees[0] if len(trees) == 1 else _tree(1 - together)
    order = torch.from_numpy(_hierarchy().leaves_list(tree)).long()
    return Clusters(_cut(tree, clusters), labels, together, torch.from_numpy(tree), order, found[0].tasks)


def _tree(distances: Tensor) -> Any:
    from_rows = torch.triu_indices(len(distances), len(distances), 1)
    return _hierarchy().linkage(distances[tuple(from_rows)].clamp_min(0).numpy(), "average")


def _cut(tree: Any, clusters: int) -> Tensor:
    """The cluster of each task, numbered as the leaves of the tree stand."""
    hierarchy = _hierarchy()
    labels = torch.from_numpy(hierarchy.cut_tree(tree, clusters)[:, 0]).long()
    seen = list(dict.fromkeys(labels[torch.from_numpy(hierarchy.leaves_list(tree)).long()].tolist()))
    return torch.tensor([seen.index(label) for label in labels.tolist()])


def _hierarchy() -> Any:
    try:
        from scipy.cluster import hierarchy
    except ModuleNotFoundError as error:
        raise ImportError("cluster_tasks needs SciPy: python -m pip install 'tsbn-kernels[plots]'") from error
    return hierarchy
