"""What a checkpoint has learnt to draw: how many objects, and where. Everything else is refused.

Knows neither torch nor HTTP: the trainer writes it into a checkpoint's configuration, the API reads it from there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Self

from pydantic import ConfigDict, Field, model_validator

from shared.options import LIMITS, Count, Fraction, Natural, NoOtherFields

Place = tuple[
    float, float
]  # an object's centre: fractions of the picture's width and height, from the upper left corner

TOLERANCE: Final = 0.02  # a place may lie this far outside the learnt area, and this much too near to another
DIGITS: Final = 9  # of a distance: 0.2 - 0.18 is a little more than 0.02


class Support(NoOtherFields):
    """The training pictures' range. `area` and `nearest` are None for a network that takes no positions."""

    model_config = ConfigDict(frozen=True)

    objects: tuple[Natural, Count]  # fewest and most objects in a picture
    area: tuple[tuple[Fraction, Fraction], ...] | None = None  # convex hull of all places, by increasing angle
    nearest: Annotated[float, Field(ge=0)] | None = None  # smallest distance between two places of one picture

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.objects[0] > self.objects[1]:
            raise ValueError(f"objects is {list(self.objects)}; the first number must not exceed the second")
        return self

    def count_problem(self, count: int) -> str | None:
        """Return why a picture of `count` objects cannot be drawn, or None."""
        low, high = max(1, self.objects[0]), self.objects[1]
        if low <= count <= high:
            return None
        wanted = f"{low}" if low == high else f"{low} to {high}"
        return f"{count} labels; this model has learnt pictures of {wanted} objects"

    def layout_problem(self, places: Sequence[Place], others: Sequence[Place] = ()) -> str | None:
        """Return why a picture with objects at `places` cannot be drawn, or None. `others`: of objects that it has."""
        for place in places:
            if self.area and round(_outside(self.area, place), DIGITS) > TOLERANCE:
                shown = [round(value, 3) for value in place]
                return f"{shown} is outside the area in which this model has seen objects (see its support.area)"
        for one, other in itertools.chain(itertools.combinations(places, 2), itertools.product(places, others)):
            apart = math.dist(one, other)
            if self.nearest is not None and round(self.nearest - apart, DIGITS) > TOLERANCE:
                pair = " and ".join(str([round(value, 3) for value in place]) for place in (one, other))
                return (
                    f"{pair} are {apart:.3f} apart; this model has seen no two objects nearer than {self.nearest:.3f}"
                )
        return None


def support_of(config: Mapping[str, Any]) -> Support:
    """Return what a denoiser's configuration says it has learnt. Older checkpoints, which do not say, refuse nothing.

    Raises pydantic.ValidationError if it is invalid.
    """
    return Support.model_validate(config.get("support", {"objects": (1, LIMITS.max_labels)}))


def picture_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the width and height, in pixels, of the pictures that a denoiser's configuration describes."""
    side = config["network"]["image_size"]
    width, height = config.get("picture", (side, side))
    return int(width), int(height)


def _outside(area: Sequence[Place], place: Place) -> float:
    """Return how far a place is from a convex area, whose corners are in order; 0 inside."""
    edges = list(itertools.pairwise([*area, area[0]])) if len(area) > 1 else [(area[0], area[0])]
    inside = len(area) > 2 and all(
        (x1 - x0) * (place[1] - y0) - (y1 - y0) * (place[0] - x0) >= 0 for (x0, y0), (x1, y1) in edges
    )
    return 0.0 if inside else min(_to_segment(a, b, place) for a, b in edges)


def _to_segment(a: Place, b: Place, place: Place) -> float:
    """Return the distance of a place to the line between two others, which may be the same."""
    x, y = b[0] - a[0], b[1] - a[1]
    along = ((place[0] - a[0]) * x + (place[1] - a[1]) * y) / (x * x + y * y or 1.0)
    share = min(1.0, max(0.0, along))
    return math.dist((a[0] + share * x, a[1] + share * y), place)
