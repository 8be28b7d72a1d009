"""The rooms of rooms3: that their truth is exact, and that they depend on the seed and the index alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from experiments.dense_tasks.rooms3 import Frames, rooms3
from experiments.dense_tasks.rooms3_scene import CLASSES, Primitives, Scene, draw_scene

HEIGHT, WIDTH, ROOMS = 48, 64, 12


@pytest.fixture(scope="module")
def frames() -> Frames:
    return rooms3(range(ROOMS), HEIGHT, WIDTH)


def turned(yaw: float, x: np.ndarray) -> np.ndarray:
    cos, sin = math.cos(yaw), math.sin(yaw)
    return np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]]) @ x


def hit(found: Primitives, body: int, eye: np.ndarray, ray: np.ndarray) -> tuple[float, np.ndarray]:
    """Distance and outward normal where a ray meets a body, by the textbook and in float64."""
    half, yaw = np.array(found.half[body]), found.yaw[body]
    origin, ray = turned(yaw, eye - np.array(found.centre[body])), turned(yaw, ray)
    best, normal = math.inf, np.zeros(3)
    if found.ball[body]:
        roots = np.roots([ray @ ray, 2 * ray @ origin, origin @ origin - half[0] ** 2])
        if np.isreal(roots).all() and roots.real.min() > 0:
            best = roots.real.min()
            normal = (origin + best * ray) / half[0]
    else:
        for axis in range(3):
            for sign in (-1, 1):
                distance = (sign * half[axis] - origin[axis]) / ray[axis]
                inside = np.abs(origin + distance * ray) <= half + 1e-9
                if 0 < distance < best and inside.all():
                    best, normal = distance, sign * np.eye(3)[axis]
    return best, turned(-yaw, normal)


def seen(scene: Scene, row: int, column: int) -> tuple[float, float, int, np.ndarray]:
    """Depth, how much farther the second body is, class, and the normal in the camera's axes."""
    camera = scene.camera
    right, down = ((column + 0.5) * 2 / WIDTH - 1), ((row + 0.5) * 2 - HEIGHT) / WIDTH
    ray = camera.axes.T @ [right * camera.slope, down * camera.slope, 1.0]
    hits = [hit(scene.primitives, body, camera.eye, ray) for body in range(len(scene.primitives.label))]
    order = sorted(range(len(hits)), key=lambda body: hits[body][0])
    depth, normal = hits[order[0]]
    outward = -1 if order[0] == 0 else 1
    return depth, hits[order[1]][0] - depth, scene.primitives.label[order[0]], outward * camera.axes @ normal


def test_the_truth_is_that_of_rays_traced_one_by_one(frames):
    compared = 0
    for index in range(ROOMS):
        scene = draw_scene(np.random.default_rng((0, index)))
        places = np.random.default_rng(index).integers((HEIGHT, WIDTH), size=(25, 2)).tolist()
        for row, column in places:
            depth, gap, label, normal = seen(scene, row, column)
            assert frames.depth[index, 0, row, column] == pytest.approx(depth, abs=2e-3)
            if gap > 1e-3:  # else two surfaces are equally near
                found = frames.normals[index, :, row, column]
                at_edge = abs(found @ normal) < 0.5  # of two faces of one box: both are right
                compared += not at_edge
                assert frames.labels[index, row, column] == label
                assert at_edge or found == pytest.approx(normal, abs=5e-3)
    assert compared > 0.95 * 25 * ROOMS


def test_normals_have_length_one_and_face_the_camera(frames):
    assert np.abs(np.linalg.norm(frames.normals, axis=1) - 1).max() < 1e-5
    rays = np.stack(
        [*np.meshgrid(np.linspace(-0.4, 0.4, WIDTH), np.linspace(-0.3, 0.3, HEIGHT)), np.ones((HEIGHT, WIDTH))]
    )
    # Rays within a view narrower than any camera's keep to the side of a face that is seen, but at its very edge.
    assert ((frames.normals * rays).sum(1) < 0.05).mean() > 0.97


def test_a_room_depends_on_its_index_and_the_seed_alone(frames):
    again = rooms3(range(3, 5), HEIGHT, WIDTH)
    for name in ("images", "labels", "depth", "normals"):
        assert np.array_equal(getattr(again, name), getattr(frames, name)[3:5])
    other = rooms3(range(3, 5), HEIGHT, WIDTH, seed=1)
    assert not np.array_equal(other.labels, again.labels)


def test_a_larger_picture_is_the_same_room(frames):
    large = rooms3(range(2), 3 * HEIGHT, 3 * WIDTH)
    centre = slice(None), slice(1, None, 3), slice(1, None, 3)  # the middle of each three by three
    assert np.array_equal(large.labels[centre], frames.labels[:2])
    assert np.allclose(large.depth[:, 0][centre], frames.depth[:2, 0], atol=1e-3)


def test_shapes_types_and_classes(frames):
    assert frames.images.shape == frames.normals.shape == (ROOMS, 3, HEIGHT, WIDTH)
    assert frames.images.dtype == np.uint8 and frames.depth.dtype == np.float32
    assert len(CLASSES) == 13 and 0.5 < frames.depth.mean() < 6 and frames.depth.min() > 0.05
    share = np.bincount(rooms3(range(50), 24, 32).labels.ravel(), minlength=13) / (50 * 24 * 32)
    assert share.min() > 0.001 and share.max() < 0.6  # every class occurs, none is nearly all
    assert 40 < frames.images.mean() < 200 and frames.images.std() > 30


def test_it_tells_of_every_room():
    told: list[int] = []
    rooms3(range(4, 6), 8, 8, told=told.append)
    assert told == [1, 2]
