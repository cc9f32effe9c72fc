"""How large a model's batch may be: as the settings say, or as it pays on this device, which timed calls show.

The calls are made one at a time, so that pictures need not wait for all of them. Knows neither Redis nor jobs.
"""

import time
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass

import torch

from service.settings import Settings
from service.telemetry.logs import get_logger
from service.worker.engine import Engine
from shared.diffusion.denoise import Row, Stepper
from shared.options import SamplingOptions

log = get_logger(__name__)

# Pictures, until the limit is known, and at least: measured while others work, a smaller one would hold a worker back
# for its life (limits of 4, 8 and 16 gave 23, 27 and 29 pictures/s on two cores)
FEWEST = 16
MOST_ROWS = 256
BUDGET_S = 4.0  # of calls in all
WARM, ROUNDS = 2, 2  # calls of a size when it comes up, of which the first warms up; then so many of each in turn
WORTH_MORE = 1.05  # of what rows/s grow by in two doublings of the size: less, and larger ones are not tried
GOOD_ENOUGH = 0.95  # of the best rows/s: the smallest size that has this is taken, as its steps are shorter
FEW_ENOUGH = 0.9  # of the best rows/s: from the smallest size that has this on, large jobs wait for small ones
AROUND_S = 0.003  # of a worker's turn, besides the network: about that much with 4, 8 and 16 pictures on two cores


@dataclass(frozen=True)
class Sizes:
    """Of a model's batches on a device, in network rows."""

    limit: int  # of a call, and of the pictures in a batch
    few: int | None = None  # from so many on, large jobs wait for small ones


class Measurement:
    """Times calls of 1, 2, 4, ... rows, one with each `advance`; `found` is what follows.

    `call(n)` makes a call of n rows and returns when it is through. Of each size the fastest call counts, since what
    disturbs one makes it slower, and sizes take turns, since a disturbance lasts longer than a call. It ends when
    larger sizes do not pay or cannot be made, or when the calls would take more than `budget_s` in all.
    """

    def __init__(
        self,
        call: Callable[[int], None],
        *,
        clock: Callable[[], float] = time.perf_counter,
        most: int = MOST_ROWS,
        budget_s: float = BUDGET_S,
    ) -> None:
        self.fastest: dict[int, float] = {}  # seconds by rows
        self.spent_s = 0.0
        self._call, self._clock, self._most, self._budget_s = call, clock, most, budget_s
        self._sizes = self._plan()

    def advance(self) -> bool:
        """One call more; False where there is none to be made."""
        rows = next(self._sizes, None)
        if rows is None or self.spent_s + self._expected_s(rows) > self._budget_s:
            return False
        begun = self._clock()
        try:
            self._call(rows)
        except Exception as error:  # mostly out of memory; whatever it is, pictures will tell it better
            log.warning("batch size cannot be had", rows=rows, reason=f"{type(error).__name__}: {error}")
            self.fastest.pop(rows, None)
            return False
        taken_s = self._clock() - begun
        self.spent_s += taken_s
        self.fastest[rows] = min(taken_s, self.fastest.get(rows, taken_s))
        return True

    @property
    def rates(self) -> dict[int, float]:
        """Rows/s that a worker has, by rows: where the network alone does not mind, small batches still cost turns."""
        return {rows: rows / (seconds + AROUND_S) for rows, seconds in self.fastest.items()}

    def smallest(self, share: float) -> int | None:
        """The smallest size whose rate is such a share of the best; None where not one call succeeded."""
        rates = self.rates
        return min((rows for rows in rates if rates[rows] >= share * max(rates.values())), default=None)

    @property
    def found(self) -> "Sizes":
        """What follows for batches."""
        return Sizes(max(self.smallest(GOOD_ENOUGH) or 0, FEWEST), self.smallest(FEW_ENOUGH))

    def _plan(self) -> Iterator[int]:
        rows = 1
        while rows <= self._most and self._pays():
            yield from [rows] * WARM
            rows *= 2
        for _ in range(ROUNDS):
            yield from sorted(self.fastest)

    def _pays(self) -> bool:
        """Whether one of the last two sizes was worth more than all before them."""
        rates = list(self.rates.values())
        return max(rates, default=0.0) > WORTH_MORE * max(rates[:-2], default=-1.0)

    def _expected_s(self, rows: int) -> float:
        """As long as it took before; twice as long as half of it, of which nothing is known."""
        return self.fastest.get(rows) or 2 * self.fastest.get(rows // 2, 0.0)


def of_network(stepper: Stepper, most: int = MOST_ROWS) -> Measurement:
    """A measurement of a stepper's network, as a step of so many unguided pictures calls it."""
    labels = [1.0] + [0.0] * (stepper.network.num_labels - 1)
    options = SamplingOptions(steps=1, guidance=1.0)
    rows: list[Row] = []

    def call(count: int) -> None:
        rows.extend(stepper.new_row(labels, options, seed) for seed in range(len(rows), count))
        for row in rows[:count]:
            row.step = 0
        stepper.step(rows[:count])
        if stepper.device.type == "cuda":
            torch.cuda.synchronize(stepper.device)

    return Measurement(call, most=most)


def fixed_sizes(rows: int, device: torch.device) -> list[int] | None:
    """The sizes that calls of up to `rows` are filled up to: a few on a GPU, which prepares each; on a CPU none.

    There a filled row costs as much as a picture's.
    """
    if device.type != "cuda":
        return None
    return sorted({size for size in (1, 2, 4, *range(8, rows, 8)) if size < rows} | {rows})


class BatchLimit:
    """Bounds the batch of one model: the pictures in `engine`, and the rows in a call of `stepper`.

    What settings leave open is measured, unless `known`, sizes by digest, has it; what was found is noted there.
    """

    def __init__(
        self, settings: Settings, stepper: Stepper, engine: Engine, digest: str, known: MutableMapping[str, Sizes]
    ) -> None:
        self.settings, self.stepper, self.engine = settings, stepper, engine
        self.digest, self.known = digest, known
        self._measurement: Measurement | None = None
        if digest not in known and (settings.batch_pictures is None or settings.batch_rows is None):
            self._measurement = of_network(stepper, settings.batch_rows or MOST_ROWS)
        self._apply()

    @property
    def measuring(self) -> bool:
        return self._measurement is not None

    def advance(self) -> bool:
        """One call more, if the limit is not known yet; False where it is."""
        if self._measurement is None:
            return False
        if not self._measurement.advance():
            found = self.known[self.digest] = self._measurement.found
            rates = {rows: round(rate, 1) for rows, rate in self._measurement.rates.items()}
            spent_s = round(self._measurement.spent_s, 2)
            log.info(
                "batch limit", rows=found.limit, few=found.few, rows_per_s=rates, seconds=spent_s, digest=self.digest
            )
            self._measurement = None
            self._apply()
        return True

    def _apply(self) -> None:
        sizes = self.known.get(self.digest)
        size = sizes.limit if sizes else None
        rows = self.settings.batch_rows or size or MOST_ROWS
        self.stepper.bound(rows, None if self.measuring else fixed_sizes(rows, self.stepper.device))
        self.engine.max_pictures = self.settings.batch_pictures or size or FEWEST
        self.engine.few = sizes.few if sizes else None
