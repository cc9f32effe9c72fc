"""Renders stand-in i-CLEVR pictures: analytic ray tracing of CLEVR's scene, compiled by numba. Knows no files.

The scene's numbers come from CLEVR's published scene file (Johnson et al. 2017) and were checked against Cycles
renders. Those marked `fitted` were fitted to these renders by least squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from iclevr.scenes.scene import ASPECT, CAMERA, COLORS, RADIUS, TAN_HALF_FOV, Floats, SceneObject, camera_axes

ALBEDO = np.array(list(COLORS.values())) / 255
BEVEL_CUBE, BEVEL_CYLINDER = 0.16 * RADIUS, 0.10 * RADIUS
GROUND_ALBEDO = 0.8

# Area lamps: position, side, power in W, colour, fitted factor.
LAMPS = (
    ((6.4467, -2.9052, 4.2584), 0.5, 78.54, (1.0, 0.932, 0.817), 1.04),
    ((-4.6711, -4.0136, 3.0112), 0.5, 23.56, (0.762, 0.818, 1.0), 1.0),
    ((-1.1685, 2.646, 5.8157), 1.0, 39.27, (1.0, 1.0, 1.0), 0.92),
)
LAMP_JITTER = 1.0  # CLEVR moves each lamp by up to this along each axis, in world units, from scene to scene
SUN_DIRECTION = np.array([0.4145, -0.1946, 0.889])
SUN_IRRADIANCE = 0.45 * 0.905  # fitted factor 0.905

# The ground's height over q, the distance towards the back: flat near the origin, then rising to a wall.
GROUND_BEARING = np.array([math.cos(math.radians(154.58)), math.sin(math.radians(154.58))])
GROUND_OFFSET = 14.0
GROUND_Q = np.array([-40.0, -20.0, -14.0, -10.0, -7.4, -4.4, -2.1, 0.0, 1.05, 2.05, 3.1, 6.0])
GROUND_HEIGHT = np.array([0.0, 0.0, 0.006, 0.032, 0.084, 0.26, 0.62, 1.6, 2.8, 5.5, 12.0, 60.0])

ROUGHNESS, F0 = 0.35, 0.0123  # Beckmann lobe of the rubber
MIRRORED_GROUND, MIRRORED_WALL = 0.20, 0.14
# Indirect irradiance of the ground over the picture, fitted: 1, Y, X, XY, Y^2 with X, Y from -1 to 1, Y = 1 at the top.
GROUND_INDIRECT = np.array([0.0731, 0.0412, -0.0187, 0.0192, 0.0157])
# Fitted: how strongly near objects dim and tint the ground's indirect light; then, on objects, the radiance from below,
# from the wall and from everywhere, the share that reaches the foot, the share mirrored, and how much neighbours block.
INDIRECT = np.array([0.393, 5.80, 0.1715, -0.0586, 0.006, 1.11, 0.5155, 0.265])

LAMP_GRID = 4  # for soft shadows, each sample takes one of 4 x 4 points of a lamp


def ground_height(q: Floats) -> Floats:
    """Return the ground's height, a monotone cubic through the measured points (Fritsch & Carlson 1980)."""
    h = np.diff(GROUND_Q)
    secant = np.diff(GROUND_HEIGHT) / h
    slope = np.zeros_like(GROUND_Q)
    w1, w2 = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]
    with np.errstate(divide="ignore"):  # beside a level piece the slope is 0
        slope[1:-1] = (w1 + w2) / (w1 / secant[:-1] + w2 / secant[1:])
    slope[-1] = secant[-1]
    i = np.clip(np.searchsorted(GROUND_Q, q, side="right") - 1, 0, len(h) - 1)
    u = (np.clip(q, GROUND_Q[0], GROUND_Q[-1]) - GROUND_Q[i]) / h[i]
    return np.asarray(
        (1 + 2 * u) * (1 - u) ** 2 * GROUND_HEIGHT[i]
        + u * (1 - u) ** 2 * h[i] * slope[i]
        + u * u * (3 - 2 * u) * GROUND_HEIGHT[i + 1]
        + u * u * (u - 1) * h[i] * slope[i + 1]
    )


def _ground_hits(directions: Floats) -> tuple[Floats, Floats]:
    """Find by bisection where rays from the camera meet the ground: points and unit normals, (N, 3) each."""

    def above(distance: Floats, directions: Floats) -> NDArray[np.bool_]:
        point = CAMERA + distance[:, None] * directions
        return np.asarray(point[:, 2] > ground_height(point[:, :2] @ GROUND_BEARING - GROUND_OFFSET))

    distances = np.linspace(2.0, 45.0, 173)
    first, left = np.full(len(directions), len(distances) - 1), np.arange(len(directions))
    for i, distance in enumerate(distances[:-1]):  # rays that have met the ground need no more of them
        is_above = above(np.full(len(left), distance), directions[left])
        first[left[~is_above]] = i
        left = left[is_above]
    near, far = distances[first - 1], distances[first]
    for _ in range(40):
        middle = 0.5 * (near + far)
        outside = above(middle, directions)
        near, far = np.where(outside, middle, near), np.where(outside, far, middle)
    point = CAMERA + far[:, None] * directions
    q, step = point[:, :2] @ GROUND_BEARING - GROUND_OFFSET, 1e-3
    rise = (ground_height(q + step) - ground_height(q - step)) / (2 * step)
    normal = np.column_stack([-rise[:, None] * GROUND_BEARING, np.ones_like(rise)])
    return point, normal / np.linalg.norm(normal, axis=1, keepdims=True)


LAMP_POSITIONS = np.array([position for position, *_ in LAMPS])
LIGHT = np.array(  # a lamp's power / pi, the sun's irradiance
    [*(np.array(color) * power * factor / math.pi for *_, power, color, factor in LAMPS), [SUN_IRRADIANCE] * 3]
)


def jittered_lamps(rng: np.random.Generator) -> Floats:
    """Return the lamps' positions, (lamps, 3), moved as CLEVR does for each scene."""
    return np.asarray(LAMP_POSITIONS + rng.uniform(-LAMP_JITTER, LAMP_JITTER, LAMP_POSITIONS.shape))


def _lamp_points(positions: Floats) -> Floats:
    """Return each lamp's centre, its axis and points on it, (lamps, 2 + LAMP_GRID^2, 3). Lamps face the origin.

    The points are ordered so that neighbours lie far apart on the lamp.
    """
    ticks = (np.arange(LAMP_GRID) + 0.5) / LAMP_GRID - 0.5
    order = [0, 10, 2, 8, 5, 15, 7, 13, 1, 11, 3, 9, 4, 14, 6, 12]
    found = []
    for position, (_, side, *_) in zip(positions, LAMPS, strict=True):
        axis = -position / np.linalg.norm(position)
        tangent = np.cross(axis, [0.0, 0.0, 1.0])
        tangent /= np.linalg.norm(tangent)
        bitangent = np.cross(axis, tangent)
        square = np.array([position + side * (u * tangent + v * bitangent) for u in ticks for v in ticks])
        found.append(np.vstack([position, axis, square[order]]))
    return np.array(found)


def _brightness(positions: Floats) -> float:
    """Return the irradiance of the ground at the origin relative to CLEVR's own lamps: indirect light follows it."""

    def irradiance(at: Floats) -> float:
        distance = np.linalg.norm(at, axis=1)
        return float((LIGHT[:-1].mean(1) * at[:, 2] / distance**3).sum() + SUN_IRRADIANCE * SUN_DIRECTION[2])

    return irradiance(positions) / irradiance(LAMP_POSITIONS)


@lru_cache(maxsize=8)
def film(width: int, height: int, samples: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Trace the empty scene with `samples` x `samples` rays a pixel, once for each film size.

    Returns directions, ground points and ground normals (height, width, samples^2, 3), and the ground's indirect light
    (height, width, samples^2).
    """
    forward, right, up = camera_axes()
    u = ((np.arange(width * samples) + 0.5) / (width * samples) * 2 - 1).reshape(1, width, 1, samples)
    v = (1 - (np.arange(height * samples) + 0.5) / (height * samples) * 2).reshape(height, 1, samples, 1)
    directions = forward + TAN_HALF_FOV * (u[..., None] * right + v[..., None] / ASPECT * up)
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    grid = (height, width, samples * samples)
    directions = directions.reshape(*grid, 3)
    point, normal = _ground_hits(directions.reshape(-1, 3))
    indirect = np.stack(np.broadcast_arrays(1.0, v, u, u * v, v * v), axis=-1) @ GROUND_INDIRECT
    return directions, point.reshape(directions.shape), normal.reshape(directions.shape), indirect.reshape(grid)


@njit(cache=True, fastmath=True)
def _hit(obj, ox, oy, oz, dx, dy, dz, limit):  # type: ignore[no-untyped-def]
    """Return the distance along a unit ray to an object, or -1. `obj`: shape, colour, x, y, cos, sin."""
    px, py, pz = ox - obj[2], oy - obj[3], oz - RADIUS
    shape = obj[0]
    along = -(px * dx + py * dy + pz * dz)
    apart = px * px + py * py + pz * pz - along * along
    bound = 0.36 if shape == 1 else (1.08 if shape == 0 else 0.72)
    if apart > bound:
        return -1.0
    if shape == 1:
        t = along - math.sqrt(RADIUS * RADIUS - apart)
        return t if 1e-4 < t < limit else -1.0
    if shape == 0:
        c, s = obj[4], obj[5]
        px, py = c * px + s * py, c * py - s * px
        dx, dy = c * dx + s * dy, c * dy - s * dx
        t0, t1 = _slab(px, dx, -1e30, 1e30)
        t0, t1 = _slab(py, dy, t0, t1)
    else:
        a = dx * dx + dy * dy
        b = px * dx + py * dy
        disc = b * b - a * (px * px + py * py - RADIUS * RADIUS)
        if disc <= 0 or a < 1e-12:
            return -1.0
        root = math.sqrt(disc)
        t0, t1 = (-b - root) / a, (-b + root) / a
    t0, t1 = _slab(pz, dz, t0, t1)
    return t0 if t0 < t1 and 1e-4 < t0 < limit else -1.0


@njit(cache=True, fastmath=True, inline="always")
def _slab(p, d, t0, t1):  # type: ignore[no-untyped-def]
    """Narrow [t0, t1] to where |p + t d| <= RADIUS."""
    if abs(d) < 1e-9:
        d = 1e-9
    near, far = (-RADIUS - p) / d, (RADIUS - p) / d
    if near > far:
        near, far = far, near
    return max(t0, near), min(t1, far)


@njit(cache=True, fastmath=True)
def _shadowed(objects, count, skip, ox, oy, oz, dx, dy, dz, distance):  # type: ignore[no-untyped-def]
    for k in range(count):  # noqa: SIM110 - numba compiles no generator expressions
        if k != skip and _hit(objects[k], ox, oy, oz, dx, dy, dz, distance) > 0:
            return True
    return False


@njit(cache=True, fastmath=True, inline="always")
def _bend(p, bevel):  # type: ignore[no-untyped-def]
    """Return the sine of the normal's tilt at a coordinate on a face, which is not 0 in the bevel."""
    inside = abs(p) - (RADIUS - bevel)
    if inside <= 0:
        return 0.0
    return (inside / bevel if p > 0 else -inside / bevel) * 0.70711


@njit(cache=True, fastmath=True)
def _normal(obj, px, py, pz):  # type: ignore[no-untyped-def]
    """Return the unit normal at a point relative to the object's centre. It bends near edges."""
    shape = obj[0]
    if shape == 1:
        return px / RADIUS, py / RADIUS, pz / RADIUS
    if shape == 2:
        r = math.sqrt(px * px + py * py) + 1e-12
        if abs(pz) > RADIUS - 1e-4:
            side, nz = _bend(r, BEVEL_CYLINDER), math.copysign(1.0, pz)
        else:
            side, nz = 1.0, _bend(pz, BEVEL_CYLINDER)
        nx, ny = px / r * side, py / r * side
    else:
        c, s = obj[4], obj[5]
        lx, ly, lz = c * px + s * py, c * py - s * px, pz
        ax, ay, az = abs(lx), abs(ly), abs(lz)
        ux, uy, nz = _bend(lx, BEVEL_CUBE), _bend(ly, BEVEL_CUBE), _bend(lz, BEVEL_CUBE)
        if ax >= ay and ax >= az:
            ux = math.copysign(1.0, lx)
        elif ay >= az:
            uy = math.copysign(1.0, ly)
        else:
            nz = math.copysign(1.0, lz)
        nx, ny = c * ux - s * uy, s * ux + c * uy
    n = math.sqrt(nx * nx + ny * ny + nz * nz)
    return nx / n, ny / n, nz / n


@njit(cache=True, fastmath=True, inline="always")
def _specular(nx, ny, nz, lx, ly, lz, vx, vy, vz):  # type: ignore[no-untyped-def]
    """Return the Beckmann microfacet lobe times the lamp's cosine (Cook & Torrance 1982), with Schlick's Fresnel."""
    hx, hy, hz = lx + vx, ly + vy, lz + vz
    h = math.sqrt(hx * hx + hy * hy + hz * hz) + 1e-12
    nh = (nx * hx + ny * hy + nz * hz) / h
    nv = max(nx * vx + ny * vy + nz * vz, 0.05)
    nl = nx * lx + ny * ly + nz * lz
    vh = max((vx * hx + vy * hy + vz * hz) / h, 1e-3)
    if nh <= 0 or nl <= 0:
        return 0.0
    c2 = nh * nh
    d = math.exp((c2 - 1) / (c2 * ROUGHNESS * ROUGHNESS)) / (math.pi * ROUGHNESS * ROUGHNESS * c2 * c2)
    g = min(1.0, 2 * nh * nv / vh, 2 * nh * nl / vh)
    return d * g * (F0 + (1 - F0) * (1 - vh) ** 5) / (4 * nv)


@njit(cache=True, fastmath=True, inline="always")
def _towards(lamps, i, corner, px, py, pz):  # type: ignore[no-untyped-def]
    """Return the direction and the distance from p to a point of lamp i, or to the sun. `lamps`: of `_lamp_points`."""
    if i == len(LAMPS):
        return SUN_DIRECTION[0], SUN_DIRECTION[1], SUN_DIRECTION[2], 1e9
    point = lamps[i, 2 + corner]
    x, y, z = point[0] - px, point[1] - py, point[2] - pz
    distance = math.sqrt(x * x + y * y + z * z)
    return x / distance, y / distance, z / distance, distance


@njit(cache=True, fastmath=True)
def _shade_object(objects, count, lamps, brightness, k, ox, oy, oz, dx, dy, dz, corner, out):  # type: ignore[no-untyped-def]
    """Add to `out` the radiance of an object's point along -d: light of lamps and sun, of the ground and the wall."""
    obj = objects[k]
    nx, ny, nz = _normal(obj, ox - obj[2], oy - obj[3], oz - RADIUS)
    px, py, pz = ox + 1e-3 * nx, oy + 1e-3 * ny, oz + 1e-3 * nz
    color = ALBEDO[int(obj[1])]
    for i in range(len(LAMPS) + 1):
        lx, ly, lz, distance = _towards(lamps, i, corner, px, py, pz)
        cosine = nx * lx + ny * ly + nz * lz
        if cosine <= 0 or _shadowed(objects, count, k, px, py, pz, lx, ly, lz, distance):
            continue
        facing = 1.0
        if i < len(LAMPS):
            axis = lamps[i, 1]
            facing = max(-(lx * axis[0] + ly * axis[1] + lz * axis[2]), 0.0) / (distance * distance)
        lobe = _specular(nx, ny, nz, lx, ly, lz, -dx, -dy, -dz)
        for c in range(3):
            out[c] += facing * LIGHT[i, c] * (cosine * color[c] / math.pi + lobe)
    # Light from below (the lit ground, darker towards the object's foot), from the wall behind, and the rest.
    wall = max(-0.903 * nx + 0.429 * ny, 0.0)
    below = 0.5 * (1 - nz)
    foot = min(1.0, INDIRECT[5] + (1 - INDIRECT[5]) * oz / (2 * RADIUS))
    for m in range(count):  # near objects darken each other
        if m != k:
            qx, qy, qz = objects[m, 2] - px, objects[m, 3] - py, RADIUS - pz
            d2 = qx * qx + qy * qy + qz * qz
            cosine = (qx * nx + qy * ny + qz * nz) / math.sqrt(d2)
            if cosine > 0:
                foot *= 1 - min(0.8, INDIRECT[7] * cosine * RADIUS * RADIUS / d2)
    ambient = brightness * (foot * (INDIRECT[2] * below + INDIRECT[3] * wall) + INDIRECT[4])
    dn = dx * nx + dy * ny + dz * nz
    rx, ry, rz = dx - 2 * dn * nx, dy - 2 * dn * ny, dz - 2 * dn * nz
    mirrored = (
        MIRRORED_GROUND * foot if rz < 0 else (MIRRORED_WALL if -0.903 * rx + 0.429 * ry > 0.5 and rz < 0.35 else 0.0)
    )
    fresnel = F0 + (1 - F0) * (1 - min(1.0, abs(dn))) ** 5
    for c in range(3):
        out[c] += color[c] * ambient + fresnel * INDIRECT[6] * brightness * mirrored


@njit(cache=True, fastmath=True)
def _shade_ground(objects, count, lamps, point, normal, irradiance, corner, out):  # type: ignore[no-untyped-def]
    """Add to `out` the radiance of a ground point: each lamp that no object blocks, and indirect light."""
    ox, oy, oz = point[0], point[1], point[2]
    for i in range(len(LAMPS) + 1):
        if i < len(LAMPS):
            x, y, z = lamps[i, 0, 0] - ox, lamps[i, 0, 1] - oy, lamps[i, 0, 2] - oz
            d2 = x * x + y * y + z * z
            axis = lamps[i, 1]
            facing = -(x * axis[0] + y * axis[1] + z * axis[2])
            received = max(facing, 0.0) * max(x * normal[0] + y * normal[1] + z * normal[2], 0.0) / (d2 * d2)
        else:
            cosine = normal[0] * SUN_DIRECTION[0] + normal[1] * SUN_DIRECTION[1] + normal[2] * SUN_DIRECTION[2]
            received = max(cosine, 0.0)
        if received <= 0:
            continue
        lx, ly, lz, distance = _towards(lamps, i, corner, ox, oy, oz + 1e-3)
        if not _shadowed(objects, count, -1, ox, oy, oz + 1e-3, lx, ly, lz, distance):
            for c in range(3):
                out[c] += GROUND_ALBEDO / math.pi * received * LIGHT[i, c]
    oz += 1e-3
    ambient = GROUND_ALBEDO / math.pi * irradiance
    for c in range(3):
        out[c] += ambient
    for k in range(count):
        qx, qy, qz = objects[k, 2] - ox, objects[k, 3] - oy, RADIUS - oz
        d2 = max(qx * qx + qy * qy + qz * qz, RADIUS * RADIUS)
        factor = qz / math.sqrt(d2) * RADIUS * RADIUS / d2  # a sphere's form factor
        for c in range(3):
            out[c] += factor * ambient * (INDIRECT[1] * ALBEDO[int(objects[k, 1]), c] - INDIRECT[0])


@njit(cache=True, fastmath=True, parallel=True)
def _render(objects, counts, lamps, brightness, camera, directions, ground, normals, irradiance, out):  # type: ignore[no-untyped-def]
    height, width, samples = directions.shape[0], directions.shape[1], directions.shape[2]
    for b in prange(len(counts)):
        rgb, total = np.zeros(3), np.zeros(3)
        for y in range(height):
            for x in range(width):
                total[:] = 0
                for s in range(samples):
                    rgb[:] = 0
                    dx, dy, dz = directions[y, x, s, 0], directions[y, x, s, 1], directions[y, x, s, 2]
                    nearest, k = 1e9, -1
                    for i in range(counts[b]):
                        t = _hit(objects[b, i], camera[0], camera[1], camera[2], dx, dy, dz, nearest)
                        if t > 0:
                            nearest, k = t, i
                    corner = ((y & 3) * 4 + (x & 3) + 5 * s) & 15
                    if k >= 0:
                        ox, oy, oz = camera[0] + nearest * dx, camera[1] + nearest * dy, camera[2] + nearest * dz
                        _shade_object(
                            objects[b], counts[b], lamps[b], brightness[b], k, ox, oy, oz, dx, dy, dz, corner, rgb
                        )
                    else:
                        at, normal, ambient = ground[y, x, s], normals[y, x, s], brightness[b] * irradiance[y, x, s]
                        _shade_ground(objects[b], counts[b], lamps[b], at, normal, ambient, corner, rgb)
                    for c in range(3):
                        total[c] += rgb[c]
                for c in range(3):
                    v = min(max(total[c] / samples, 0.0), 1.0)
                    v = 12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055
                    out[b, y, x, c] = np.uint8(v * 255 + 0.5)


@njit(cache=True, fastmath=True)
def _count_seen(objects, count, camera, directions, seen):  # type: ignore[no-untyped-def]
    for y in range(directions.shape[0]):
        for x in range(directions.shape[1]):
            dx, dy, dz = directions[y, x, 0, 0], directions[y, x, 0, 1], directions[y, x, 0, 2]
            nearest, k = 1e9, -1
            for i in range(count):
                t = _hit(objects[i], camera[0], camera[1], camera[2], dx, dy, dz, nearest)
                if t > 0:
                    nearest, k = t, i
            if k >= 0:
                seen[k] += 1


def visible_pixels(scene: Sequence[SceneObject]) -> list[int]:
    """Return how many pixels of a 320x240 picture show each object, counted at half that resolution."""
    seen = np.zeros(len(scene), np.int64)
    _count_seen(np.array([obj.row() for obj in scene]), len(scene), CAMERA, film(160, 120, 1)[0], seen)
    return [4 * int(n) for n in seen]


def render(
    scenes: Sequence[Sequence[SceneObject]],
    *,
    samples: int = 2,
    lamps: Floats | None = None,
) -> NDArray[np.uint8]:
    """Render scenes as (N, 240, 320, 3) sRGB with `samples` x `samples` rays a pixel. Deterministic.

    `lamps`: the positions of each scene's lamps, (N, lamps, 3); CLEVR's own by default.
    """
    counts = np.array([len(scene) for scene in scenes])
    objects = np.zeros((len(scenes), max(1, counts.max(initial=0)), 6))
    for i, scene in enumerate(scenes):
        for j, obj in enumerate(scene):
            objects[i, j] = obj.row()
    if lamps is None:
        lamps = np.broadcast_to(LAMP_POSITIONS, (len(scenes), *LAMP_POSITIONS.shape))
    points = np.array([_lamp_points(positions) for positions in lamps])
    brightness = np.array([_brightness(positions) for positions in lamps])
    out = np.zeros((len(scenes), 240, 320, 3), np.uint8)
    _render(objects, counts, points, brightness, CAMERA, *film(320, 240, samples), out)
    return out


def squeeze(pictures: NDArray[np.uint8], size: int = 64) -> NDArray[np.uint8]:
    """Scale (N, H, W, 3) to (N, size, size, 3) by averaging over areas."""
    n, height, width, _ = pictures.shape
    flat = pictures.reshape(n, height, width * 3).astype(np.float32)
    rows = area_weights(height, size) @ flat  # (n, size, width * 3)
    columns = area_weights(width, size) @ rows.reshape(n * size, width, 3)  # (n * size, size, 3)
    return np.asarray(np.clip(columns + 0.5, 0, 255).astype(np.uint8).reshape(n, size, size, 3))


def area_weights(n: int, size: int) -> NDArray[np.float32]:
    """Return the (size, n) matrix that averages n samples into `size` cells of equal width."""
    edges = np.arange(n + 1) / n * size
    low, high = edges[:-1], edges[1:]
    cells = np.arange(size)[:, None]
    overlap = np.clip(np.minimum(high, cells + 1) - np.maximum(low, cells), 0, None)
    return np.asarray(overlap / overlap.sum(1, keepdims=True), np.float32)
