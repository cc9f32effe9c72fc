"""Paints cubes, spheres and cylinders where a camera sees them: an upsampler takes the places of edges from it.

What a solid covers follows from its place and its rotation, by central projection (Hartley & Zisserman 2004, ch. 6).
Only how it looks is learnt: the colours of its faces, edges and roundings, and what a small network adds to them. Each
object is painted in a window of its own, and windows are laid over each other, the nearest last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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

Line = tuple[Tensor, Tensor, Tensor]  # a, b, c: a x + b y + c pixels inside

SOLIDS: Final[tuple[Solid, ...]] = ("cube", "sphere", "cylinder")
FEW_OBJECTS: Final = 3  # as many as a picture of i-CLEVR has at most
WINDOW: Final = 0.35  # of a picture's width: side of the square in which an object is seen
WIDTH: Final = 128  # of the network that says how an object looks
HIDDEN: Final = 64  # channels of the network that adds to what is painted
AROUND: Final = 6.0  # pixels around an edge in which a given picture may show it elsewhere
OUTSIDE: Final = -1e3  # pixels inside

# Pairs of a cube's corners: 0 to 3 on the ground, the first nearest to the camera and the others anticlockwise, 4 to 7
# above them. Each edge has the cube on the same side. The outline comes first; then the edge that faces the camera, and
# the two of the top that do.
EDGES: Final = ((1, 5), (7, 3), (0, 1), (3, 0), (5, 6), (6, 7), (0, 4), (4, 5), (7, 4))
OUTLINE: Final = 6
# The same of the rectangle between a cylinder's discs: its sides are where the outline touches them.
SIDES: Final = ((0, 2), (3, 1), (2, 3), (1, 0))
SURFACES: Final = 11  # of `_surfaces`


class Placed(NamedTuple):
    """Objects as the camera sees them, the nearest first: (B, N), or (B, N, n). In pixels, but ground in radii."""

    there: Tensor
    solids: Tensor  # (B, N, 3): one of `SOLIDS`
    middle: tuple[Tensor, Tensor]  # x, y
    ground: tuple[Tensor, Tensor]
    to_eye: tuple[Tensor, Tensor]  # on the ground, in radii
    lines: Line  # of `EDGES` and `SIDES`, seen from the middle
    radius: Tensor
    turn: Tensor  # of the corner that is nearest to the camera, from the direction to it: four times the angle


class Seen(NamedTuple):
    """Where the points of its window are on each object: (B, N, n, W, W), in pixels; across and down in radii."""

    inside: Tensor  # its outline; negative outside
    top: Tensor  # inside its upper face
    left: Tensor  # of the edge that faces the camera
    across: Tensor
    down: Tensor


class Painter(nn.Module):
    """Labels, places and rotations -> blocks of pixels (B, C block^2, rows, columns), and shares (B, 1, rows, columns).

    The shares are 1 at edges, and fall to 0 around them. `size`: height and width of a picture; `margin`
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

    def forward(self, labels: Tensor, objects: int | None = None) -> tuple[Tensor, Tensor]:
        """Paint labels (B, K, 5): multi-hot, position, cosine and sine of the rotation, as a network takes them.

        `objects`: as many as a picture has at most, if that is known to be fewer.
        """
        nearest_first = labels[..., 0] * 10 + labels[..., 2]
        which = nearest_first.topk(min(objects or self.objects, self.objects), dim=1).indices  # (B, N)
        known = labels.gather(1, which[..., None].expand(-1, -1, labels.shape[-1])).float()
        solids = F.one_hot(torch.tensor(self.solids, device=labels.device), len(SOLIDS)).float()
        placed = self._placed(known, solids[which])
        turn = torch.stack([placed.turn.cos(), placed.turn.sin()], -1)
        places = [4 * known[..., 1:3] - 2, 2 * known[..., 3:], 2 * turn]
        looks = self.mix(self.label[which] + self.place(torch.cat(places, -1)))
        rows, columns = self._windows(placed)
        return self._laid(rows, columns, *self._painted(placed, rows, columns, looks))

    def _windows(self, placed: Placed) -> list[Tensor]:
        """Return the rows and columns, in blocks, of each object's window: (B, N, W) each."""
        across, down = (
            (middle / self.block).floor()[..., None] + torch.arange(-before, self.window - before, device=middle.device)
            for middle, before in zip(placed.middle, (self.window // 2, self.window // 2 - 1), strict=True)
        )  # more of an object is seen below its middle than above
        return [down, across]

    def _painted(
        self, placed: Placed, rows: Tensor, columns: Tensor, looks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return each object's window in blocks (B, N, ..., W, W): what is painted, C block^2; what it covers, block^2;
        and how near it is to edges, 1.
        """
        B, N, _ = looks.shape
        pixels = torch.arange(self.block**2, device=looks.device)[:, None, None]  # of a block, row by row
        u = self.block * columns[:, :, None, None] + (pixels % self.block + 0.5) - of_windows(placed.middle[0])
        v = self.block * rows[:, :, None, :, None] + (pixels // self.block + 0.5) - of_windows(placed.middle[1])
        seen = self._seen(placed, u, v)  # (B, N, block^2, W, W) each
        cover = covered(seen.inside)
        surfaces = self._surfaces(seen).reshape(B * N, SURFACES, -1)
        colours = self.colour(looks).reshape(B * N, self.channels, SURFACES)
        painted = (colours @ surfaces).reshape(B, N, self.channels, *cover.shape[2:]) * cover[:, :, None]
        where = torch.stack([*(torch.tanh(one / 8) for one in seen[:3]), *seen[3:]], 2).mean(3)
        where = where.reshape(B * N, 5, -1).transpose(1, 2)  # (B N, W W, 5)
        added = self.added(self.where(where) + self.look(looks).reshape(B * N, 1, -1)).transpose(1, 2)
        added = added.reshape(B, N, -1, self.window, self.window) * of_windows(placed.there)
        share = near_edges(seen).mean(2, keepdim=True)
        return painted.flatten(2, 3) + added, cover, share

    def _laid(
        self, rows: Tensor, columns: Tensor, painted: Tensor, cover: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Lay windows over each other, the nearest last."""
        sides = [torch.arange(-self.margin, side // self.block + self.margin, device=rows.device) for side in self.size]
        # (B, N, rows, W) and (B, N, W, columns): ones where a block of the picture is one of the window
        down = (sides[0][:, None] == rows[:, :, None]).float()
        across = (sides[1] == columns[..., None]).float()
        B, N = rows.shape[:2]

        def laid(windows: Tensor, n: int) -> Tensor:
            """Return one object's window (B, N, D, W, W) in the picture, zeros around it: (B, rows, D, columns)."""
            own = windows[:, n].transpose(1, 2).reshape(B, self.window, -1)
            return ((down[:, n] @ own).reshape(B, -1, self.window) @ across[:, n]).reshape(
                B, len(sides[0]), -1, len(sides[1])
            )

        picture = shares = rows.new_zeros(())
        for n in reversed(range(N)):
            left = 1 - laid(cover, n)[:, :, None]
            picture = picture * left + laid(painted, n).reshape(B, len(sides[0]), self.channels, -1, len(sides[1]))
            shares = torch.maximum(shares, laid(share, n))
        return picture.flatten(2, 3).transpose(1, 2), shares.transpose(1, 2)

    def _columns(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return what the camera makes of a step along X, Y and Z, in radii, and of the origin: (3,) each."""
        return torch.tensor(self.camera, dtype=torch.float32, device=device).unbind(1)

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
        height, width = self.size
        x, y = known[..., 1].clamp(0.0, 1.0), known[..., 2].clamp(0.0, 1.0)
        a, b, up, origin = self._columns(known.device)
        eye_x, eye_y, _ = (-one for one in solved(a, b, up, origin))
        X, Y = on_plane(a, b, origin + up, x, y)  # a radius above the ground is an object's middle
        toward = eye_x - X, eye_y - Y
        far = squared(*toward).sqrt()
        bearing = angle(*toward)
        twist = angle(known[..., 3], known[..., 4]) + math.pi - 4 * bearing  # four times the turn of a corner
        turn = angle(twist.cos(), twist.sin())
        corners = (bearing + turn / 4)[..., None] + torch.arange(4, device=x.device) * (math.pi / 2)
        touching = (1 / far).clamp(max=0.99).acos()
        touched = torch.stack([bearing + touching, bearing - touching], -1)

        def project(bearings: Tensor, radius: float) -> tuple[Tensor, Tensor]:
            """Return where points of an object's lower face are, and of its upper one, seen from the object's middle:
            bearings (B, N, n) -> (B, N, 2 n).
            """
            X_n, Y_n = X[..., None] + radius * bearings.cos(), Y[..., None] + radius * bearings.sin()
            on_ground = [a[i] * X_n + b[i] * Y_n + origin[i] for i in range(3)]
            p = [torch.cat([one, one + 2 * up[i]], -1) for i, one in enumerate(on_ground)]
            depth = p[2].clamp(min=0.1)
            return (p[0] / depth - x[..., None]) * width, (p[1] / depth - y[..., None]) * height

        cube, cylinder = project(corners, math.sqrt(2)), project(touched, 1.0)
        a_n, b_n, c_n = (torch.cat(parts, -1) for parts in zip(lines(cube, EDGES), lines(cylinder, SIDES), strict=True))
        # a cube near whose side's normal the camera is shows one side only: edges of this one bound the outline instead
        at_corner = a_n * cube[0][..., :1] + b_n * cube[1][..., :1] + c_n
        shown = torch.cat([at_corner[..., :2] > 0] * 2, -1)
        edges = []
        for one in (a_n, b_n, c_n):
            instead = torch.cat([one[..., 6:7], -one[..., 6:7], one[..., 7:9]], -1)
            edges.append(torch.cat([torch.where(shown, one[..., :4], instead), one[..., 4:]], -1))
        radius = squared(*(one[..., 0] - one[..., 1] for one in cylinder)).sqrt() / 2
        return Placed(
            known[..., 0], solids, (x * width, y * height), (X, Y), toward, (edges[0], edges[1], edges[2]), radius, turn
        )

    @torch.no_grad()
    def _seen(self, placed: Placed, u: Tensor, v: Tensor) -> Seen:
        """Return where the points of each object's window are, u and v pixels from its middle."""
        height, width = self.size
        across, down, off = ([of_windows(one) for one in part.unbind(-1)] for part in placed.lines)
        d = [p * u + (q * v + r) for p, q, r in zip(across, down, off, strict=True)]
        a, b, up, origin = self._columns(u.device)
        eye = [-one for one in solved(a, b, up, origin)]
        X, Y, to_x, to_y, radius = map(of_windows, (*placed.ground, *placed.to_eye, placed.radius))
        x, y = (one + of_windows(middle) for one, middle in zip((u, v), placed.middle, strict=True))
        far = squared(to_x, to_y).sqrt()
        flat = eye[2] / squared(far, eye[2]).sqrt()  # how much shorter a disc is toward the camera
        discs = []
        for level in (0, 2):
            on_x, on_y = on_plane(a, b, origin + level * up, x / width, y / height)
            on_x, on_y = on_x - X, on_y - Y
            rho = squared(on_x, on_y).sqrt().clamp(1e-3, 20.0)
            along, aside = (on_x * to_x + on_y * to_y) / far, (on_x * to_y - on_y * to_x) / far
            steep = squared(aside, along / flat).sqrt() / rho
            discs.append((1 - rho) * radius / steep.clamp(min=0.3))
        ray = solved(a, b, up, None, x / width, y / height)
        depth = squared(*ray).sqrt()
        lift = 1 - eye[2]
        distance = squared(far, lift).sqrt()
        cosine = (lift * ray[2] - to_x * ray[0] - to_y * ray[1]) / (depth * distance)
        ball = (1 - (1 - squared(cosine)).clamp(min=1e-8).sqrt() * distance) * radius
        outline, strip = least(d[:OUTLINE]), least(d[len(EDGES) :])
        tube = torch.maximum(torch.maximum(*discs), strip)
        is_cube, is_sphere, is_cylinder = map(of_windows, placed.solids.unbind(-1))
        inside = is_cube * outline + is_sphere * ball + is_cylinder * tube
        inside = inside.clamp(-40.0, 40.0) + OUTSIDE * (1 - of_windows(placed.there))
        top = is_cube * torch.minimum(d[7], d[8]) + is_cylinder * discs[1] + OUTSIDE * is_sphere
        left = is_cube * d[6] + OUTSIDE * (1 - is_cube)
        return Seen(inside, top, left, u / radius + 0 * v, v / radius + 0 * u)


class PaintsAtMost(nn.Module):
    """A painter of pictures that have at most so many objects, as a network of its own."""

    def __init__(self, painter: Painter, objects: int) -> None:
        super().__init__()
        self.painter, self.objects = painter, objects

    def forward(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        painted: tuple[Tensor, Tensor] = self.painter(labels, self.objects)
        return painted


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
    """Return 1 at an object's outline and at the edges inside it, and 0 AROUND pixels away."""
    inner = torch.minimum(seen.top.abs(), torch.maximum(seen.left.abs(), seen.top))
    return ridge(torch.minimum(seen.inside.abs(), torch.maximum(inner, -seen.inside)), AROUND)


def ridge(distance: Tensor, width: float) -> Tensor:
    """Return 1 at an edge, and nothing `width` pixels away."""
    return (1 - distance.abs() / width).clamp(min=0)


def least(distances: Sequence[Tensor]) -> Tensor:
    found = distances[0]
    for one in distances[1:]:
        found = torch.minimum(found, one)
    return found


def angle(x: Tensor, y: Tensor) -> Tensor:
    return torch.atan2(y, x)


def lines(points: tuple[Tensor, Tensor], edges: Sequence[tuple[int, int]]) -> Line:
    """Return a, b, c of lines from point to point: a x + b y + c is how far x, y is to the left, y pointing down.

    points: x and y (..., n); edges: pairs of them.
    """
    first, second = (list(ends) for ends in zip(*edges, strict=True))
    (x, y), (x_2, y_2) = ([one[..., ends] for one in points] for ends in (first, second))
    dx, dy = x_2 - x, y_2 - y
    length = squared(dx, dy).sqrt().clamp(min=1e-3)
    across, down = dy / length, -dx / length
    return across, down, -(across * x + down * y)


def on_plane(a: Tensor, b: Tensor, c: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the ray through x, y meets the plane on which X, Y are projected to a X + b Y + c."""
    p, q, r = solved(a, b, c, None, x, y)
    r = r.clamp(min=1e-4)
    return (p / r).clamp(-50.0, 50.0), (q / r).clamp(-50.0, 50.0)


def solved(
    a: Tensor, b: Tensor, c: Tensor, p: Tensor | None, x: Tensor | None = None, y: Tensor | None = None
) -> list[Tensor]:
    """Solve a X + b Y + c Z = p, or = (x, y, 1) up to a factor, for X, Y and Z, by Cramer's rule."""
    rows = [torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)]
    volume = torch.dot(a, rows[0])
    if p is not None:
        return [torch.dot(row, p) / volume for row in rows]
    assert x is not None
    return [(row[0] * x + row[1] * y + row[2]) / volume for row in rows]
