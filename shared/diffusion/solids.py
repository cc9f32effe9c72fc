"""Paints cubes, spheres and cylinders where a camera sees them: an upsampler takes edges of cubes from it.

What a solid covers follows from its place and its rotation, by central projection (Hartley & Zisserman 2004, ch. 6).
Only how it looks is learnt: the colours of its faces, edges and roundings, and what a small network adds to them. Each
object is painted in a window of its own, and windows are laid over each other, the nearest last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.device import initial_weights

Solid = Literal["cube", "sphere", "cylinder"]
Row = tuple[float, float, float, float]
# (3, 4): x, y and 1 in a picture, times the depth, of X, Y, Z and 1 in the scene. x, y are fractions of width and
# height; X, Y, Z and the depth are in radii of the solids, Z above the ground
Camera = tuple[Row, Row, Row]

SOLIDS: Final[tuple[Solid, ...]] = ("cube", "sphere", "cylinder")
WINDOW: Final = 0.35  # of a picture's width: side of the square in which an object is seen
WIDTH: Final = 128  # of the network that says how an object looks
HIDDEN: Final = 64  # channels of the network that adds to what is painted
AROUND: Final = 6.0  # pixels around a cube's edge in which a given picture may show it elsewhere
OUTSIDE: Final = -1e3  # pixels inside

# Pairs of points: 0 to 3 are a cube's corners on the ground, the first nearest to the camera and the others
# anticlockwise, 6 to 9 those above them. Each edge has the cube on the same side. The outline comes first; then the
# edge that faces the camera, and the two of the top that do.
EDGES: Final = ((1, 7), (9, 3), (0, 1), (3, 0), (7, 8), (8, 9), (0, 6), (6, 7), (9, 6))
OUTLINE, FACING = 6, 6
# 4, 5 and, above them, 10, 11: where the outline touches a cylinder's discs. A rectangle between these.
SIDES: Final = ((4, 10), (11, 5), (10, 11), (5, 4))
REACH: Final = (*[math.sqrt(2)] * 4, 1.0, 1.0)  # of these points from the middle, in radii
SURFACES: Final = 11  # of `_surfaces`
# Weights of x, y, 1, x^2, x y and y^2 in a conic, in its slope along x and in that along y, for each entry of its
# symmetric matrix (Hartley & Zisserman 2004, sec. 2.2.3): (9, 18)
OF_CONIC: Final = (
    (0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    (0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0),
    (1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    (0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0),
    (0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0),
    (0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0),
    (1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    (0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0),
    (0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
)


class Placed(NamedTuple):
    """Objects as the camera sees them, the nearest first: (B, N), or (B, N, n)."""

    there: Tensor
    solids: Tensor  # (B, N, 3): one of `SOLIDS`
    rows: Tensor  # (B, N, W), in blocks, of its window; so are columns
    columns: Tensor
    curves: Tensor  # (B, N, n, 6): weights of x, y, 1, x^2, x y and y^2, in pixels from the middle of the window
    turn: Tensor  # of the corner that is nearest to the camera, from the direction to it: four times the angle


class Seen(NamedTuple):
    """Where the points of its window are on each object: (B, N, n, W, W), in pixels; across and down in radii."""

    inside: Tensor  # its outline; negative outside
    top: Tensor  # inside its upper face
    left: Tensor  # of the edge that faces the camera
    across: Tensor
    down: Tensor


class Windows(NamedTuple):
    """Objects, each painted in a window of its own of W x W blocks: (B, N, ...), the nearest first."""

    rows: Tensor  # (W,), blocks of the picture; so are columns
    columns: Tensor
    painted: Tensor  # (C block^2, W, W)
    cover: Tensor  # (block^2, W, W): the share of each pixel that it covers
    share: Tensor  # (1, W, W): how near a block is to a cube's edges


class Painter(nn.Module):
    """Labels, places and rotations -> blocks of pixels (B, C block^2, rows, columns), and shares (B, 1, rows, columns).

    The shares are 1 at edges of cubes, and fall to 0 around them. `size`: height and width of a picture; `margin`
    blocks are painted around it. `objects`: how many it has at most; of more, the farthest are left out.
    """

    def __init__(
        self, solids: Sequence[Solid], camera: Camera, size: tuple[int, int], block: int, channels: int, objects: int,
        margin: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.size, self.block, self.channels, self.margin = size, block, channels, margin
        self.window = math.ceil(WINDOW * size[1] / block)  # in blocks
        self.objects = min(objects, len(solids))
        self.camera, self.solids = camera, [SOLIDS.index(solid) for solid in solids]
        self.label = nn.Parameter(initial_weights(len(solids), WIDTH, std=0.5))
        self.place = nn.Linear(6, WIDTH)
        self.mix = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.colour = nn.Linear(WIDTH, SURFACES * channels)
        self.look = nn.Linear(WIDTH, HIDDEN)
        self.where = nn.Linear(5, HIDDEN, bias=False)
        self.added = nn.Sequential(
            nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, channels * block**2)
        )

    def forward(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Paint labels (B, K, 5): multi-hot, position, cosine and sine of the rotation, as a network takes them."""
        return self._laid(self.windows(*self.nearest_first(labels)))

    def nearest_first(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is known of the objects that are painted (B, N, 5), the nearest first, and their labels (B, N).

        Of a picture with fewer objects, the last are not there.
        """
        which = (labels[..., 0] * 10 + labels[..., 2]).topk(self.objects, dim=1).indices
        return labels.gather(1, which[..., None].expand(-1, -1, labels.shape[-1])).float(), which

    def windows(self, known: Tensor, which: Tensor) -> Windows:
        """Paint each object in a window of its own, given what is known of it (B, N, 5), and its label (B, N)."""
        solids = F.one_hot(torch.tensor(self.solids, device=which.device), len(SOLIDS)).float()
        placed = self._placed(known, solids[which])
        turn = torch.stack([placed.turn.cos(), placed.turn.sin()], -1)
        places = [4 * known[..., 1:3] - 2, 2 * known[..., 3:], 2 * turn]
        looks = self.mix(self.label[which] + self.place(torch.cat(places, -1)))
        return Windows(placed.rows, placed.columns, *self._painted(placed, looks))

    def _painted(self, placed: Placed, looks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, N, _ = looks.shape
        seen = self._seen(placed)  # (B, N, block^2, W, W) each
        cover = covered(seen.inside)
        surfaces = self._surfaces(seen).reshape(B * N, SURFACES, -1)
        colours = self.colour(looks).reshape(B * N, self.channels, SURFACES)
        painted = (colours @ surfaces).reshape(B, N, self.channels, *cover.shape[2:]) * cover[:, :, None]
        where = torch.stack([*(torch.tanh(one * 0.125) for one in seen[:3]), *seen[3:]], 2).mean(3)
        where = where.reshape(B * N, 5, -1).transpose(1, 2)  # (B N, W W, 5)
        added = self.added(self.where(where) + self.look(looks).reshape(B * N, 1, -1)).transpose(1, 2)
        added = added.reshape(B, N, -1, self.window, self.window) * of_windows(placed.there)
        share = near_edges(seen).mean(2, keepdim=True) * of_windows(placed.solids[..., 0])
        return painted.flatten(2, 3) + added, cover, share

    def _laid(self, windows: Windows) -> tuple[Tensor, Tensor]:
        """Lay windows over each other, the nearest last. Products with ones, as a network that is exported needs."""
        rows, columns, painted, cover, share = windows
        sides = [torch.arange(-self.margin, side // self.block + self.margin, device=rows.device) for side in self.size]
        # (B, N, rows, W) and (B, N, W, columns): ones where a block of the picture is one of the window
        down = (sides[0][:, None] == rows[:, :, None]).float()
        across = (sides[1] == columns[..., None]).float()
        B, N = rows.shape[:2]

        def laid(window: Tensor, n: int) -> Tensor:
            """Return one object's window (B, N, D, W, W) in the picture, zeros around it: (B, rows, D, columns)."""
            own = window[:, n].transpose(1, 2).reshape(B, self.window, -1)
            return ((down[:, n] @ own).reshape(B, -1, self.window) @ across[:, n]).reshape(
                B, len(sides[0]), -1, len(sides[1])
            )

        picture = shares = rows.new_zeros(())
        for n in reversed(range(N)):
            left = 1 - laid(cover, n)[:, :, None]
            picture = picture * left + laid(painted, n).reshape(B, len(sides[0]), self.channels, -1, len(sides[1]))
            shares = torch.maximum(shares, laid(share, n))
        return picture.flatten(2, 3).transpose(1, 2), shares.transpose(1, 2)

    @torch.no_grad()
    def _surfaces(self, seen: Seen) -> Tensor:
        """Return what makes the pixels of an object look different: shares of its faces, and how near edges are."""
        top, left = covered(seen.top), covered(seen.left)
        below, edge = 1 - top, ridge(seen.top, 2.5)
        return torch.stack([
            torch.ones_like(top), top, below * left, below * ridge(seen.left, 2.5), edge * left, edge * (1 - left),
            ridge(seen.inside, 3.0), seen.across, seen.down, squared(seen.across), squared(seen.down),
        ], 2)  # fmt: skip

    @torch.no_grad()
    def _placed(self, known: Tensor, solids: Tensor) -> Placed:
        """Place objects (B, N, 5) before the camera."""
        device = known.device
        view = View(self.camera, self.size, device)
        place = known[..., 1:3].clamp(0.0, 1.0)  # of an object's middle
        # more of an object is seen below its middle than above
        before = torch.tensor([self.window // 2, self.window // 2 - 1], device=device)
        first = (place * view.size / self.block).floor() - before
        columns, rows = (first[..., None] + torch.arange(self.window, device=device)).unbind(2)
        centre = self.block * (first + self.window / 2)  # of the window, in pixels
        middle = projected(with_one(place) @ view.to_level(1.0).T)
        turn, points = view.points(middle, known[..., 3:])
        points = points - centre[..., None, :]
        radius = length(points[..., 4, :] - points[..., 5, :])[..., None, None] / 2
        off = (centre - place * view.size)[..., None]
        offsets = torch.cat([identity(2, off), off], -1) / radius
        flat = torch.cat([edges_of(points), lines(points, SIDES), offsets], -2)
        curves = torch.cat([F.pad(flat, [0, 3]), view.conics(middle, solids[..., 1] > 0, centre)], -2)
        return Placed(known[..., 0], solids, rows, columns, curves, turn)

    @torch.no_grad()
    def _seen(self, placed: Placed) -> Seen:
        """Return where the points of each object's window are."""
        values = placed.curves.movedim(2, 0) @ self._points(placed.curves.device)
        d = values.reshape(*values.shape[:3], self.block**2, self.window, self.window).unbind(0)
        edges, sides, (across, down), rounds = d[:9], d[9:13], d[13:15], d[15:]
        upper, lower = (inside_conic(*rounds[i : i + 3]) for i in (0, 3))
        is_cube, is_sphere, _ = map(of_windows, placed.solids.unbind(-1))
        strip = reduce(torch.minimum, sides) + OUTSIDE * is_sphere
        tube = torch.maximum(torch.maximum(upper, lower), strip)
        inside = torch.where(is_cube > 0, reduce(torch.minimum, edges[:OUTLINE]), tube)
        inside = inside.clamp(-40.0, 40.0) + OUTSIDE * (1 - of_windows(placed.there))
        top = torch.where(is_cube > 0, torch.minimum(edges[7], edges[8]), upper + OUTSIDE * is_sphere)
        left = edges[FACING] + OUTSIDE * (1 - is_cube)
        return Seen(inside, top, left, across, down)

    def _points(self, device: torch.device) -> Tensor:
        """Return x, y, 1, x^2, x y and y^2 of the pixels of a window, from its middle: (6, block^2 W W)."""
        pixels = torch.arange(self.block**2, device=device)[:, None, None]  # of a block, row by row
        blocks = self.block * torch.arange(self.window, device=device) + 0.5 - self.block * self.window / 2
        zero = torch.zeros(self.block**2, self.window, self.window, device=device)
        x, y = zero + (blocks + pixels % self.block), zero + (blocks[:, None] + pixels // self.block)
        return torch.stack([x, y, torch.ones_like(x), x * x, x * y, y * y]).flatten(1)


class ObjectPainter(nn.Module):
    """What is known of an object of each picture (B, 5), and its label (B,) -> its `Windows`, (B, ...)."""

    def __init__(self, painter: Painter) -> None:
        super().__init__()
        self.painter = painter

    def forward(self, known: Tensor, which: Tensor) -> tuple[Tensor, ...]:
        return tuple(one[:, 0] for one in self.painter.windows(known[:, None], which[:, None]))


class View:
    """What a camera sees of points in the scene, in radii. (B, N) objects stand on the ground.

    `size`: height and width of a picture.
    """

    def __init__(self, camera: Camera, size: tuple[int, int], device: torch.device) -> None:
        matrix = torch.tensor(camera, dtype=torch.float32, device=device)
        self.on_ground, self.up, self.origin = matrix[:, :2], matrix[:, 2], matrix[:, 3]
        self.to_ray = inverse(matrix[:, :3])
        self.eye = -self.to_ray @ self.origin
        self.size = torch.tensor([size[1], size[0]], dtype=torch.float32, device=device)

    def to_level(self, level: float) -> Tensor:
        """Return the matrix that takes x, y and 1 in a picture to X, Y and 1 at a height, times a depth."""
        return inverse(torch.cat([self.on_ground, (self.origin + level * self.up)[:, None]], 1))

    def points(self, middle: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Return `Placed.turn`, and where the points of `EDGES` and `SIDES` are, in pixels: (B, N, 12, 2).

        middle (B, N, 2): X, Y. rotation (B, N, 2): cosine and sine, as labels have them.
        """
        toward = self.eye[:2] - middle
        bearing = torch.atan2(toward[..., 1], toward[..., 0])
        twist = torch.atan2(rotation[..., 1], rotation[..., 0]) + math.pi - 4 * bearing
        turn = torch.atan2(twist.sin(), twist.cos())
        corners = turn[..., None] / 4 + torch.arange(4, device=middle.device) * (math.pi / 2)
        touching = (1 / length(toward)).clamp(max=0.99).acos()[..., None]
        bearings = bearing[..., None] + torch.cat([corners, touching, -touching], -1)
        reach = torch.tensor(REACH, device=middle.device)[:, None]
        low = middle[..., None, :] + reach * torch.stack([bearings.cos(), bearings.sin()], -1)
        low = low @ self.on_ground.T + self.origin
        return turn, projected(torch.cat([low, low + 2 * self.up], -2)) * self.size

    def conics(self, middle: Tensor, is_sphere: Tensor, centre: Tensor) -> Tensor:
        """Return an object's upper disc and its lower one, or a sphere's outline twice, as conics: (B, N, 6, 6).

        Each has three rows, as `OF_CONIC`. centre (B, N, 2): the pixel from which they are seen.
        """
        unit = identity(3, middle)
        from_eye = with_one(middle) - self.eye
        ball = torch.cat([from_eye[..., None, :], unit], -2) @ self.to_ray  # sums of squares of these rows
        of_ball = F.pad(1 - (from_eye * from_eye).sum(-1, keepdim=True).expand_as(from_eye), [1, 0], value=1.0)
        from_middle = torch.cat([unit[..., :2], with_one(-middle)[..., None]], -1)
        discs = torch.stack([F.pad(from_middle @ self.to_level(level), [0, 0, 0, 1]) for level in (2, 0)], 2)
        is_sphere = is_sphere[..., None, None]
        weights = torch.where(
            is_sphere, of_ball[:, :, None], torch.tensor([-1.0, -1.0, 1.0, 0.0], device=middle.device)
        )
        rows = torch.where(is_sphere[..., None], ball[:, :, None], discs)
        in_pixels = torch.cat([unit[..., :2, :2] / self.size, (centre / self.size)[..., None]], -1)
        rows = rows @ torch.cat([in_pixels, unit[..., 2:, :]], -2)[:, :, None]
        matrices = (weights[..., None] * rows).transpose(-1, -2) @ rows
        of_conic = torch.tensor(OF_CONIC, dtype=torch.float32, device=middle.device)
        return (matrices.flatten(-2) @ of_conic).reshape(*middle.shape[:2], 6, 6)


def lay(window: Windows, pixels: Tensor, shares: Tensor, margin: int) -> None:
    """Lay one object's window over a picture (C block^2, rows, columns), and its share (1, rows, columns), in place."""
    W = len(window.rows)
    first = int(window.rows[0]) + margin, int(window.columns[0]) + margin
    there = [slice(max(at, 0), max(at + W, 0)) for at in first]
    inside = [slice(max(-at, 0), max(side - at, 0)) for at, side in zip(first, pixels.shape[1:], strict=True)]
    below, share = pixels[:, there[0], there[1]], shares[:, there[0], there[1]]
    painted, cover, near = (one[:, inside[0], inside[1]] for one in window[2:])
    left = (1 - cover).repeat(len(painted) // len(cover), 1, 1)
    torch.addcmul(painted, below, left, out=below)
    torch.maximum(share, near, out=share)


def of_windows(values: Tensor) -> Tensor:
    """Return a value for each object (B, N) as one for all points of its window."""
    return values[..., None, None, None]


def squared(*values: Tensor) -> Tensor:
    """Return the sum of the values' squares. As products, since OpenVINO takes powers slowly."""
    total = values[0] * values[0]
    for value in values[1:]:
        total = total + value * value
    return total


def covered(inside: Tensor) -> Tensor:
    """Return the share of a pixel that is covered, if its middle is so many pixels inside an edge."""
    return (0.5 + inside).clamp(0.0, 1.0)


def near_edges(seen: Seen) -> Tensor:
    """Return 1 up to half of AROUND pixels from an object's outline and the edges inside it, and 0 AROUND away."""
    inner = torch.minimum(seen.top.abs(), torch.maximum(seen.left.abs(), seen.top))
    distance = torch.minimum(seen.inside.abs(), torch.maximum(inner, -seen.inside))
    return (2 * ridge(distance, AROUND)).clamp(max=1.0)


def ridge(distance: Tensor, width: float) -> Tensor:
    """Return 1 at an edge, and nothing `width` pixels away."""
    return (1 - distance.abs() * (1 / width)).clamp(min=0)


def edges_of(points: Tensor) -> Tensor:
    """Return the lines of `EDGES` between points (B, N, 12, 2): (B, N, 9, 3).

    A cube near whose side's normal the camera is shows one side only: edges of this one bound the outline instead.
    """
    edges = lines(points, EDGES)
    nearest = points[..., :1, :]
    shows_both = (edges[..., :2, :2] * nearest).sum(-1, keepdim=True) + edges[..., :2, 2:] > 0
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0], device=points.device)[:, None]
    instead = signs * edges[..., [FACING, FACING, 7, 8], :]
    outline = torch.where(torch.cat([shows_both, shows_both], -2), edges[..., :4, :], instead)
    return torch.cat([outline, edges[..., 4:, :]], -2)


def lines(points: Tensor, edges: Sequence[tuple[int, int]]) -> Tensor:
    """Return a, b, c of lines from point to point: a x + b y + c is how far x, y is to the left, y pointing down.

    points (..., n, 2); edges: pairs of them. -> (..., len(edges), 3)
    """
    first, second = (points[..., list(ends), :] for ends in zip(*edges, strict=True))
    along = second - first
    along = along / length(along)[..., None].clamp(min=1e-3)
    across = torch.stack([along[..., 1], -along[..., 0]], -1)
    return torch.cat([across, -(across * first).sum(-1, keepdim=True)], -1)


def length(vectors: Tensor) -> Tensor:
    """Return the lengths of vectors (..., n)."""
    return (vectors * vectors).sum(-1).sqrt()


def with_one(vectors: Tensor) -> Tensor:
    """Append 1 to vectors (..., n)."""
    return F.pad(vectors, [0, 1], value=1.0)


def identity(size: int, like: Tensor) -> Tensor:
    """Return a unit matrix for each object of `like` (B, N, ...)."""
    return torch.eye(size, device=like.device).expand(*like.shape[:2], size, size)


def projected(points: Tensor) -> Tensor:
    """Return the points (..., 2) of homogeneous ones (..., 3) before the camera."""
    return (points[..., :2] / points[..., 2:].clamp(min=1e-4)).clamp(-50.0, 50.0)


def inverse(matrix: Tensor) -> Tensor:
    """Return the inverse of a matrix (3, 3), by Cramer's rule: ONNX knows no inverse, of numpy's arrays neither."""
    a, b, c = matrix.unbind(1)
    rows = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)])
    return rows / torch.dot(a, rows[0])


def inside_conic(value: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Return about how many pixels inside a conic points are, given its value there, and its slopes (Sampson 1982)."""
    return value / squared(across, down).sqrt().clamp(min=1e-9)
