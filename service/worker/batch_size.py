"""Chooses how large a model's batch may be on this device, by timing its network before the model serves."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from service.settings import Settings
from service.telemetry.logs import get_logger
from shared.diffusion.denoise import Row, Stepper
from shared.options import SamplingOptions

log = get_logger(__name__)

MIN_PICTURES = 16  # lest a disturbed measurement costs throughput: 4, 8, 16 gave 23, 27, 29 pictures/s on two cores
MAX_ROWS = 256
BUDGET_S = 2.0
CALLS = 3  # of each size; the fastest counts, because warming up and disturbances only make a call slower
MIN_GAIN = 1.05  # of rows/s in two doublings of the size: where they grow by less, larger sizes are not tried
LIMIT_SHARE = 0.95  # of the best rows/s: the smallest size that reaches it is the limit, as its steps are shorter
EFFICIENT_SHARE = 0.9  # of the best rows/s: from the smallest size that reaches it, large jobs wait for small ones
OVERHEAD_S = 0.003  # of a step, outside the network: about that much with 4, 8 and 16 pictures on two cores


@dataclass(frozen=True)
class BatchSizes:
    pictures: int  # largest batch
    rows: int  # largest network call
    efficient_rows: int | None = None  # from which large jobs wait for small ones; None: all pictures step together


def choose(settings: Settings, stepper: Stepper) -> BatchSizes:
    """Return the sizes that are set, and measure those that are not. Leaves `stepper` with another bound."""
    if settings.batch_pictures and settings.batch_rows:
        return BatchSizes(settings.batch_pictures, settings.batch_rows)
    begun = time.perf_counter()
    stepper.bound(settings.batch_rows or MAX_ROWS)
    rates = measure(network_call(stepper), stepper.max_rows)
    limit = max(MIN_PICTURES, smallest(rates, LIMIT_SHARE) or 0)
    efficient_rows = smallest(rates, EFFICIENT_SHARE)
    sizes = BatchSizes(settings.batch_pictures or limit, settings.batch_rows or limit, efficient_rows)
    log.info("batch size measured", **vars(sizes), rows_per_s=rates, seconds=round(time.perf_counter() - begun, 2))
    return sizes


def measure(
    call: Callable[[int], None], max_rows: int = MAX_ROWS, clock: Callable[[], float] = time.perf_counter
) -> dict[int, float]:
    """Return rows/s by size, for 1, 2, 4, ... rows, while larger sizes pay, fit in memory and BUDGET_S lasts.

    `call(n)` computes n rows and returns when they are done. Its first call loads libraries and does not count.
    """
    rates: dict[int, float] = {}
    rows, fastest = 1, 0.0
    try:
        call(1)
        deadline = clock() + BUDGET_S
        while rows <= max_rows and clock() + 2 * fastest <= deadline and _pays(*rates.values()):
            seconds = list[float]()
            while len(seconds) < CALLS and (not seconds or clock() + seconds[-1] <= deadline):
                begun = clock()
                call(rows)
                seconds.append(clock() - begun)
            fastest = min(seconds)
            rates[rows] = round(rows / (fastest + OVERHEAD_S), 3)
            rows *= 2
    except Exception as error:  # mostly out of memory; any other will fail pictures, with a better message
        log.warning("batch size cannot be used", rows=rows, reason=f"{type(error).__name__}: {error}")
    return rates


def _pays(*rates: float) -> bool:
    """Whether one of the last two sizes was faster than all before them."""
    return max(rates, default=0.0) > MIN_GAIN * max(rates[:-2], default=-1.0)


def smallest(rates: dict[int, float], share: float) -> int | None:
    """Return the smallest size whose rate is at least `share` of the best; None without rates."""
    return min((rows for rows, rate in rates.items() if rate >= share * max(rates.values())), default=None)


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
