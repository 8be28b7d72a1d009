"""Capacity, similarity, stability, specialised filters and clusters, against direct formulas and known answers."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from support.runs import every_layer
from torch import Tensor

from tsbn_kernels.analysis import (
    capacity,
    cluster_tasks,
    importance,
    rank_correlations,
    similarity,
    similarity_by_layer,
    specialized_filters,
    stability,
)
from tsbn_kernels.analysis.likeness import ranks


def gates(tasks: int, filters: int) -> Tensor:
    return torch.rand(tasks, filters, dtype=torch.float64) + 0.05


@pytest.mark.parametrize(("tasks", "filters"), [(2, 7), (5, 31), (40, 180), (6, 4)])
def test_capacity_is_the_projection_by_the_normal_equations(tasks: int, filters: int) -> None:
    matrix = gates(tasks, filters)
    found = capacity(matrix)
    for task in range(tasks):
        own, others = matrix[task], torch.cat([matrix[:task], matrix[task + 1 :]]).T
        shared = others @ torch.linalg.pinv(others.T @ others, rtol=1e-12) @ (others.T @ own)
        mean, length = own.mean(), own.norm()
        torch.testing.assert_close(found.total[task], mean)
        torch.testing.assert_close(found.shared[task], mean * shared.norm() / length, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found.independent[task], mean * (own - shared).norm() / length, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("noise", [1.0, 1e-3, 1e-7, 1e-10, 0.0])
def test_capacity_holds_however_collinear_the_gates_are(noise: float) -> None:
    """A few steps from the start all gates are one half, and the normal equations have no answer."""
    common, own, tasks = torch.full((60,), 60**-0.5, dtype=torch.float64), torch.eye(60, dtype=torch.float64), 12
    own = own[:, ::5] - own[:, 1::5]  # [60, 12], at right angles to each other and to what is common
    matrix = common + noise / 8 * own.T / 2**0.5  # no gate below 0
    found = capacity(matrix)
    torch.testing.assert_close(found.shared**2 + found.independent**2, found.total**2, rtol=1e-12, atol=0)
    small = (noise / 8) ** 2
    expected = (small + small / (tasks - 1 + small)) ** 0.5  # its distance from the span of the eleven others
    lengths = found.independent / found.total * matrix.norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, expected), rtol=1e-4, atol=1e-15)


def test_known_capacities() -> None:
    eye = torch.eye(3, 6, dtype=torch.float64)
    orthogonal = capacity(eye)
    assert orthogonal.shared.tolist() == [0, 0, 0]
    torch.testing.assert_close(orthogonal.independent, orthogonal.total)
    identical = capacity(torch.full((4, 6), 0.5))
    torch.testing.assert_close(identical.shared, identical.total)
    assert float(identical.independent.max()) < 1e-15
    one = gates(1, 6)
    alone = capacity(one)
    assert (float(alone.shared), float(alone.independent)) == (0, pytest.approx(float(one.mean())))
    spanned = capacity(torch.stack([eye[0], eye[1], 2 * eye[0] + 3 * eye[1]]))
    assert float(spanned.independent[2]) < 1e-15 and spanned.shared[2] == pytest.approx(5 / 6)
    partly = capacity(torch.stack([3 * eye[0] + 4 * eye[1], eye[0], eye[2]]))  # 3 of 5 lie in the span of the others
    assert (partly.shared[0], partly.independent[0]) == (pytest.approx(7 / 6 * 0.6), pytest.approx(7 / 6 * 0.8))
    crowded = capacity(gates(8, 3))
    assert float(crowded.independent.max()) < 1e-14
    nothing = capacity(torch.stack([torch.zeros(4), torch.ones(4)]))
    assert (float(nothing.total[0]), float(nothing.shared[0]), float(nothing.independent[0])) == (0, 0, 0)


def test_similarity_is_the_cosine() -> None:
    matrix = gates(5, 17)
    found = similarity(matrix)
    for one, other in itertools.product(range(5), repeat=2):
        expected = float(matrix[one] @ matrix[other]) / float(matrix[one].norm() * matrix[other].norm())
        assert float(found[one, other]) == pytest.approx(expected, abs=1e-14)
    assert torch.equal(similarity(torch.eye(3)), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(similarity(torch.full((3, 4), 0.5)), torch.ones(3, 3, dtype=torch.float64))
    assert similarity(torch.tensor([[0.0, 0.0], [1.0, 0.0]])).tolist() == [[1, 0], [0, 1]]
    assert similarity(torch.rand(1, 4)).tolist() == [[1]]


def test_similarity_by_layer_sees_one_layer() -> None:
    model = every_layer()
    found = similarity_by_layer(model)
    assert list(found) == ["1", "2", "3", "5"]
    for name, matrix in found.items():
        torch.testing.assert_close(matrix, similarity(model.get_submodule(name)))


def test_specialised_filters_have_more_than_their_share() -> None:
    matrix = gates(4, 50) ** 6
    found = specialized_filters(matrix, 0.4)
    for task, column in itertools.product(range(4), range(50)):
        expected = matrix[task, column] / matrix[:, column].sum() > 0.4
        assert found.mask[task, column] == expected
    model = every_layer()
    percent = specialized_filters(model).percent
    for name, part in importance(model).slices.items():
        columns = importance(model).matrix[:, part]
        assert percent[name] == pytest.approx(100 * float((columns / columns.sum(0) > 0.5).any(0).double().mean()))
    known = specialized_filters(torch.tensor([[1.0, 0.5, 0.0], [0.1, 0.5, 0.0]]))
    assert known.mask.tolist() == [[True, False, False], [False, False, False]]
    assert known.filters(0) == [("gates", 0)] and known.percent == {"gates": pytest.approx(100 / 3)}
    assert specialized_filters(torch.rand(1, 4)).percent == {"gates": 100}
    for threshold in (-0.1, 1.0):
        with pytest.raises(ValueError, match="threshold"):
            specialized_filters(torch.rand(2, 4), threshold)


@pytest.mark.parametrize("seed", range(3))
def test_ranks_are_those_of_scipy(seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    values = torch.from_numpy(np.random.default_rng(seed).integers(0, 6, 23)).double()
    assert ranks(values).tolist() == stats.rankdata(values.numpy()).tolist()


def test_stability_is_the_mean_spearman_correlation() -> None:
    stats = pytest.importorskip("scipy.stats")
    runs = [gates(6, 9) for _ in range(4)]
    upper = np.triu_indices(6, 1)
    matrices = [similarity(run).numpy()[upper] for run in runs]
    expected = [stats.spearmanr(a, b).statistic for a, b in itertools.combinations(matrices, 2)]
    assert stability(runs) == pytest.approx(np.mean(expected))
    assert rank_correlations(runs)[0, 3] == pytest.approx(stats.spearmanr(matrices[0], matrices[3]).statistic)
    assert stability([runs[0], 2 * runs[0]]) == pytest.approx(1)  # the cosine knows no scale
    angles = torch.tensor([0.0, 0.3, 0.9])
    backwards = torch.tensor([0.0, 0.9, 0.6])  # the pairs 0.3, 0.9, 0.6 apart; 0.9, 0.6, 0.3: ranks 1 3 2, 3 2 1
    turned = [torch.stack([each.cos(), each.sin()], 1) for each in (angles, backwards)]
    assert stability(turned) == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([torch.rand(3, 4)], "two runs or more, got 1"),
        ([torch.rand(2, 4)] * 2, "three tasks or more"),
        ([], "three tasks or more"),
        ([torch.rand(3, 4), torch.rand(4, 4)], "same tasks"),
        ([torch.rand(3, 4), torch.full((3, 4), 0.5)], "equally alike"),
    ],
)
def test_runs_that_cannot_be_compared(runs: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stability(runs)


def groups_of(*sizes: int, noise: float = 0.02) -> Tensor:
    """Tasks that use the same filters within a group, and others than other groups."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    base = torch.nn.functional.one_hot(labels).double().repeat_interleave(5, 1)
    return base + noise * torch.rand(base.shape, dtype=torch.float64)


def test_clusters_are_found_again() -> None:
    pytest.importorskip("scipy")
    matrix = groups_of(3, 2, 4)
    found = cluster_tasks(matrix)
    assert found.runs.shape == (1, 9) and found.tree.shape == (8, 4)
    expected = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    same = expected[:, None] == expected
    assert torch.equal(found.labels[:, None] == found.labels, same)
    assert torch.equal(found.together, same.double())
    assert [len(group) for group in found.groups()] == [
        int((found.labels == label).sum()) for label in range(3)
    ] and sorted(itertools.chain(*found.groups())) == sorted(found.tasks)
    assert found.labels[found.order].tolist() == sorted(found.labels.tolist())
    assert sorted(found.order.tolist()) == list(range(9))


def test_clusters_of_several_runs_are_those_of_most() -> None:
    pytest.importorskip("scipy")
    odd = groups_of(3, 3)[torch.tensor([0, 3, 1, 4, 2, 5])]
    runs = [groups_of(3, 3), groups_of(3, 3), odd]
    found = cluster_tasks(runs, 2)
    assert found.labels.tolist() in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])
    singles = [cluster_tasks(run, 2).labels for run in runs]
    share = sum((labels[:, None] == labels).double() for labels in singles) / 3
    torch.testing.assert_close(found.together, share)
    assert found.together[0, 1] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("runs", "clusters", "message"),
    [
        (torch.rand(1, 4), None, "one task"),
        (torch.rand(3, 4), 4, "at most the 3 tasks, got 4"),
        (torch.rand(3, 4), 0, "clusters"),
        ([], None, "got none"),
    ],
)
def test_clusters_that_cannot_be(runs, clusters: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster_tasks(runs, clusters)


def test_without_scipy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("scipy", "scipy.cluster"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"tsbn-kernels\[plots\]"):
        cluster_tasks(torch.rand(4, 5))
