"""Folders of NYUv2 and Cityscapes as the field shares them, what is wrong with a file, and scaled crops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks.network.data import DataError
from experiments.dense_tasks import data
from experiments.dense_tasks.data import DenseData, ScaledCrops, cityscapes, nyuv2, rooms
from experiments.dense_tasks.tasks import MISSING

HEIGHT, WIDTH, COUNTS = 24, 32, {"train": 3, "val": 2}


def write(folder: Path, *, normals: bool) -> Path:
    rng = np.random.default_rng(0)
    for part, count in COUNTS.items():
        for index in range(count):
            normal = rng.standard_normal((HEIGHT, WIDTH, 3))
            arrays = {
                "image": rng.random((HEIGHT, WIDTH, 3)),
                "label": rng.integers(-1, 7, (HEIGHT, WIDTH)).astype(np.float32),
                "depth": (rng.random((HEIGHT, WIDTH, 1)) * (rng.random((HEIGHT, WIDTH, 1)) > 0.2)).astype(np.float32),
                "normal": normal / np.linalg.norm(normal, axis=2, keepdims=True),
            }
            for name, array in arrays.items():
                if name != "normal" or normals:
                    path = folder / part / name / f"{index}.npy"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    np.save(path, array)
    return folder


READERS = {"nyuv2": (nyuv2, True), "cityscapes": (cityscapes, False)}


@pytest.fixture(params=READERS)
def folder(request, tmp_path) -> tuple[Path, object]:
    read, normals = READERS[request.param]
    return write(tmp_path / "data", normals=normals), read


def test_both_layouts_are_read(folder):
    path, read = folder
    found: DenseData = read(path)
    assert (len(found.train), len(found.validation), found.size) == (3, 2, (HEIGHT, WIDTH))
    assert found.disparity == (read is cityscapes)
    image, truth = found.train[1]
    assert image.dtype == torch.float32 and truth["segmentation"].dtype == torch.int64
    names = {"segmentation": "label", "depth": "depth", "normals": "normal"}
    assert set(truth) == set(found.tasks) == set(names if read is nyuv2 else ["segmentation", "depth"])
    for name, one in {"image": image, **truth}.items():
        expected = np.load(path / "train" / names.get(name, name) / "1.npy")
        own = one if name == "segmentation" else one.movedim(0, -1)
        assert np.allclose(own.numpy(), expected, atol=1e-6)
    assert (truth["segmentation"] == MISSING).any() and (truth["depth"] == 0).any()
    images, truths = next(iter(DataLoader(found.train, 2)))
    assert images.shape == (2, 3, HEIGHT, WIDTH) and truths["depth"].shape == (2, 1, HEIGHT, WIDTH)


def save(array: np.ndarray):
    return lambda path: np.save(path, array)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


FAULTS = {
    "train/image/1.npy": [
        (save(np.zeros((3, HEIGHT, WIDTH))), r"should be of shape \[H, W, 3\], got \[3, 24, 32\]"),
        (save(np.zeros((HEIGHT, WIDTH + 1, 3))), "should be of 24x32 pixels, as the first image, got 24x33"),
        (truncated, "cannot be read as an array"),
        (lambda path: path.write_bytes(b""), "cannot be read as an array"),
        (save(np.array(["a"])), "should have numbers, got <U1"),
        (save(np.full((HEIGHT, WIDTH, 3), np.nan)), "should have finite values"),
    ],
    "train/label/1.npy": [
        (save(np.zeros((HEIGHT, WIDTH, 1))), r"should be of shape \[24, 32\], as its image, got \[24, 32, 1\]"),
        (save(np.full((HEIGHT, WIDTH), 13)), "should have labels below (13|7), got 13"),
        (save(np.full((HEIGHT, WIDTH), np.nan)), "should have finite values; missing are labels of -1"),
        (lambda path: path.write_bytes(b"no array"), "cannot be read as an array"),
    ],
    "train/depth/1.npy": [
        (save(np.zeros((HEIGHT, WIDTH, 3))), r"should be of shape \[24, 32, 1\], as its image, got \[24, 32, 3\]"),
        (save(np.full((HEIGHT, WIDTH, 1), np.inf)), "should have finite values"),
    ],
}


@pytest.mark.parametrize(("name", "spoil", "message"), [(n, *fault) for n, each in FAULTS.items() for fault in each])
def test_a_bad_file_is_named(folder, name, spoil, message):
    path, read = folder
    spoil(path / name)
    found = read(path)
    found.train[0]
    with pytest.raises(DataError, match=message) as caught:
        found.train[1]
    assert str(path / name) in str(caught.value)


def test_bad_normals_are_named(tmp_path):
    found = nyuv2(write(tmp_path, normals=True))
    path = tmp_path / "val/normal/0.npy"
    np.save(path, np.zeros((HEIGHT, WIDTH, 1)))
    with pytest.raises(DataError, match=rf"{path} should be of shape \[24, 32, 3\], as its image, got \[24, 32, 1\]"):
        found.validation[0]


def test_missing_parts_are_named(folder):
    path, read = folder
    (path / "val/depth/1.npy").rename(path / "val/depth/7.npy")
    with pytest.raises(DataError, match=r"val/depth/1\.npy is missing: the files of .* must be 0\.npy to 1\.npy"):
        read(path)
    (path / "val/depth/7.npy").unlink()
    with pytest.raises(DataError, match=r"val/depth has 1 \.npy files, and .*val/image has 2"):
        read(path)
    for file in (path / "train/image").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"train/image has no \.npy files"):
        read(path)
    (path / "train/image").rmdir()
    with pytest.raises(DataError, match=r"there is no folder .*train/image"):
        read(path)
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        read(path / "nowhere")


@pytest.fixture
def drawn(monkeypatch):
    """Chooses a crop: scale, row, column, mirrored."""

    def choose(*numbers: int) -> None:
        left = iter(numbers)
        monkeypatch.setattr(data, "_drawn", lambda _: next(left))

    return choose


def test_crops_scale_depth_and_turn_normals(drawn):
    found = rooms(2, 1, 24, 32, lambda _: None)
    image, truth = found.train[0]
    drawn(0, 0, 0, 0)
    same, kept = ScaledCrops(found.train)[0]
    assert same.equal(image) and all(kept[name].equal(part) for name, part in truth.items())
    drawn(0, 0, 0, 1)
    mirrored, turned = ScaledCrops(found.train)[0]
    assert mirrored.flip(-1).equal(image) and turned["segmentation"].flip(-1).equal(truth["segmentation"])
    back = turned["normals"].flip(-1) * torch.tensor([-1.0, 1, 1]).view(3, 1, 1)
    assert back.equal(truth["normals"]) and found.train[0][1]["normals"].equal(truth["normals"])
    for disparity in (False, True):
        drawn(2, 3, 4, 0)
        larger, nearer = ScaledCrops(found.train, disparity)[0]
        part = truth["depth"][:, 3 : 3 + 16, 4 : 4 + 21]
        assert larger.shape == image.shape
        assert nearer["depth"][0, 0, 0].item() == pytest.approx(part[0, 0, 0].item() * (1.5 if disparity else 1 / 1.5))
        assert set(nearer["segmentation"].unique().tolist()) <= set(truth["segmentation"].unique().tolist())
        assert nearer["segmentation"].dtype == torch.int64


def test_crops_follow_the_seed():
    crops = ScaledCrops(rooms(1, 1, 24, 32, lambda _: None).train)
    torch.manual_seed(5)
    first = [crops[0][0] for _ in range(4)]
    torch.manual_seed(5)
    assert all(crops[0][0].equal(one) for one in first) and not first[0].equal(first[1])


def test_rooms_are_samples_of_three_tasks():
    told: list[int] = []
    found = rooms(2, 1, 24, 32, told.append)
    image, truth = found.validation[0]
    assert told == [1, 2, 3] and image.shape == (3, 24, 32) and image.min() >= 0 and image.max() <= 1
    assert {name: tuple(part.shape) for name, part in truth.items()} == {
        "segmentation": (24, 32),
        "depth": (1, 24, 32),
        "normals": (3, 24, 32),
    }
    assert not image.equal(found.train[0][0])
