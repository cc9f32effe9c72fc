"""How large a batch may be: exact sizes for networks whose cost is a given function, and when a worker looks for it."""

from collections.abc import Callable

import pytest
import torch
from redis import Redis

import service.worker.batch_size
from service.settings import Settings
from service.store.jobs import JobStore
from service.worker.batch_size import AROUND_S, FEWEST, GOOD_ENOUGH, Measurement, Sizes, fixed_sizes, of_network
from service.worker.loaded_models import Lane
from service.worker.process import PictureWorker
from service.worker.runner import Runner
from shared.diffusion.denoise import Stepper
from shared.diffusion.schedules import alpha_bar
from tests.service.processes import new_job
from tests.toy import ToyNetwork

Cost = Callable[[int], float]


class Device:
    """A network and a clock: call i of n rows takes cost(n) seconds, slowed down by `slower(i)`."""

    def __init__(self, cost: Cost, *, memory: int = 10_000, slower: Callable[[int], float] = lambda i: 1.0) -> None:
        self.cost, self.memory, self.slower = cost, memory, slower
        self.now, self.calls = 0.0, list[int]()

    def clock(self) -> float:
        return self.now

    def call(self, rows: int) -> None:
        self.calls.append(rows)
        if rows > self.memory:
            raise torch.OutOfMemoryError(f"no room for {rows}")
        self.now += self.cost(rows) * self.slower(len(self.calls))

    def measurement(self, most: int = 256) -> Measurement:
        return Measurement(self.call, clock=self.clock, most=most)

    def measured(self, most: int = 256) -> int | None:
        measurement = self.measurement(most)
        while measurement.advance():
            pass
        return measurement.smallest(GOOD_ENOUGH)


def proportional(rows: int) -> float:
    """100 rows/s at any size, with what is around the network."""
    return 0.01 * rows - AROUND_S


def flat(rows: int) -> float:
    """100 rows/s of the network alone at any size: 99.1 of a worker at 32 rows, 96.4 at 8, 93.0 at 4."""
    return 0.01 * rows


def growing(rows: int) -> float:
    """Rows/s grow towards 2000, and are 1925 at 256 rows, 1855 at 128, 1730 at 64."""
    return 0.005 + 0.0005 * rows - AROUND_S


def gpu(rows: int) -> float:
    """One row costs as much as 50."""
    return max(0.005, 0.0001 * rows) - AROUND_S


@pytest.mark.parametrize(
    ("cost", "expected"),
    [(proportional, 1), (flat, 8), (growing, 128), (gpu, 64), (lambda rows: 0.001, 256), (lambda n: n**2, 1)],
)
def test_the_smallest_size_with_nearly_the_best_rate_is_taken(cost: Cost, expected: int) -> None:
    assert Device(cost).measured() == expected


@pytest.mark.parametrize(
    ("cost", "expected"),
    [(proportional, Sizes(16, 1)), (flat, Sizes(16, 4)), (growing, Sizes(128, 128)), (gpu, Sizes(64, 64))],
)
def test_large_jobs_wait_from_the_size_on_that_has_nine_tenths_of_the_best_rate(cost: Cost, expected: Sizes) -> None:
    measurement = Device(cost).measurement()
    while measurement.advance():
        pass
    assert measurement.found == expected


def test_sizes_double_until_they_no_longer_pay_and_then_take_turns() -> None:
    device = Device(proportional)
    device.measured()
    assert device.calls == [1, 1, 2, 2, 4, 4, 1, 2, 4, 1, 2, 4]


@pytest.mark.parametrize(("most", "expected", "largest"), [(48, 32, 32), (8, 8, 8), (1, 1, 1)])
def test_no_call_is_larger_than_allowed(most: int, expected: int, largest: int) -> None:
    device = Device(gpu)
    assert device.measured(most) == expected
    assert max(device.calls) == largest


def test_the_first_call_of_a_size_and_calls_that_are_disturbed_do_not_count() -> None:
    def slower(i: int) -> float:
        return 5.0 if i in (1, 3, 5, 7, 8, 20) else 1.0

    assert Device(growing, slower=slower).measured() == Device(growing).measured() == 128


def test_a_size_that_memory_has_no_room_for_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    device = Device(gpu, memory=32)
    assert device.measured() == 32
    assert device.calls[-1] == 64
    (line,) = caplog.records
    assert (line.__dict__["rows"], line.__dict__["reason"]) == (64, "OutOfMemoryError: no room for 64")


def test_it_ends_before_it_would_take_longer_than_its_budget() -> None:
    device = Device(lambda rows: float(rows))
    assert device.measured() == 1
    assert device.calls == [1, 1, 2]
    assert device.now == service.worker.batch_size.BUDGET_S == 4.0


def test_where_nothing_can_be_called_nothing_is_best() -> None:
    assert Device(gpu, memory=0).measured() is None


def test_a_networks_measurement_calls_it_with_so_many_rows() -> None:
    network = ToyNetwork(alpha_bar("linear", 100))
    measurement = of_network(Stepper(network, network.alpha_bar, "v", max_rows=8), most=8)
    while measurement.advance():
        pass
    sizes = [len(call.t) for call in network.calls]
    assert sizes[:4] == [1, 1, 2, 2]
    assert set(sizes) <= {1, 2, 4, 8}
    assert measurement.smallest(GOOD_ENOUGH) in measurement.fastest.keys() == set(sizes)
    assert {(t, keep) for call in network.calls for t, keep in zip(call.t, call.keep, strict=True)} == {(99, True)}


@pytest.mark.parametrize(
    ("rows", "sizes"), [(1, [1]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (32, [1, 2, 4, 8, 16, 24, 32])]
)
def test_a_gpus_calls_have_one_of_a_few_sizes_and_a_cpus_any(rows: int, sizes: list[int]) -> None:
    assert fixed_sizes(rows, torch.device("cuda:1")) == sizes
    assert fixed_sizes(rows, torch.device("cpu")) is None


# --- in a worker ---


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """What a worker's model is measured on: 32 rows are its best size."""
    one = Device(lambda rows: 0.001 * max(32, rows) - AROUND_S)
    monkeypatch.setattr(service.worker.batch_size, "of_network", lambda stepper, most: one.measurement(most))
    return one


@pytest.fixture
def unset(settings: Settings) -> Settings:
    return settings.model_copy(update={"batch_pictures": None, "batch_rows": None})


@pytest.fixture
def runner(connection: Redis, unset: Settings) -> Runner:
    one = Runner(connection, unset, "w1")
    one.lane()
    return one


SIZES = [1, 2, 4, 8, 16, 32, 64, 128]
CALLS = [*(size for size in SIZES for _ in range(2)), *SIZES, *SIZES]


def limits(lane: Lane) -> tuple[int, int, int | None]:
    assert isinstance(lane.stepper, Stepper)
    assert lane.stepper.pad_to == []
    return lane.engine.max_pictures, lane.stepper.max_rows, lane.engine.few


def test_an_idle_worker_makes_a_call_a_turn_and_takes_what_it_finds(device: Device, runner: Runner) -> None:
    lane = runner.lane()
    assert limits(lane) == (FEWEST, 256, None)
    for turns in range(1, len(CALLS) + 1):
        runner.turn()
        assert len(device.calls) == turns
        assert runner.measuring
    runner.turn()
    assert not runner.measuring
    assert device.calls == CALLS
    assert limits(lane) == (32, 32, 32)


def test_a_limit_that_is_measured_is_not_below_the_fewest(device: Device, runner: Runner) -> None:
    device.cost = lambda rows: proportional(max(4, rows))
    while runner.measuring:
        runner.turn()
    assert limits(runner.lane()) == (FEWEST, FEWEST, 4)


def test_small_jobs_are_not_held_up_and_a_full_batch_is(
    device: Device, runner: Runner, connection: Redis, unset: Settings
) -> None:
    store, lane = JobStore(connection, unset), runner.lane()
    small, large = new_job(unset, steps=4, pictures=FEWEST - 2), new_job(unset, steps=40, pictures=FEWEST + 4)
    store.create(small)
    runner.run(small.id)
    assert device.calls == []
    store.create(large)
    for _ in range(len(CALLS) + 1):
        runner.turn()
        assert len(lane.claims) == FEWEST
    assert device.calls == CALLS
    assert limits(lane) == (32, 32, 32)
    runner.run(large.id)
    assert store.statuses([small.id, large.id]) == {small.id: "finished", large.id: "finished"}


def test_it_is_done_once_for_the_same_weights(device: Device, runner: Runner) -> None:
    while runner.measuring:
        runner.turn()
    old = runner.lane()
    runner.lanes.clear()
    lane = runner.lane()
    assert lane is not old
    assert not runner.measuring
    assert limits(lane) == (32, 32, 32)
    runner.lane("other")
    assert runner.measuring


@pytest.mark.parametrize(
    ("pictures", "rows", "expected"), [(6, None, (6, 32, 32)), (None, 2, (FEWEST, 2, 2)), (6, 9, (6, 9, None))]
)
def test_what_is_set_is_not_measured(
    device: Device, connection: Redis, unset: Settings, pictures: int | None, rows: int | None,
    expected: tuple[int, int, int | None],
) -> None:  # fmt: skip
    given = unset.model_copy(update={"batch_pictures": pictures, "batch_rows": rows})
    runner = Runner(connection, given, "w1")
    lane = runner.lane()
    while runner.measuring:
        runner.turn()
    assert limits(lane) == expected
    assert max(device.calls, default=0) <= (rows or 128)
    assert bool(device.calls) == (pictures is None or rows is None)


def test_where_no_call_succeeds_the_batch_stays_as_it_is(device: Device, runner: Runner) -> None:
    device.memory = 0
    runner.turn()
    runner.turn()
    assert not runner.measuring
    assert limits(runner.lane()) == (FEWEST, FEWEST, None)


def test_a_worker_that_measures_takes_a_job_that_comes(
    device: Device, runner: Runner, connection: Redis, unset: Settings
) -> None:
    worker, job = PictureWorker(runner, connection, unset), new_job(unset, steps=1, pictures=2)

    def slower(call: int) -> float:
        if call == 5:
            JobStore(connection, unset).create(job)
        return 1.0

    device.slower = slower
    found = worker.dequeue_job_and_maintain_ttl(1)
    assert found is not None
    assert list(found[0].args) == [job.id]
    assert device.calls == CALLS[:5]
    assert runner.measuring
