"""Pictures with classes, depth and normals: NYUv2 and Cityscapes from the folders that the field shares, and rooms3.

The folders are ``train`` and ``val``, each with ``image``, ``label``, ``depth`` and, of NYUv2, ``normal``; in each of
these ``0.npy``, ``1.npy`` and so on, channels last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from benchmarks.network.data import DataError
from experiments.dense_tasks import rooms3_scene
from experiments.dense_tasks.rooms3 import Frames, rooms3
from experiments.dense_tasks.tasks import DEPTH, MISSING, NORMALS, SEGMENTATION, Depth, Normals, Segmentation, Task

_FOLDERS = {SEGMENTATION: "label", DEPTH: "depth", NORMALS: "normal"}
SCALES = 1.0, 1.2, 1.5  # of the crops that are scaled up to the whole

Sample = tuple[Tensor, dict[str, Tensor]]  # image float32 [3, H, W] in [0, 1], and the truth of each task


@dataclass(frozen=True)
class DenseData:
    """Samples of dense tasks.

    Attributes:
        train, validation: datasets of :data:`Sample`, with a length.
        tasks: by their names.
        source: what they are.
        size: height and width of the pictures.
        disparity: the truth of depth is that, and grows as things come nearer.
    """

    train: Any
    validation: Any
    tasks: Mapping[str, Task]
    source: str
    size: tuple[int, int]
    disparity: bool = False


class FolderSamples(Dataset[Sample]):
    """The samples of one folder, ``train`` or ``val``, read when they are asked for.

    Args:
        folder: with the folders of the images and of each task's truth.
        tasks: their names.
        classes: a label is one of these, or negative where it is missing.

    Raises:
        DataError: a folder or file is missing, or the folders have different numbers of files.
    """

    def __init__(self, folder: Path, tasks: Mapping[str, Task], classes: int) -> None:
        self.folder, self.classes = folder, classes
        self.parts = {"image": folder / "image"} | {name: folder / _FOLDERS[name] for name in tasks}
        counts = {}
        for part in self.parts.values():
            if not part.is_dir():
                raise DataError(f"there is no folder {part}")
            counts[part] = len(list(part.glob("*.npy")))
        images = self.parts["image"]
        self.count = counts[images]
        if not self.count:
            raise DataError(f"{images} has no .npy files")
        for part, count in counts.items():
            if count != self.count:
                raise DataError(f"{part} has {count} .npy files, and {images} has {self.count}: one for each is needed")
            for index in range(count):
                if not (path := part / f"{index}.npy").exists():
                    raise DataError(f"{path} is missing: the files of {part} must be 0.npy to {count - 1}.npy")
        self.size: tuple[int, int] = tuple(self._image(0).shape[1:])  # type: ignore[assignment]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        """Raises:
        DataError: a file cannot be read, or has another shape or other values than it should.
        """
        image = self._image(index)
        if (size := tuple(image.shape[1:])) != self.size:
            path = self.parts["image"] / f"{index}.npy"
            raise DataError(f"{path} should be of {_size(self.size)} pixels, as the first image, got {_size(size)}")
        return image, {name: self._truth(name, index) for name in self.parts if name != "image"}

    def _image(self, index: int) -> Tensor:
        path = self.parts["image"] / f"{index}.npy"
        image = _array(path)
        if image.ndim != 3 or image.shape[2] != 3:
            raise DataError(f"{path} should be of shape [H, W, 3], got {list(image.shape)}")
        scale = 255 if image.dtype == np.uint8 else 1
        return torch.from_numpy(image.astype(np.float32) / scale).movedim(2, 0)

    def _truth(self, name: str, index: int) -> Tensor:
        path = self.parts[name] / f"{index}.npy"
        array, (height, width) = _array(path), self.size
        if name == SEGMENTATION:
            _check_shape(path, array, [height, width])
            labels = torch.from_numpy(array.astype(np.int64))
            if (labels >= self.classes).any():
                raise DataError(f"{path} should have labels below {self.classes}, got {int(labels.max())}")
            return labels.clamp_min(MISSING)
        channels = 1 if name == DEPTH else 3
        if name == DEPTH and array.ndim == 2:
            array = array[..., None]
        _check_shape(path, array, [height, width, channels])
        return torch.from_numpy(array.astype(np.float32)).movedim(2, 0)


def _array(path: Path) -> np.ndarray:
    try:
        array = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as an array: {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        raise DataError(f"{path} should have numbers, got {getattr(array, 'dtype', type(array).__name__)}")
    if not np.isfinite(array).all():
        raise DataError(f"{path} should have finite values; missing are labels of -1, and zeros elsewhere")
    return array


def _check_shape(path: Path, array: np.ndarray, expected: list[int]) -> None:
    if list(array.shape) != expected:
        raise DataError(f"{path} should be of shape {expected}, as its image, got {list(array.shape)}")


def _size(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def _tasks(classes: int, *, normals: bool) -> dict[str, Task]:
    found: list[Task] = [Segmentation(classes), Depth(), *([Normals()] if normals else [])]
    return {task.name: task for task in found}


def _read(folder: Path, source: str, classes: int, *, normals: bool, disparity: bool) -> DenseData:
    """Reads ``folder``, whose parts are ``train`` and ``val``.

    Raises:
        DataError: a part is missing or does not fit the others; what is in a file shows when it is read.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    tasks = _tasks(classes, normals=normals)
    train, validation = (FolderSamples(folder / part, tasks, classes) for part in ("train", "val"))
    return DenseData(train, validation, tasks, f"{source} in {folder}", train.size, disparity)


def nyuv2(folder: Path) -> DenseData:
    """NYUv2: 13 classes, depth and normals; the field's pictures are of 288x384."""
    return _read(folder, "NYUv2", 13, normals=True, disparity=False)


def cityscapes(folder: Path) -> DenseData:
    """Cityscapes: 7 classes and disparity, in the place of depth; the field's pictures are of 128x256."""
    return _read(folder, "Cityscapes", 7, normals=False, disparity=True)


class Rooms(Dataset[Sample]):
    """Rooms of ``rooms3`` that are drawn already."""

    def __init__(self, frames: Frames) -> None:
        self.frames = frames

    def __len__(self) -> int:
        return len(self.frames.images)

    def __getitem__(self, index: int) -> Sample:
        frames = self.frames
        image, label, depth, normal = (
            torch.from_numpy(part[index]) for part in (frames.images, frames.labels, frames.depth, frames.normals)
        )
        return image.float() / 255, {SEGMENTATION: label.long(), DEPTH: depth, NORMALS: normal}


def rooms(train: int, validation: int, height: int, width: int, told: Callable[[int], None]) -> DenseData:
    """Rooms of ``rooms3``, the first to train on, others to validate with."""
    first = rooms3(range(train), height, width, told=told)
    others = rooms3(range(train, train + validation), height, width, told=lambda done: told(train + done))
    tasks = _tasks(len(rooms3_scene.CLASSES), normals=True)
    return DenseData(Rooms(first), Rooms(others), tasks, f"rooms3 of {height}x{width}", (height, width))


class ScaledCrops(Dataset[Sample]):
    """Random crops, scaled up to the size of the whole, half of them mirrored; by torch's generator.

    A crop that is scaled by s shows things s times as large, as from 1/s of their distance: depth is divided by it,
    and disparity multiplied.
    Labels, depth and normals are of the nearest pixel, so that missing pixels do not spread.
    """

    def __init__(self, samples: Any, disparity: bool = False) -> None:
        self.samples, self.disparity = samples, disparity

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        image, truth = self.samples[index]
        height, width = image.shape[1:]
        scale = SCALES[_drawn(len(SCALES))]
        rows, columns = int(height / scale), int(width / scale)
        top, left = _drawn(height - rows + 1), _drawn(width - columns + 1)
        mirrored = _drawn(2) == 1

        def crop(x: Tensor, mode: str) -> Tensor:
            part = x[..., top : top + rows, left : left + columns]
            flat = part.reshape(1, -1, rows, columns)
            options = {"align_corners": False} if mode == "bilinear" else {}
            scaled = functional.interpolate(flat.float(), (height, width), mode=mode, **options)
            whole = scaled.view(x.shape).to(x.dtype)
            return whole.flip(-1) if mirrored else whole

        cropped = {name: crop(part, "nearest") for name, part in truth.items()}
        cropped[DEPTH] = cropped[DEPTH] * (scale if self.disparity else 1 / scale)
        if mirrored and NORMALS in cropped:
            cropped[NORMALS][0] *= -1  # what points to the right points to the left
        return crop(image, "bilinear"), cropped


def _drawn(below: int) -> int:
    return int(torch.randint(below, ()))
