"""``rooms3``: rooms that are drawn here, with exact classes, depth and surface normals of each pixel.

Nothing is downloaded: boxes, balls and furniture of boxes in a room, with textures, a lamp and its shadows, seen by a
camera at a random place. The same seed gives the same rooms. What is seen is simple, and the truth has no noise and no
holes: it tries methods and shows their effects, and it is not NYUv2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from experiments.dense_tasks.rooms3_scene import CHECKS, PLAIN, ROOM, STRIPES, Camera, Primitives, draw_scene

_NEAR = 0.05  # metres before the camera; what reaches nearer may cover the whole picture
_LIFT = 2e-3  # of a point off its surface, that it throws no shadow on itself
_NOISE = 0.015  # standard deviation of a pixel's value
_Array = np.ndarray


@dataclass(frozen=True)
class Frames:
    """N pictures and their truth.

    Attributes:
        images: uint8 ``[N, 3, H, W]``.
        labels: uint8 ``[N, H, W]`` of :data:`~experiments.dense_tasks.rooms3_scene.CLASSES`.
        depth: float32 ``[N, 1, H, W]``, metres along the camera's axis.
        normals: float32 ``[N, 3, H, W]``, of length 1, towards the camera: right, down, forward.
    """

    images: np.ndarray
    labels: np.ndarray
    depth: np.ndarray
    normals: np.ndarray


def rooms3(
    indices: range, height: int = 96, width: int = 128, seed: int = 0, told: Callable[[int], None] = lambda _: None
) -> Frames:
    """Draws rooms, each by its index: it depends neither on the others nor on their number.

    Args:
        indices: of the rooms.
        height, width: of the pictures.
        seed: of all rooms.
        told: called with the number of rooms that are drawn, after each.
    """
    count = len(indices)
    frames = Frames(
        np.empty((count, 3, height, width), np.uint8),
        np.empty((count, height, width), np.uint8),
        np.empty((count, 1, height, width), np.float32),
        np.empty((count, 3, height, width), np.float32),
    )
    for row, index in enumerate(indices):
        rng = np.random.default_rng((seed, index))
        scene = draw_scene(rng)
        bodies = _Bodies(scene.primitives)
        camera = scene.camera
        rays = _rays(camera, height, width)
        depth, seen = _first_hits(bodies, camera, rays)
        points = camera.eye.astype(np.float32)[:, None, None] + depth * rays
        local, normals = bodies.surfaces(points, seen)
        light = _light(bodies, points, normals, scene.light, scene.light_color, scene.ambient)
        colors = bodies.colors(local, seen, light)
        colors += _NOISE * rng.standard_normal(colors.shape, np.float32)
        frames.images[row] = np.clip(255 * colors + 0.5, 0, 255)
        frames.labels[row] = bodies.labels[seen]
        frames.depth[row, 0] = depth
        frames.normals[row] = np.tensordot(camera.axes.astype(np.float32), normals, 1)
        told(row + 1)
    return frames


def _rays(camera: Camera, height: int, width: int) -> _Array:
    """Directions in the room, float32 ``[3, H, W]``, that go one metre along the camera's axis."""
    right = ((np.arange(width) + 0.5) * 2 / width - 1) * camera.slope
    down = ((np.arange(height) + 0.5) * 2 - height) / width * camera.slope
    own = np.stack([*np.meshgrid(right, down), np.ones((height, width))])
    return np.tensordot(camera.axes.T, own, 1).astype(np.float32)


class _Bodies:
    """The primitives of a room as arrays, and what rays meet of them."""

    def __init__(self, found: Primitives) -> None:
        self.centre, self.half, self.color, self.waves = (
            np.array(part, np.float32).T for part in (found.centre, found.half, found.color, found.waves)
        )
        self.cos, self.sin = np.cos(found.yaw).astype(np.float32), np.sin(found.yaw).astype(np.float32)
        self.ball, self.labels, self.texture = np.array(found.ball), np.array(found.label), np.array(found.texture)
        self.contrast, self.glow = np.array(found.contrast, np.float32), np.array(found.glow, np.float32)
        self.count = len(found.label)

    def turned(self, body: _Array | int, x: _Array, back: bool = False) -> _Array:
        """Vectors ``[3, ...]`` of the room along the axes of bodies, or back."""
        cos, sin = self.cos[body], -self.sin[body] if back else self.sin[body]
        return np.stack([cos * x[0] - sin * x[2], x[1], sin * x[0] + cos * x[2]])

    def distance(self, body: int, eye: _Array, rays: _Array) -> _Array:
        """How many times a ray fits between the eye and the body; infinity where it misses it."""
        origin, rays = (
            self.turned(body, eye - self.centre[:, body].reshape(3, *[1] * (eye.ndim - 1))),
            self.turned(body, rays),
        )
        if self.ball[body]:
            return _to_ball(origin, rays, self.half[0, body])
        near, far = _slabs(origin, rays, self.half[:, body])
        if body == ROOM:
            return far
        return np.where((near < far) & (near > 0), near, np.float32(np.inf))

    def window(self, body: int, camera: Camera, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns of the picture outside of which the body cannot be seen."""
        signs = np.array(np.meshgrid(*[(-1, 1)] * 3)).reshape(3, 8)
        corners = self.turned(body, self.half[:, body, None] * signs, back=True) + self.centre[:, body, None]
        right, down, forward = camera.axes @ (corners - camera.eye[:, None])
        if forward.min() < _NEAR:
            return slice(0, height), slice(0, width)
        columns = (right / forward / camera.slope + 1) * width / 2
        rows = (down / forward / camera.slope * width + height) / 2
        left, top = (max(0, int(part.min()) - 1) for part in (columns, rows))
        return slice(top, max(top, int(rows.max()) + 2)), slice(left, max(left, int(columns.max()) + 2))

    def surfaces(self, points: _Array, seen: _Array) -> tuple[_Array, _Array]:
        """The points along the axes of their bodies, and the normals there along those of the room."""
        local = self.turned(seen, points - self.centre[:, seen])
        share = local / self.half[:, seen]
        ball, face = self.ball[seen], np.abs(share).argmax(0)
        flat = np.where(np.arange(3)[:, None, None] == face, np.sign(share), np.float32(0))
        flat = np.where(seen == ROOM, -flat, flat)
        own = np.where(ball, share / np.sqrt((share * share).sum(0)), flat)
        return local, self.turned(seen, own.astype(np.float32), back=True)

    def colors(self, local: _Array, seen: _Array, light: _Array) -> _Array:
        """The picture, float32 ``[3, H, W]``: the color with its texture, times the light."""
        angles = local * self.waves[:, seen]
        stripes = np.sin(angles[0] + angles[2] + 1.5 * np.sin(0.3 * (angles[1] + angles[2])))
        checks = np.sign(np.prod(np.sin(angles + 0.7), axis=0))
        speckle = np.sin(7.3 * angles[0] + 3 * angles[1]) * np.sin(5.1 * angles[2] + angles[1])
        texture = self.texture[seen]
        pattern = np.select([texture == STRIPES, texture == CHECKS, texture == PLAIN], [stripes, checks, speckle])
        glow = self.glow[seen]
        color = self.color[:, seen] * (1 + self.contrast[seen] * pattern)
        return (color * (glow + (1 - glow) * light)).astype(np.float32)  # type: ignore[no-any-return]


def _to_ball(origin: _Array, rays: _Array, radius: float) -> _Array:
    square, along = (rays * rays).sum(0), (rays * origin).sum(0)
    inside = along * along - square * ((origin * origin).sum(0) - radius * radius)
    near = (-along - np.sqrt(np.maximum(inside, 0))) / square
    return np.where((inside > 0) & (near > 0), near, np.float32(np.inf))  # type: ignore[no-any-return]


def _slabs(origin: _Array, rays: _Array, half: _Array) -> tuple[_Array, _Array]:
    """Where a ray enters and leaves a box about zero; entering comes later where it misses."""
    near, far = np.float32(-np.inf), np.float32(np.inf)
    for x, direction, size in zip(origin, rays, half, strict=True):
        steps = 1 / np.where(np.abs(direction) < 1e-7, np.float32(1e-7), direction)
        middle, reach = -x * steps, np.abs(size * steps)
        near, far = np.maximum(near, middle - reach), np.minimum(far, middle + reach)
    return near, far


def _first_hits(bodies: _Bodies, camera: Camera, rays: _Array) -> tuple[_Array, _Array]:
    """Depth, and the index of the body that is seen."""
    eye = camera.eye.astype(np.float32)[:, None, None]
    depth = bodies.distance(ROOM, eye, rays)
    seen = np.zeros(depth.shape, np.int64)
    for body in range(ROOM + 1, bodies.count):
        rows, columns = bodies.window(body, camera, *depth.shape)
        part, owner = depth[rows, columns], seen[rows, columns]
        if part.size:
            found = bodies.distance(body, eye, rays[:, rows, columns])
            nearer = found < part
            part[nearer], owner[nearer] = found[nearer], body
    return depth, seen


def _light(bodies: _Bodies, points: _Array, normals: _Array, lamp: _Array, color: _Array, ambient: float) -> _Array:
    """What arrives at points, float32 ``[3, H, W]``: from the lamp, unless something is between, and from all sides."""
    eye = (points + _LIFT * normals).reshape(3, -1)
    way = lamp.astype(np.float32)[:, None] - eye
    square = (way * way).sum(0)
    cosine = np.maximum((way * normals.reshape(3, -1)).sum(0) / np.sqrt(square), 0)
    for body in range(ROOM + 3, bodies.count):  # the floor and the ceiling are behind everything
        lit = np.flatnonzero(cosine)
        cosine[lit[bodies.distance(body, eye[:, lit], way[:, lit]) < 1]] = 0
    from_above = ambient * (0.85 + 0.15 * normals[1])
    shine = (cosine / (1 + 0.5 * square)).reshape(from_above.shape)
    return (from_above + color[:, None, None] * shine).astype(np.float32)  # type: ignore[no-any-return]
