"""Real face images of 64x64 with binary labels: faces that install with scikit-image, or a CelebA folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

SIZE = 64
# Where the three parts of CelebA lie: torchvision's layout and the one of the original archives.
_LAYOUTS = (
    ("img_align_celeba", "list_attr_celeba.txt", "list_eval_partition.txt"),
    ("Img/img_align_celeba", "Anno/list_attr_celeba.txt", "Eval/list_eval_partition.txt"),
)
_TRAIN = "0"


class DataError(Exception):
    """The data cannot be read; the message says which file and what is wrong with it."""


@dataclass(frozen=True)
class Faces:
    """``images`` float32 ``[N, 3, 64, 64]`` in [0, 1]; ``labels`` float32 ``[N, T]`` of 0 and 1."""

    images: Tensor
    labels: Tensor
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


def celeba_faces(folder: Path, count: int, tasks: int) -> Faces:
    """The first ``count`` training images of a CelebA folder with their first ``tasks`` attributes.

    Raises:
        DataError: a file is missing or malformed, or there are fewer images or attributes.
    """
    images, attributes, partition = _find(folder)
    split = dict(line.split() for line in partition.read_text().splitlines() if line.strip())
    lines = attributes.read_text().splitlines()
    if len(lines) < 2 or not lines[0].strip().isdigit():
        raise DataError(f"{attributes} should start with a line that counts the images and a line of attribute names")
    names = lines[1].split()
    if tasks > len(names):
        raise DataError(f"{attributes} has {len(names)} attributes, {tasks} tasks were asked for")
    chosen: list[Tensor] = []
    labels: list[list[float]] = []
    for line in lines[2:]:
        if len(chosen) == count:
            break
        file, *values = line.split()
        if split.get(file) != _TRAIN:
            continue
        if len(values) != len(names) or not set(values) <= {"1", "-1"}:
            raise DataError(f"{attributes}: the line of {file} should have {len(names)} values of 1 or -1")
        chosen.append(_read(images / file))
        labels.append([float(value == "1") for value in values[:tasks]])
    if len(chosen) < count:
        raise DataError(f"{folder} has {len(chosen)} training images, {count} were asked for")
    return Faces(torch.stack(chosen), torch.tensor(labels), f"CelebA in {folder}")


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
