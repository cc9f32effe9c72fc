"""Chooses how large a model's batch may be on this device, by timing its network: before it serves, or while idle."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from service.settings import Settings
from service.telemetry.logs import get_logger
from shared.diffusion import same_bits
from shared.diffusion.denoise import Row, Stepper
from shared.diffusion.same_bits import Pausing, without_pauses
from shared.options import SamplingOptions

log = get_logger(__name__)

MIN_PICTURES = 16  # lest a disturbed measurement costs throughput: 4, 8, 16 gave 23, 27, 29 pictures/s on two cores
MAX_ROWS = 256
BUDGET_S = 2.0
CALLS = 3  # of each size; the fastest counts, because warming up and disturbances only make a call slower
MIN_GAIN = 1.05  # of rows/s in two doublings of the size: where they grow by less, larger sizes are not tried
LIMIT_SHARE = 0.95  # of the best rows/s: the smallest size that reaches it is the limit, as its steps are shorter
EFFICIENT_SHARE = 0.8  # of the best rows/s: from the smallest size that reaches it, large jobs wait for small ones
MIN_EFFICIENT_ROWS = 8  # lest a disturbed measurement makes pictures step one by one
QUIET_S = 0.5  # without pictures, before a model that already serves is measured
LATEST_S = 30.0  # after it was loaded: it is measured then, beside its pictures if need be
OVERHEAD_S = 0.003  # of a step, outside the network: about that much with 4, 8 and 16 pictures on two cores


@dataclass(frozen=True)
class BatchSizes:
    pictures: int  # of a batch
    rows: int  # largest network call
    efficient_rows: int | None = None  # from which large jobs wait for small ones; None: all pictures step together
    late_pictures: int = 0  # that may join beyond `pictures`, a few at each step


def choose(settings: Settings, stepper: Stepper) -> BatchSizes:
    """Return the sizes that are set, and measure those that are not. Leaves `stepper` with another bound."""
    return without_pauses(choosing(settings, stepper))


def choosing(settings: Settings, stepper: Stepper) -> Pausing[BatchSizes]:
    """Do the same with pauses."""
    if settings.batch_pictures and settings.batch_rows:
        return BatchSizes(settings.batch_pictures, settings.batch_rows)
    stepper.bound(settings.batch_rows or MAX_ROWS)
    rates = yield from measuring(network_call(stepper), stepper.max_rows)
    works = [rows for rows, rate in rates.items() if rate]
    limit = max(MIN_PICTURES, smallest(rates, LIMIT_SHARE) or 0)
    rows = min(limit, max(works)) if works and len(works) < len(rates) else limit
    efficient_rows = max(MIN_EFFICIENT_ROWS, smallest(rates, EFFICIENT_SHARE) or 0) if works else None
    late_pictures = limit if efficient_rows and not settings.batch_pictures else 0
    sizes = BatchSizes(settings.batch_pictures or limit, settings.batch_rows or rows, efficient_rows, late_pictures)
    log.info("batch size measured", **vars(sizes), rows_per_s=rates)
    return sizes


def early(settings: Settings) -> BatchSizes:
    """Return the sizes until the others are measured, for a network whose calls of one row are right in any case.

    Calls of one row cost the same for every row, so from the first one on large jobs wait for small ones.
    """
    is_fixed = settings.batch_pictures and settings.batch_rows
    late_pictures = 0 if settings.batch_pictures else MIN_PICTURES
    return BatchSizes(settings.batch_pictures or MIN_PICTURES, 1, None if is_fixed else 1, late_pictures)


class LaterSizes:
    """Measures the sizes of a model that already serves, with calls of one row: one network call each time it is idle.

    A worker that never becomes idle measures them in a thread, after `LATEST_S`. `spare` is a second stepper of the
    network. In the end it has the bounds that the model's stepper is to have.
    """

    def __init__(
        self, settings: Settings, model: str, spare: Stepper, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.spare, self._clock = spare, clock
        self._born_at = self._busy_at = clock()
        self.work = self._measure(settings, model)

    def _measure(self, settings: Settings, model: str) -> Pausing[BatchSizes]:
        sizes = yield from choosing(settings, self.spare)
        same = yield from same_bits.bounding(self.spare, sizes.rows)
        if len(same) < sizes.rows:
            log.info("network calls have sizes that give the same bits", model=model, sizes=same)
        return sizes

    def is_due(self, *, busy: bool) -> bool:
        """Whether to make a call now. `busy`: whether the worker has pictures in progress."""
        if busy:
            self._busy_at = self._clock()
        return self._clock() - self._busy_at >= QUIET_S

    @property
    def is_late(self) -> bool:
        return self._clock() - self._born_at >= LATEST_S


def measuring(
    call: Callable[[int], None], max_rows: int = MAX_ROWS, clock: Callable[[], float] = time.perf_counter
) -> Pausing[dict[int, float]]:
    """Return rows/s by size, for 1, 2, 4, ... rows, while larger sizes pay, fit in memory and BUDGET_S lasts.

    The first size that fails has 0. `call(n)` computes n rows and returns when they are done. Its first call loads
    libraries and does not count, nor do pauses.
    """
    rates: dict[int, float] = {}
    rows, fastest, spent = 1, 0.0, 0.0
    try:
        yield
        call(1)
        while rows <= max_rows and spent + 2 * fastest <= BUDGET_S and _pays(*rates.values()):
            seconds = list[float]()
            while len(seconds) < CALLS and (not seconds or spent + seconds[-1] <= BUDGET_S):
                yield
                begun = clock()
                call(rows)
                seconds.append(clock() - begun)
                spent += seconds[-1]
            fastest = min(seconds)
            rates[rows] = round(rows / (fastest + OVERHEAD_S), 3)
            rows *= 2
    except Exception as error:  # mostly out of memory; any other will fail pictures, with a better message
        rates[rows] = 0.0
        log.warning("batch size cannot be used", rows=rows, reason=f"{type(error).__name__}: {error}")
    return rates


def _pays(*rates: float) -> bool:
    """Whether one of the last two sizes was faster than all before them."""
    return max(rates, default=0.0) > MIN_GAIN * max(rates[:-2], default=-1.0)


def smallest(rates: dict[int, float], share: float) -> int | None:
    """Return the smallest size whose rate is at least `share` of the best; None without rates."""
    return min((rows for rows, rate in rates.items() if rate and rate >= share * max(rates.values())), default=None)


def network_call(stepper: Stepper) -> Callable[[int], None]:
    """Return a function that steps so many unguided pictures."""
    options, labels = SamplingOptions(steps=1, guidance=1.0), [0.0] * stepper.network.num_labels
    rows: list[Row] = []

    def call(count: int) -> None:
        rows.extend(stepper.new_row(labels, options, seed) for seed in range(len(rows), count))
        for row in rows[:count]:
            row.step = 0
        stepper.step(rows[:count])
        rows[0].x.cpu()  # waits for a GPU

    return call
