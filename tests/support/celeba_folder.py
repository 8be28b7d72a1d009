"""A tiny CelebA folder, in either layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

TORCHVISION = ("img_align_celeba", "list_attr_celeba.txt", "list_eval_partition.txt")
ORIGINAL = ("Img/img_align_celeba", "Anno/list_attr_celeba.txt", "Eval/list_eval_partition.txt")
LAYOUTS = (TORCHVISION, ORIGINAL)


def write_celeba(
    root: Path,
    layout: Sequence[str],
    colors: Sequence[str] = ("red", "green", "blue"),
    partition: Sequence[int] = (0, 1, 0),
    names: Sequence[str] = ("Bald", "Male", "Young"),
) -> Path:
    """Images of 178x218, each of one colour; image i has attribute t where bit t of ``5, 0, 2, 5, 0, 2 ..`` is set."""
    images, attributes, partitions = (root / part for part in layout)
    images.mkdir(parents=True)
    for path in (attributes, partitions):
        path.parent.mkdir(parents=True, exist_ok=True)
    rows, parts = [], []
    for index, (color, part) in enumerate(zip(colors, partition, strict=True)):
        Image.new("RGB", (178, 218), color).save(images / f"{index}.png")
        values = (1 if (5, 0, 2)[index % 3] >> task & 1 else -1 for task in range(len(names)))
        rows.append(f"{index}.png " + " ".join(f"{value:2}" for value in values))
        parts.append(f"{index}.png {part}")
    attributes.write_text("\n".join([str(len(rows)), " ".join(names), *rows, ""]))
    partitions.write_text("\n".join([*parts, ""]))
    return root
