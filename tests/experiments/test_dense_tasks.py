"""Losses and metrics of the dense tasks, against scikit-learn and cases made by hand; missing pixels do not count."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.dense_tasks.tasks import MISSING, Depth, Normals, Segmentation, total_loss

CLASSES, SHAPE = 5, (3, 7, 9)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def in_batches(task, prediction: Tensor, truth: Tensor) -> list[float]:
    scores = task.scores()
    for part in (slice(0, 2), slice(2, 3)):
        scores.add(prediction[part], truth[part])
    return scores.values()


def labels() -> Tensor:
    drawn = torch.randint(-1, CLASSES - 1, SHAPE, generator=torch.Generator().manual_seed(1))  # the last never occurs
    assert (drawn == MISSING).any()
    return drawn


def test_segmentation_agrees_with_scikit_learn():
    from sklearn.metrics import accuracy_score, jaccard_score, log_loss  # a second, of every worker that collects

    logits, truth = random(3, CLASSES, 7, 9), labels()
    logits[:, CLASSES - 1] = -9  # and is never said: it is no class of the mean
    known = (truth != MISSING).numpy()
    said, true = logits.argmax(1).numpy()[known], truth.numpy()[known]
    expected = jaccard_score(true, said, average="macro"), accuracy_score(true, said)
    task = Segmentation(CLASSES)
    assert in_batches(task, logits, truth) == pytest.approx(expected, abs=1e-6)
    probabilities = logits.softmax(1).movedim(1, -1).numpy()[known]
    assert task.loss(logits, truth).item() == pytest.approx(
        log_loss(true, probabilities, labels=range(CLASSES)), abs=1e-6
    )


def test_a_class_that_is_said_and_never_true_lowers_the_mean():
    logits = torch.zeros(1, 3, 1, 2)
    logits[0, 0, 0, 0] = logits[0, 2, 0, 1] = 1
    truth = torch.zeros(1, 1, 2, dtype=torch.long)
    scores = Segmentation(3).scores()
    scores.add(logits, truth)
    assert scores.values() == pytest.approx([(0.5 + 0) / 2, 0.5])


def test_depth_by_hand():
    truth = torch.tensor([1.0, 2.0, 0.0, 4.0]).view(1, 1, 2, 2)
    prediction = torch.tensor([1.5, 1.0, 9.0, 4.0]).view(1, 1, 2, 2)  # the 9 has no truth
    task = Depth()
    assert task.loss(prediction, truth).item() == pytest.approx(1.5 / 3, abs=1e-6)
    scores = task.scores()
    scores.add(prediction, truth)
    assert scores.values() == pytest.approx([1.5 / 3, (0.5 + 0.5) / 3], abs=1e-6)


def test_normals_by_hand():
    angles = [0.0, 10.0, 20.0, 25.0, 60.0, 170.0]
    truth = torch.zeros(1, 3, 1, 8, dtype=torch.double)
    truth[0, 2, 0, :6] = 1  # the last two pixels are missing
    prediction = torch.zeros_like(truth)
    for pixel, angle in enumerate(angles):
        prediction[0, 0, 0, pixel], prediction[0, 2, 0, pixel] = (
            (1 + pixel) * part for part in (math.sin(math.radians(angle)), math.cos(math.radians(angle)))
        )  # of any length
    prediction[0, :, 0, 6:] = 5
    task = Normals()
    expected = np.mean([1 - math.cos(math.radians(angle)) for angle in angles])
    assert task.loss(prediction, truth).item() == pytest.approx(expected, abs=1e-6)
    scores = task.scores()
    scores.add(prediction, truth)
    found = scores.values()
    assert found[:2] == pytest.approx([np.mean(angles), 22.5], rel=1e-6)
    assert found[2:] == pytest.approx([2 / 6, 3 / 6, 4 / 6], abs=1e-6)


def test_normals_agree_with_arctan_in_float64():
    truth, prediction = torch.nn.functional.normalize(random(3, 3, 7, 9), dim=1), random(3, 3, 7, 9, seed=2)
    truth[1, :, 2] = 0
    known = (truth != 0).any(1)
    a, b = (x.movedim(1, -1)[known] for x in (truth, prediction))
    angles = torch.rad2deg(torch.atan2(torch.linalg.cross(a, b).norm(dim=1), (a * b).sum(1))).numpy()
    expected = [angles.mean(), np.median(angles), *((angles < limit).mean() for limit in (11.25, 22.5, 30))]
    assert in_batches(Normals(), prediction, truth) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    # A normal whose components add up to zero is one all the same.
    slanted = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1) / math.sqrt(2)
    assert Normals().loss(-slanted, slanted).item() == pytest.approx(2)


@pytest.mark.parametrize("task", [Segmentation(3), Depth(), Normals()], ids=lambda task: task.name)
def test_missing_pixels_have_no_gradient_and_a_batch_without_truth_no_loss(task):
    prediction = random(2, task.outputs, 4, 4).requires_grad_()
    if isinstance(task, Segmentation):
        truth = torch.full((2, 4, 4), MISSING)
        truth[0, 1] = 1
    else:
        truth = torch.zeros(2, task.outputs, 4, 4, dtype=torch.double)
        truth[0, -1, 1] = 1
    task.loss(prediction, truth).backward()
    assert prediction.grad[0, :, 1].abs().sum() > 0
    prediction.grad[0, :, 1] = 0
    assert prediction.grad.abs().max() == 0
    empty = torch.full_like(truth, MISSING if truth.dim() == 3 else 0)
    loss = task.loss(prediction, empty)
    loss.backward()
    assert loss.item() == 0 and prediction.grad.isfinite().all()
    scores = task.scores()
    scores.add(prediction.detach(), empty)
    assert all(map(math.isnan, scores.values())) and len(scores.values()) == len(task.metrics)


def test_the_losses_are_added():
    tasks = {task.name: task for task in (Segmentation(3), Depth())}
    predictions = {"segmentation": random(1, 3, 2, 2), "depth": random(1, 1, 2, 2)}
    truths = {"segmentation": torch.ones(1, 2, 2, dtype=torch.long), "depth": torch.ones(1, 1, 2, 2)}
    expected = sum(task.loss(predictions[name], truths[name]) for name, task in tasks.items())
    assert total_loss(tasks, predictions, truths).item() == pytest.approx(expected.item())
