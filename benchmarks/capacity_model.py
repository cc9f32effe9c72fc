"""The capacity model in docs/performance.md: what a number of pictures a day needs, from measured costs.

Measures nothing: `capacity` takes the content of results.json.
"""

import math
from dataclasses import dataclass

from benchmarks.document import Piece, Table, number
from benchmarks.results import Data
from service.settings import Settings

DAY_S = 86_400
PEAK = 3.0  # the busiest hour's rate relative to the daily mean; a common rule of thumb, not measured
LOAD = 0.6  # target load at the peak, as a fraction of capacity
DAYS = (1_000, 100_000, 10_000_000)
NEEDED = ("service", "growth", "scaling")
MOST_QUEUED: int = Settings.model_fields["max_queued_pictures"].default


@dataclass(frozen=True)
class Costs:
    """The measured costs of one device, one picture and one Redis."""

    row_s: float  # device seconds per network row
    other_s: float  # device seconds per picture for all else on the same cores: verdict, PNG, Redis, HTTP
    redis_s: float  # of a core, per picture
    redis_bytes: float  # per finished one-picture job, until it expires
    picture_bytes: float  # of a PNG
    rows: int  # network rows of a picture as the checkpoint samples by default
    kept_s: float  # until a finished job expires

    @classmethod
    def of(cls, content: Data) -> "Costs":
        service, growth, scaling = (content[name] for name in NEEDED)
        rows = sum(service["served_rows"])
        picture_s = 1 / service["figures"]["service.pictures_per_s"]["median"]
        bare_s = 1 / service["rates"]["one_each"]["loop"]["median"]
        return cls(
            row_s=bare_s / rows,
            other_s=max(0.0, picture_s - bare_s),
            redis_s=scaling["costs"]["1"]["redis_ms"] / 1000,
            redis_bytes=growth["store"][-1]["bytes_per_job"],
            picture_bytes=growth["png_bytes"],
            rows=rows,
            kept_s=service["kept_s"],
        )

    @property
    def picture_s(self) -> float:
        """Device seconds of a picture."""
        return self.rows * self.row_s + self.other_s


def devices(pictures_per_s: float, picture_s: float, load: float = LOAD) -> int:
    """Return the number of devices whose load does not exceed `load`."""
    return max(1, math.ceil(pictures_per_s * picture_s / load - 1e-9))


def need(costs: Costs, day: int) -> Data:
    """Return what `day` pictures per day need besides devices; Redis's time and bandwidth at the peak."""
    peak = PEAK * day / DAY_S
    kept = day / DAY_S * costs.kept_s  # pictures
    return {
        "redis_share": peak * costs.redis_s,
        "redis_gib": kept * costs.redis_bytes / 2**30,
        "storage_gib": kept * costs.picture_bytes / 2**30,
        "mbit_per_s": peak * costs.picture_bytes * 8 / 1e6,
    }


def capacity(content: Data) -> list[Piece]:
    """Return the pieces about capacity, or nothing if a section that they need was not measured."""
    if not content.keys() >= set(NEEDED):
        return []
    costs = Costs.of(content)
    others = ["share of one Redis", "Redis, GiB", "storage, GiB", "PNGs sent, Mbit/s"]
    table = Table(["pictures/day", "at the peak, per second", "devices", *others])
    for day in DAYS:
        peak = PEAK * day / DAY_S
        share, *rest = need(costs, day).values()
        needed = f"{devices(peak, costs.picture_s):,}"
        table.add(f"{day:,}", number(peak), needed, f"{share:.2%}", *map(number, rest))
    minutes = MOST_QUEUED * costs.picture_s / 60
    return [
        "## Capacity",
        "What a number of pictures per day needs:",
        table,
        f"Computed from the sections above. Assumed, not measured: the peak is {PEAK:g} times the daily mean, the load "
        f"at the peak is {LOAD:g} of capacity, and devices, which share only Redis, do not slow each other down. Redis "
        f"keeps {number(costs.redis_bytes)} bytes and storage {number(costs.picture_bytes)} of a picture for "
        f"{costs.kept_s / DAY_S:g} days (`LABELGRID_KEEP_DAYS`).",
        f"With full batches, a device takes {number(1000 * costs.row_s)} ms per network row, of which the default "
        f"model's pictures have {costs.rows}, and {number(1000 * costs.other_s)} ms for all else that a picture needs. "
        f"For A pictures per second of D device seconds you need ceil(A D / {LOAD:g}) "
        "devices. More devices are more workers (`--scale worker=N`, or KEDA by the backlog); where one Redis is not "
        "enough, run [several deployments](scaling.md#after-one-redis).",
        f"Beyond {MOST_QUEUED:,} pending pictures of a model (`max_queued_pictures`) requests are refused (429): these "
        f"keep one device busy for {number(minutes)} minutes.",
    ]
