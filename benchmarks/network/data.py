"""Real images with binary labels: faces that install with scikit-image, or a CelebA folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

SIZE = 64
# Where the three parts of CelebA lie: torchvision's layout and the one of the original archives.
_LAYOUTS = (
    ("img_align_celeba", "list_attr_celeba.txt", "list_eval_partition.txt"),
    ("Img/img_align_celeba", "Anno/list_attr_celeba.txt", "Eval/list_eval_partition.txt"),
)
_PARTITIONS = {"0": "train", "1": "validation", "2": "test"}  # numbers in the file of the partition


class DataError(Exception):
    """The data cannot be read; the message says which file and what is wrong with it."""


@dataclass(frozen=True)
class Faces:
    """``images`` float32 ``[N, 3, 64, 64]`` in [0, 1]; ``labels`` float32 ``[N, T]`` of 0 and 1."""

    images: Tensor
    labels: Tensor
    source: str


@dataclass(frozen=True)
class Splits:
    """Samples to train on, to choose the best epoch by, and to report.

    Each is a dataset, with a length, of samples and labels float32 ``[T]`` of 0 and 1. A sample is an image float32
    ``[C, H, W]`` in [0, 1], or int64 ``[L]`` of letters.
    """

    train: Any  # torch's Dataset does not promise the length that all of these have
    validation: Any
    test: Any
    tasks: tuple[str, ...]
    source: str


def lfw_faces(count: int, tasks: int) -> Faces:
    """The first ``count`` of the 100 faces in scikit-image's ``lfw_subset``, in turn where there are not as many.

    The 25x25 grey images are resized to 64x64, the grey value in all three channels. They have no attributes, so a
    label is the side of the median, over the 100 faces, on which a random projection of the image falls: 50 faces have
    it, and it depends on the image alone.
    """
    from skimage.data import lfw_subset

    faces = lfw_subset()  # type: ignore[no-untyped-call]
    grey = torch.from_numpy(faces[:100]).float()
    pixels = grey.flatten(1) - grey.flatten(1).mean(0)
    projections = pixels @ torch.randn(pixels.shape[1], tasks, generator=torch.Generator().manual_seed(40))
    labels = (projections > projections.median(0).values).float()
    chosen = torch.arange(count) % len(grey)
    images = functional.interpolate(grey[chosen, None], size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return Faces(images.expand(-1, 3, -1, -1).clamp(0, 1).contiguous(), labels[chosen], "scikit-image lfw_subset")


class CelebaImages(Dataset[tuple[Tensor, Tensor]]):
    """Images of a partition of CelebA, read and resized when they are asked for: ``[3, 64, 64]`` and labels ``[T]``.

    Attributes:
        files: N paths.
        labels: bool ``[N, T]``.
    """

    def __init__(self, files: Sequence[Path], labels: Tensor) -> None:
        self.files = files
        self.labels = labels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Raises:
        DataError: the file cannot be read as an image.
        """
        return _read(self.files[index]), self.labels[index].float()


def celeba(folder: Path) -> Splits:
    """CelebA in either of its layouts: all images of the three partitions with their attributes.

    Raises:
        DataError: one of its files is missing or malformed.
    """
    images, attributes, partition = _find(folder)
    lines = attributes.read_text().splitlines()
    if len(lines) < 2 or not lines[0].strip().isdigit():
        raise DataError(f"{attributes} should start with a line that counts the images and a line of attribute names")
    names = tuple(lines[1].split())
    labels: dict[str, list[bool]] = {}
    for line in filter(str.strip, lines[2:]):
        file, *values = line.split()
        if len(values) != len(names) or not set(values) <= {"1", "-1"}:
            raise DataError(f"{attributes}: the line of {file} should have {len(names)} values of 1 or -1")
        labels[file] = [value == "1" for value in values]
    files: dict[str, list[str]] = {number: [] for number in _PARTITIONS}
    for line in filter(str.strip, partition.read_text().splitlines()):
        file, *rest = line.split()
        number = " ".join(rest)
        if number not in files or file not in labels:
            raise DataError(f"{partition}: {line.strip()!r} should be a file that has attributes, and 0, 1 or 2")
        files[number].append(file)
    present = set(os.listdir(images))
    for file in (file for part in files.values() for file in part):
        if file not in present:
            raise DataError(f"CelebA in {folder} is not complete: {images / file} is missing")
    sets = {
        name: CelebaImages([images / file for file in files[number]], torch.tensor([labels[f] for f in files[number]]))
        for number, name in _PARTITIONS.items()
    }
    return Splits(**sets, tasks=names, source=f"CelebA in {folder}")


def celeba_faces(folder: Path, count: int, tasks: int) -> Faces:
    """The first ``count`` training images of a CelebA folder with their first ``tasks`` attributes.

    Raises:
        DataError: a file is missing or malformed, or there are fewer images or attributes.
    """
    splits = celeba(folder)
    if tasks > len(splits.tasks):
        raise DataError(f"{folder} has {len(splits.tasks)} attributes, {tasks} tasks were asked for")
    if count > len(splits.train):
        raise DataError(f"{folder} has {len(splits.train)} training images, {count} were asked for")
    images, labels = zip(*(splits.train[index] for index in range(count)), strict=True)
    return Faces(torch.stack(images), torch.stack(labels)[:, :tasks], splits.source)


def _find(folder: Path) -> tuple[Path, Path, Path]:
    roots = [root for root in (folder, folder / "celeba") if root.is_dir()]
    if not roots:
        raise DataError(f"there is no folder {folder}")
    candidates = [tuple(root / part for part in layout) for root in roots for layout in _LAYOUTS]
    best = max(candidates, key=lambda paths: sum(path.exists() for path in paths))
    for path in best:
        if not path.exists():
            raise DataError(f"CelebA in {folder} is not complete: {path} is missing")
    return best[0], best[1], best[2]


def _read(path: Path) -> Tensor:
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    except OSError as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from None
    return torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255).permute(2, 0, 1)
