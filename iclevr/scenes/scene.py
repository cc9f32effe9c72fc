"""The objects of a scene, the camera, and the rules of placement. Knows no light and no files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SHAPES = ("cube", "sphere", "cylinder")
COLORS = {  # sRGB values, used as linear reflectance, as CLEVR does
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}
RADIUS = 0.6  # world units: a sphere's and a cylinder's radius, a cube's half-edge
HALF_SIDE = 3.0  # world units: objects stand in [-3, 3]^2
CAMERA = np.array([7.4811, -6.5076, 5.3437])
TAN_HALF_FOV = 16 / 35  # horizontal: lens 35 on a 32 wide sensor
ASPECT = 4 / 3


@dataclass(frozen=True)
class SceneObject:
    """One object on the ground. `x, y`: world units; `rotation`: radians about z."""

    shape: str
    color: str
    x: float
    y: float
    rotation: float

    def seen_rotation(self) -> float | None:
        """Return a cube's rotation as a fraction of a quarter turn, after which it looks the same: from 0 to 1.

        None for spheres and cylinders, whose rotation is not to be seen.
        """
        return self.rotation * 2 / math.pi % 1 if self.shape == "cube" else None

    def row(self) -> list[float]:
        kind = [SHAPES.index(self.shape), list(COLORS).index(self.color)]
        return [*kind, self.x, self.y, math.cos(self.rotation), math.sin(self.rotation)]


@cache
def camera_axes() -> tuple[Floats, Floats, Floats]:
    """Return the unit vectors forward, right and up of the camera, which looks at the origin."""
    forward = -CAMERA / np.linalg.norm(CAMERA)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    return forward, right, np.cross(right, forward)


@cache
def projection() -> tuple[tuple[float, ...], ...]:
    """Return the camera's matrix (3, 4): x, y and 1 in a picture, times the depth, of X, Y, Z and 1 in the scene.

    x, y: fractions of width and height; X, Y, Z and the depth: in radii, Z above the ground.
    """
    forward, right, up = camera_axes()
    across, down = forward / 2 + right / (2 * TAN_HALF_FOV), forward / 2 - up * ASPECT / (2 * TAN_HALF_FOV)
    return tuple((*map(float, row), float(row @ -CAMERA) / RADIUS) for row in (across, down, forward))


def picture_position(placed: SceneObject) -> tuple[float, float]:
    """Return where the object's centre appears, in fractions of width and height from the upper left corner."""
    x, y, depth = np.array(projection()) @ [placed.x / RADIUS, placed.y / RADIUS, 1, 1]
    return float(x / depth), float(y / depth)


def ground_position(point: tuple[float, float]) -> tuple[float, float]:
    """Return the world's x and y of an object whose centre appears at `point`: the inverse of `picture_position`."""
    forward, right, up = camera_axes()
    across, upward = (2 * point[0] - 1) * TAN_HALF_FOV, (1 - 2 * point[1]) * TAN_HALF_FOV / ASPECT
    ray = forward + across * right + upward * up
    x, y, _ = CAMERA + (RADIUS - CAMERA[2]) / ray[2] * ray
    return float(x), float(y)


def breaches(placed: Iterable[tuple[float, float]], x: float, y: float) -> Iterator[float]:
    """Return by how many world units an object at x, y breaks each of CLEVR's placement rules, if more than 0.

    Objects stand in a square, apart from others, also along both camera axes, and inside the frame.
    """
    forward, right, up = camera_axes()
    for other_x, other_y in placed:
        dx, dy = x - other_x, y - other_y
        across, along = dx * right[0] + dy * right[1], (dx * forward[0] + dy * forward[1]) / math.hypot(*forward[:2])
        yield 2 * RADIUS + 0.25 - math.hypot(dx, dy)
        yield 0.4 - min(abs(across), abs(along))
    yield max(abs(x), abs(y)) - HALF_SIDE
    centre = np.array([x, y, RADIUS]) - CAMERA
    half_width = centre @ forward * TAN_HALF_FOV  # of what the camera sees at this depth
    yield abs(centre @ right) + 1.25 * RADIUS - 0.97 * half_width
    yield abs(centre @ up) + 1.25 * RADIUS - 0.97 * half_width / ASPECT


def place(names: Sequence[tuple[str, str]], rng: np.random.Generator, *, centre: bool = True) -> list[SceneObject]:
    """Place (colour, shape) objects uniformly in a square by rejection; the first at the origin if `centre`."""
    while True:
        scene: list[SceneObject] = []
        for color, shape in names:
            others = [(one.x, one.y) for one in scene]
            for _ in range(200):
                fixed = centre and not scene
                x, y = (0.0, 0.0) if fixed else rng.uniform(-HALF_SIDE, HALF_SIDE, 2)
                if fixed or all(breach <= 0 for breach in breaches(others, x, y)):
                    scene.append(SceneObject(shape, color, float(x), float(y), float(rng.uniform(0, 2 * math.pi))))
                    break
            else:
                break
        if len(scene) == len(names):
            return scene
