"""What stands in a room of ``rooms3``: boxes and balls of thirteen classes, a camera and a light, drawn from a seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

CLASSES = (
    "ceiling", "floor", "wall", "window", "picture", "table", "chair", "sofa", "bed", "shelf", "lamp", "box", "ball",
)  # fmt: skip
PLAIN, STRIPES, CHECKS = range(3)  # textures
FURNITURE = 5, 9  # fewest and most pieces that a room is to have
TRIES = 12  # places that are tried for each
ROOM = 0  # index of the room itself among the primitives: its inside is what one sees


@dataclass
class Primitives:
    """Boxes that stand upright, and balls; the lists have an entry for each.

    Attributes:
        centre: ``(x, y, z)`` in metres, y upwards.
        half: half of its size along its own axes; of a ball its radius, three times.
        yaw: by how much it is turned about y, in radians.
        ball: whether it is one.
        label: index of its class.
        color: red, green, blue in [0, 1].
        texture: one of :data:`PLAIN`, :data:`STRIPES`, :data:`CHECKS`.
        waves: of the texture along its own axes, in radians a metre.
        contrast: of the texture.
        glow: the share of the color that needs no light.
    """

    centre: list[tuple[float, float, float]] = field(default_factory=list)
    half: list[tuple[float, float, float]] = field(default_factory=list)
    yaw: list[float] = field(default_factory=list)
    ball: list[bool] = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    color: list[tuple[float, float, float]] = field(default_factory=list)
    texture: list[int] = field(default_factory=list)
    waves: list[tuple[float, float, float]] = field(default_factory=list)
    contrast: list[float] = field(default_factory=list)
    glow: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Surface:
    """How a primitive looks, as in :class:`Primitives`."""

    color: tuple[float, float, float]
    texture: int = PLAIN
    waves: tuple[float, float, float] = (0.0, 0.0, 0.0)
    contrast: float = 0.0
    glow: float = 0.0


@dataclass(frozen=True)
class Camera:
    """Where it is, where it looks, and how wide.

    Attributes:
        eye: its place.
        axes: ``[3, 3]``, its right, down and forward as rows.
        slope: of the outermost ray to the right: the tangent of half of the horizontal angle of view.
    """

    eye: np.ndarray
    axes: np.ndarray
    slope: float


@dataclass(frozen=True)
class Scene:
    """A room, its camera, and its lamp: a point that shines with a color, and the light that is everywhere."""

    primitives: Primitives
    camera: Camera
    light: np.ndarray
    light_color: np.ndarray
    ambient: float


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draws a room with furniture against its walls and in it; what is in the camera's way is left out."""
    return _Builder(rng).scene()


Part = tuple[tuple[float, float, float], tuple[float, float, float]]  # centre and half, relative to the piece
Piece = tuple[float, float, list[Part]]  # half of its width and depth, and its parts


class _Builder:
    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.found = Primitives()
        self.size = self.uniform(3.5, 6.5), self.uniform(2.4, 3.0), self.uniform(3.5, 6.5)
        self.taken: list[tuple[float, float, float]] = []  # circles on the floor: x, z, radius
        self.surfaces = {name: self.surface() for name in ("wood", "fabric", "frame")}

    def uniform(self, low: float, high: float) -> float:
        return float(low + (high - low) * self.rng.random())

    def surface(self, brightness: tuple[float, float] = (0.2, 0.9)) -> Surface:
        """A color and a texture, whose waves have lengths of 6 cm to 60 cm."""
        level, tint = self.uniform(*brightness), self.rng.random(3) - 0.5
        red, green, blue = np.clip(level + 0.45 * tint, 0.03, 1).tolist()
        waves = 2 * math.pi / np.exp(np.log(0.06) + np.log(10) * self.rng.random(3))
        texture = int(self.rng.integers(3))
        return Surface((red, green, blue), texture, tuple(waves.tolist()), self.uniform(0.08, 0.35))

    def add(
        self,
        label: str,
        surface: Surface,
        centre: tuple[float, float, float],
        half: tuple[float, float, float],
        yaw: float = 0.0,
        ball: bool = False,
    ) -> None:
        found = self.found
        found.centre.append(centre)
        found.half.append(half)
        found.yaw.append(yaw)
        found.ball.append(ball)
        found.label.append(CLASSES.index(label))
        found.color.append(surface.color)
        found.texture.append(surface.texture)
        found.waves.append(surface.waves)
        found.contrast.append(surface.contrast)
        found.glow.append(surface.glow)

    def scene(self) -> Scene:
        width, height, depth = self.size
        middle = width / 2, height / 2, depth / 2
        self.add("wall", self.surface((0.5, 0.9)), middle, middle)
        floor, ceiling = self.surface((0.2, 0.6)), self.surface((0.75, 0.95))
        self.add("floor", floor, (width / 2, 0.0, depth / 2), (width / 2, 0.005, depth / 2))
        self.add("ceiling", ceiling, (width / 2, height, depth / 2), (width / 2, 0.005, depth / 2))
        camera = self.camera()
        self.taken.append((float(camera.eye[0]), float(camera.eye[2]), 0.6))
        self.on_walls()
        if self.rng.random() < 0.5:
            half = self.uniform(0.5, 1.2), 0.008, self.uniform(0.5, 1.2)
            self.add("floor", self.surface(), (width / 2, 0.01, depth / 2), half, self.uniform(0, math.pi))
        for _ in range(int(self.rng.integers(FURNITURE[0], FURNITURE[1] + 1))):
            self.furniture()
        light = np.array([self.uniform(0.25, 0.75) * width, height - 0.25, self.uniform(0.25, 0.75) * depth])
        warm = self.uniform(-0.15, 0.15)
        color = np.array([1 + warm, 1.0, 1 - warm]) * self.uniform(1.5, 3.0)
        return Scene(self.found, camera, light, color, self.uniform(0.25, 0.45))

    def camera(self) -> Camera:
        width, _, depth = self.size
        angle = self.uniform(0, 2 * math.pi)
        eye = np.array(
            [
                width * (0.5 + 0.35 * math.cos(angle)),
                self.uniform(1.2, 1.9),
                depth * (0.5 + 0.35 * math.sin(angle)),
            ]
        )
        target = np.array([width * self.uniform(0.3, 0.7), self.uniform(0.6, 1.5), depth * self.uniform(0.3, 0.7)])
        forward = target - eye
        forward /= np.linalg.norm(forward)
        roll = self.uniform(-0.05, 0.05)
        right = np.cross(forward, [math.sin(roll), math.cos(roll), 0.0])
        right /= np.linalg.norm(right)
        return Camera(eye, np.stack([right, np.cross(forward, right), forward]), math.tan(self.uniform(0.5, 0.66)))

    def on_walls(self) -> None:
        """Windows and pictures: thin boxes, each on a wall of its own or beside others."""
        width, height, depth = self.size
        for label, count in (("window", self.rng.integers(0, 3)), ("picture", self.rng.integers(1, 5))):
            for _ in range(int(count)):
                along_x, far = self.rng.random() < 0.5, float(self.rng.random() < 0.5)
                length = width if along_x else depth
                scale = 1.0 if label == "window" else 0.55
                across, up = scale * self.uniform(0.4, 0.8), scale * self.uniform(0.4, 0.7)
                at, high = self.uniform(across + 0.1, length - across - 0.1), self.uniform(1.3, height - up - 0.2)
                surface = self.surface()
                if label == "window":
                    sky = self.uniform(0.75, 1.0)
                    surface = Surface((0.85 * sky, 0.95 * sky, sky), STRIPES, surface.waves, 0.06, glow=0.8)
                thick = 0.03
                if along_x:
                    self.add(label, surface, (at, high, far * depth), (across, up, thick))
                else:
                    self.add(label, surface, (far * width, high, at), (thick, up, across))

    def furniture(self) -> None:
        """A piece of a class that is drawn, where there is room for it; behind it a wall, or none."""
        label = ("table", "chair", "sofa", "bed", "shelf", "lamp", "box", "ball")[int(self.rng.integers(8))]
        across, deep, parts = PIECES[label](self.uniform)
        if (place := self.place(across, deep, label in ("sofa", "bed", "shelf"))) is None:
            return
        x, z, yaw = place
        surface = self.surfaces["fabric" if label in ("sofa", "bed") else "wood"]
        if label in ("box", "ball", "lamp") or self.rng.random() < 0.5:
            surface = self.surface()
        cos, sin = math.cos(yaw), math.sin(yaw)
        for index, ((right, up, back), half) in enumerate(parts):
            centre = x + cos * right + sin * back, up, z - sin * right + cos * back
            look = Surface((1.0, 0.95, 0.8), glow=0.7) if label == "lamp" and index == 0 else surface
            if label == "bed" and index > 0:
                look = Surface((0.9, 0.9, 0.88), STRIPES, surface.waves, 0.1) if index == 2 else self.surfaces["fabric"]
            self.add(label, look, centre, half, yaw, ball=label == "ball" or (label == "lamp" and index == 0))
        if label == "table" and self.rng.random() < 0.7:
            self.on_table(x, z, parts[0][0][1] + parts[0][1][1])

    def on_table(self, x: float, z: float, top: float) -> None:
        size = self.uniform(0.07, 0.16)
        if self.rng.random() < 0.5:
            self.add("ball", self.surface(), (x, top + size, z), (size, size, size), ball=True)
        else:
            half = self.uniform(0.08, 0.2), size, self.uniform(0.08, 0.2)
            self.add("box", self.surface(), (x, top + size, z), half, self.uniform(0, math.pi))

    def place(self, across: float, deep: float, at_wall: bool) -> tuple[float, float, float] | None:
        """The middle of a free place and how the piece is turned there; None where no try found one."""
        width, _, depth = self.size
        radius = math.hypot(across, deep)
        for _ in range(TRIES):
            if at_wall:
                side = int(self.rng.integers(4))
                length, gap = (width, depth)[side % 2], deep + 0.04
                along = self.uniform(across + 0.05, length - across - 0.05)
                x, z, yaw = (
                    (along, gap, math.pi),
                    (gap, along, -math.pi / 2),
                    (along, depth - gap, 0.0),
                    (width - gap, along, math.pi / 2),
                )[side]
            else:
                margin = radius + 0.05
                x, z = self.uniform(margin, width - margin), self.uniform(margin, depth - margin)
                yaw = self.uniform(0, 2 * math.pi)
            reach = 0.85 * radius
            if all(math.hypot(x - ax, z - az) > reach + other for ax, az, other in self.taken):
                self.taken.append((x, z, reach))
                return x, z, yaw
        return None


Uniform = Callable[[float, float], float]


def _legs(across: float, deep: float, height: float, thick: float) -> list[Part]:
    """Four legs below a plate of these half sizes."""
    return [
        ((x * (across - thick), height / 2, z * (deep - thick)), (thick, height / 2, thick))
        for x in (-1, 1)
        for z in (-1, 1)
    ]


def _table(uniform: Uniform) -> Piece:
    across, deep, height = uniform(0.4, 0.8), uniform(0.3, 0.5), uniform(0.45, 0.75)
    return across, deep, [((0, height, 0), (across, 0.025, deep)), *_legs(across, deep, height, 0.03)]


def _chair(uniform: Uniform) -> Piece:
    half, height, back = uniform(0.19, 0.26), uniform(0.4, 0.5), uniform(0.2, 0.32)
    parts: list[Part] = [
        ((0, height, 0), (half, 0.025, half)),
        ((0, height + back, half - 0.025), (half, back, 0.025)),
    ]
    return half, half, [*parts, *_legs(half, half, height, 0.025)]


def _sofa(uniform: Uniform) -> Piece:
    across, deep, seat = uniform(0.7, 1.1), uniform(0.38, 0.48), uniform(0.2, 0.24)
    parts: list[Part] = [
        ((0, seat, 0), (across, seat, deep)),
        ((0, 0.45, deep - 0.1), (across, 0.45, 0.1)),
        ((across - 0.09, 0.32, 0), (0.09, 0.32, deep)),
        ((0.09 - across, 0.32, 0), (0.09, 0.32, deep)),
    ]
    return across, deep, parts


def _bed(uniform: Uniform) -> Piece:
    across, deep, high = uniform(0.45, 0.85), uniform(0.9, 1.0), uniform(0.14, 0.2)
    parts: list[Part] = [
        ((0, 0.45, deep - 0.03), (across, 0.45, 0.03)),
        ((0, high, 0), (across, high, deep)),
        ((0, 2 * high + 0.06, deep - 0.3), (0.7 * across, 0.06, 0.18)),
    ]
    return across, deep, parts


def _shelf(uniform: Uniform) -> Piece:
    across, deep, half = uniform(0.35, 0.6), uniform(0.14, 0.2), uniform(0.6, 1.0)
    boards = int(uniform(3, 6))
    parts: list[Part] = [((0, half, deep - 0.01), (across, half, 0.01))]
    parts += [((side * (across - 0.015), half, 0), (0.015, half, deep)) for side in (-1, 1)]
    parts += [
        ((0, 0.02 + board / (boards - 1) * (2 * half - 0.04), 0), (across, 0.015, deep)) for board in range(boards)
    ]
    return across, deep, parts


def _lamp(uniform: Uniform) -> Piece:
    radius, height = uniform(0.13, 0.2), uniform(1.1, 1.6)
    parts: list[Part] = [
        ((0, height, 0), (radius, radius, radius)),
        ((0, height / 2, 0), (0.02, height / 2, 0.02)),
        ((0, 0.02, 0), (0.14, 0.02, 0.14)),
    ]
    return 0.2, 0.2, parts


def _box(uniform: Uniform) -> Piece:
    across, high, deep = uniform(0.12, 0.35), uniform(0.1, 0.35), uniform(0.12, 0.35)
    return across, deep, [((0, high, 0), (across, high, deep))]


def _ball(uniform: Uniform) -> Piece:
    radius = uniform(0.1, 0.28)
    return radius, radius, [((0, radius, 0), (radius, radius, radius))]


PIECES: dict[str, Callable[[Uniform], Piece]] = {
    "table": _table,
    "chair": _chair,
    "sofa": _sofa,
    "bed": _bed,
    "shelf": _shelf,
    "lamp": _lamp,
    "box": _box,
    "ball": _ball,
}
