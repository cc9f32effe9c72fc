"""The objects of a scene, the camera, and the rules of placement. Knows no light and no files."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def picture_position(placed: SceneObject) -> tuple[float, float]:
    """Return where the object's centre appears, in fractions of width and height from the upper left corner."""
    forward, right, up = camera_axes()
    centre = np.array([placed.x, placed.y, RADIUS]) - CAMERA
    reach = centre @ forward * TAN_HALF_FOV
    return float(0.5 + 0.5 * (centre @ right) / reach), float(0.5 - 0.5 * (centre @ up) / (reach / ASPECT))


def _fits(placed: list[SceneObject], x: float, y: float) -> bool:
    """Check CLEVR's placement rules: inside the frame, and apart from others, also along both camera axes."""
    forward, right, up = camera_axes()
    for other in placed:
        dx, dy = x - other.x, y - other.y
        across, along = dx * right[0] + dy * right[1], (dx * forward[0] + dy * forward[1]) / math.hypot(*forward[:2])
        if math.hypot(dx, dy) < 2 * RADIUS + 0.25 or min(abs(across), abs(along)) < 0.4:
            return False
    centre = np.array([x, y, RADIUS]) - CAMERA
    depth = centre @ forward
    reach = 1.25 * RADIUS
    u = (abs(centre @ right) + reach) / (depth * TAN_HALF_FOV)
    v = (abs(centre @ up) + reach) / (depth * TAN_HALF_FOV / ASPECT)
    return bool(max(u, v) <= 0.97)


def place(names: Sequence[tuple[str, str]], rng: np.random.Generator, *, centre: bool = True) -> list[SceneObject]:
    """Place (colour, shape) objects uniformly in [-3, 3]^2 by rejection; the first at the origin if `centre`."""
    while True:
        scene: list[SceneObject] = []
        for color, shape in names:
            for _ in range(200):
                fixed = centre and not scene
                x, y = (0.0, 0.0) if fixed else rng.uniform(-3, 3, 2)
                if fixed or _fits(scene, x, y):
                    scene.append(SceneObject(shape, color, float(x), float(y), float(rng.uniform(0, 2 * math.pi))))
                    break
            else:
                break
        if len(scene) == len(names):
            return scene
