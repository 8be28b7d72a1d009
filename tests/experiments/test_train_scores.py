"""F1 and delta_m%."""

from __future__ import annotations

import math

import pytest
import torch

from experiments.forty_tasks.scores import Confusion
from experiments.training.study import delta_m


def test_f1_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    logits, labels = torch.randn(6, 50), (torch.rand(50, 6) > 0.7).float()
    labels[:, 4] = 0
    logits[4:] = -1  # task 4: nothing to find, nothing found; task 5: nothing found
    confusion = Confusion(6)
    for part in range(0, 50, 20):
        confusion.add(logits[:, part : part + 20], labels[part : part + 20])
    expected = [
        metrics.f1_score(labels[:, task].numpy(), (logits[task] > 0).numpy(), zero_division=0) for task in range(6)
    ]
    assert confusion.f1() == pytest.approx(expected)
    assert confusion.f1()[4] == 0 and min(confusion.f1()[:4]) > 0


def test_f1_by_hand():
    confusion = Confusion(1)
    confusion.add(torch.tensor([[2.0, 1.0, -1.0, 3.0, -2.0]]), torch.tensor([[1.0], [0.0], [1.0], [1.0], [0.0]]))
    assert confusion.f1() == [pytest.approx(2 * 2 / (2 * 2 + 1 + 1))]


def test_delta_m_is_the_mean_change_in_percent():
    assert delta_m([0.6, 0.5], [0.5, 0.5]) == pytest.approx(10.0)
    assert delta_m([0.4, 0.8], [0.5, 0.8]) == pytest.approx(-10.0)
    assert math.isnan(delta_m([0.4, 0.8], [0.0, 0.8]))
    assert delta_m([0.6, 0.4], [0.5, 0.5], [False, True]) == pytest.approx(20.0)
    assert delta_m([0.4, 0.6], [0.5, 0.5], [False, True]) == pytest.approx(-20.0)
