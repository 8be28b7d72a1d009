"""CelebA from a folder, for training: all images of each partition, read in parallel."""

from __future__ import annotations

import pytest
import torch
from support.celeba_folder import LAYOUTS, TORCHVISION, write_celeba
from torch.utils.data import DataLoader

from benchmarks.network.data import DataError, celeba

COLORS = ("red", "green", "blue", "white", "black", "lime")
VALUES = {"red": (1, 0, 0), "blue": (0, 0, 1), "white": (1, 1, 1), "black": (0, 0, 0), "lime": (0, 1, 0)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("workers", [0, 2])
def test_partitions_hold_their_images_and_labels(tmp_path, layout, workers):
    splits = celeba(write_celeba(tmp_path, layout, COLORS, (0, 1, 0, 2, 2, 0)))
    assert splits.tasks == ("Bald", "Male", "Young") and splits.source == f"CelebA in {tmp_path}"
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [3, 1, 2]
    images, labels = next(iter(DataLoader(splits.train, 3, num_workers=workers)))
    assert images.shape == (3, 3, 64, 64) and images.dtype == labels.dtype == torch.float32
    assert [tuple(image[:, 5, 60].tolist()) for image in images] == [VALUES[c] for c in ("red", "blue", "lime")]
    assert labels.tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]
    assert splits.test[1][1].tolist() == [0, 0, 0]


def test_a_missing_image_is_named_before_anything_is_read(tmp_path):
    write_celeba(tmp_path, TORCHVISION)
    (tmp_path / TORCHVISION[0] / "2.png").unlink()
    with pytest.raises(DataError, match=rf"{tmp_path}/img_align_celeba/2\.png is missing"):
        celeba(tmp_path)


@pytest.mark.parametrize("line", ["7.png 0", "1.png 3", "1.png", "1.png 0 0"])
def test_a_wrong_line_of_the_partition_is_said(tmp_path, line):
    write_celeba(tmp_path, TORCHVISION)
    (tmp_path / TORCHVISION[2]).write_text(f"0.png 0\n{line}\n")
    with pytest.raises(DataError, match=f"list_eval_partition.txt: '{line}' should be a file that has attributes"):
        celeba(tmp_path)
