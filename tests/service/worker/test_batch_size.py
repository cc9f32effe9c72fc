"""How large a batch may be: sizes for networks whose cost is a given function, and what a worker makes of them."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from redis import Redis

from service.settings import Settings
from service.worker import batch_size
from service.worker.batch_size import (
    BUDGET_S,
    EFFICIENT_SHARE,
    LATEST_S,
    LIMIT_SHARE,
    MAX_ROWS,
    MIN_EFFICIENT_ROWS,
    MIN_PICTURES,
    OVERHEAD_S,
    QUIET_S,
    BatchSizes,
    LaterSizes,
    choose,
    measuring,
    network_call,
    smallest,
)
from service.worker.checkpoint_cache import LOADER
from service.worker.loaded_models import LoadedModels, padded_sizes
from service.worker.process import build
from service.worker.runner import Runner
from shared.diffusion.denoise import Stepper
from shared.diffusion.same_bits import without_pauses
from shared.diffusion.schedules import alpha_bar
from tests.cpu import needs_avx512
from tests.service.processes import until
from tests.toy import ToyNetwork
from tests.toy_checkpoint import publish_toy_denoiser, publish_toys

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

    def rates(self, max_rows: int = MAX_ROWS) -> dict[int, float]:
        return without_pauses(measuring(self.call, max_rows, self.clock))

    def limit(self, max_rows: int = MAX_ROWS) -> int | None:
        return smallest(self.rates(max_rows), LIMIT_SHARE)


def proportional(rows: int) -> float:
    """100 rows/s at any size, with the overhead of a step."""
    return 0.01 * rows - OVERHEAD_S


def flat(rows: int) -> float:
    """100 rows/s of the network alone at any size: 99.1 of a worker at 32 rows, 96.4 at 8, 93.0 at 4."""
    return 0.01 * rows


def growing(rows: int) -> float:
    """Rows/s grow towards 2000: 1925 at 256 rows, 1855 at 128, 1730 at 64."""
    return 0.005 + 0.0005 * rows - OVERHEAD_S


def gpu(rows: int) -> float:
    """One row costs as much as 50."""
    return max(0.005, 0.0001 * rows) - OVERHEAD_S


@pytest.mark.parametrize(
    ("cost", "expected"),
    [(proportional, 1), (flat, 8), (growing, 128), (gpu, 64), (lambda rows: 0.001, 256), (lambda n: n**2, 1)],
)
def test_the_smallest_size_with_nearly_the_best_rate_is_the_limit(cost: Cost, expected: int) -> None:
    assert Device(cost).limit() == expected


@pytest.mark.parametrize(("cost", "expected"), [(proportional, 1), (flat, 2), (growing, 64), (gpu, 64)])
def test_large_jobs_wait_from_the_size_that_has_four_fifths_of_the_best_rate(cost: Cost, expected: int) -> None:
    assert smallest(Device(cost).rates(), EFFICIENT_SHARE) == expected


def test_sizes_double_until_they_no_longer_pay() -> None:
    device = Device(proportional)
    device.limit()
    assert device.calls == [1] + [1] * 3 + [2] * 3 + [4] * 3


@pytest.mark.parametrize(("max_rows", "expected", "largest"), [(48, 32, 32), (8, 8, 8), (1, 1, 1)])
def test_no_call_is_larger_than_allowed(max_rows: int, expected: int, largest: int) -> None:
    device = Device(gpu)
    assert device.limit(max_rows) == expected
    assert max(device.calls) == largest


def test_the_first_call_of_a_size_and_disturbed_calls_do_not_count() -> None:
    def slower(i: int) -> float:
        return 5.0 if i in (1, 2, 5, 8, 9, 20) else 1.0

    assert Device(growing, slower=slower).limit() == Device(growing).limit() == 128


def test_a_size_that_does_not_fit_in_memory_ends_the_measurement(caplog: pytest.LogCaptureFixture) -> None:
    device = Device(gpu, memory=32)
    assert device.limit() == 32
    assert device.calls[-1] == 64
    (line,) = caplog.records
    assert (line.__dict__["rows"], line.__dict__["reason"]) == (64, "OutOfMemoryError: no room for 64")


@pytest.mark.parametrize(("memory", "rows"), [(4, 4), (0, 16)])
def test_calls_are_no_larger_than_what_fits_in_memory(monkeypatch: pytest.MonkeyPatch, memory: int, rows: int) -> None:
    monkeypatch.setattr(batch_size, "network_call", lambda stepper: Device(flat, memory=memory).call)
    stepper = Stepper(ToyNetwork(alpha_bar("linear", 100)), alpha_bar("linear", 100), "v", max_rows=8)
    sizes = batch_size.choose(Settings(batch_pictures=None, batch_rows=None), stepper)
    assert (sizes.pictures, sizes.rows) == (16, rows)  # of a device that fails at once nothing is known


@pytest.mark.parametrize(
    ("row_s", "calls"), [(0.1, [1] * 4 + [2] * 3 + [4] * 2), (0.3, [1] * 4 + [2]), (0.7, [1] * 3), (1.5, [1] * 2)]
)
def test_a_slow_device_is_measured_within_the_budget(row_s: float, calls: list[int]) -> None:
    device = Device(lambda rows: row_s * rows)
    assert smallest(device.rates(), EFFICIENT_SHARE) == 1
    assert device.calls == calls
    assert device.now - row_s <= BUDGET_S == 2.0  # the first call is not counted


def test_loading_libraries_in_the_first_call_costs_no_budget() -> None:
    device = Device(growing, slower=lambda i: 1000.0 if i == 1 else 1.0)
    assert device.limit() == 128


def test_a_device_that_computes_nothing_has_no_rates() -> None:
    assert Device(gpu, memory=0).limit() is None


def test_the_network_is_called_with_so_many_rows() -> None:
    network = ToyNetwork(alpha_bar("linear", 100))
    rates = without_pauses(measuring(network_call(Stepper(network, network.alpha_bar, "v", max_rows=8)), 8))
    sizes = [len(call.t) for call in network.calls]
    assert sizes[:7] == [1, 1, 1, 1, 2, 2, 2]
    assert set(sizes) == rates.keys() <= {1, 2, 4, 8}
    assert {(t, keep) for call in network.calls for t, keep in zip(call.t, call.keep, strict=True)} == {(99, True)}


@pytest.mark.parametrize(
    ("rows", "sizes"), [(1, [1]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (32, [1, 2, 4, 8, 16, 24, 32])]
)
def test_a_gpus_calls_have_one_of_a_few_sizes(rows: int, sizes: list[int]) -> None:
    assert padded_sizes(rows) == sizes


# In a worker.


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Stands in for every network: 32 rows are its best size."""
    one = Device(lambda rows: 0.001 * max(32, rows) - OVERHEAD_S)
    monkeypatch.setattr(batch_size, "network_call", lambda stepper: one.call)
    monkeypatch.setattr(batch_size, "measuring", lambda call, max_rows: measuring(call, max_rows, one.clock))
    return one


@pytest.fixture
def unset(settings: Settings) -> Settings:
    return settings.model_copy(update={"batch_pictures": None, "batch_rows": None})


def stepper() -> Stepper:
    network = ToyNetwork(alpha_bar("linear", 100))
    return Stepper(network, network.alpha_bar, "v")


def sizes_of(models: LoadedModels) -> tuple[int, int, int | None, int]:
    (model,) = models.denoisers()
    engine = model.engine
    return engine.max_pictures, model.stepper.max_rows, engine.efficient_rows, engine.late_pictures


def even(rows: int) -> torch.Tensor:
    """Stands in for calls of a network that give the same bits with every size."""
    return torch.zeros(rows, 1)


def differing(rows: int) -> torch.Tensor:
    """The same, of a network in which a single row has other bits."""
    return torch.full((rows, 1), float(rows == 1))


@pytest.mark.parametrize(
    ("pictures", "rows", "expected"),
    [(None, None, (MIN_PICTURES, 1, 1, MIN_PICTURES)), (4, None, (4, 1, 1, 0)), (4, 8, (4, 1, None, 0))],
)
def test_sizes_that_are_set_hold_before_the_others_are_measured(
    unset: Settings, pictures: int | None, rows: int | None, expected: tuple[int, int, int | None, int]
) -> None:
    own = unset.model_copy(update={"batch_pictures": pictures, "batch_rows": rows})
    assert batch_size.early(own) == BatchSizes(*expected)


@pytest.mark.parametrize("packs", [False, True])
def test_a_worker_measures_a_network_before_it_is_ready_if_single_rows_may_be_wrong(
    device: Device, connection: Redis, unset: Settings, monkeypatch: pytest.MonkeyPatch, packs: bool
) -> None:
    """Those of a network that is not packed, or whose single rows are seen to differ."""
    monkeypatch.setattr("shared.diffusion.same_bits.can_pack", lambda device: packs)
    monkeypatch.setattr("shared.diffusion.same_bits._copies", lambda stepper: differing if packs else even)
    worker = build(unset, connection)
    assert set(device.calls) == {1, 2, 4, 8, 16, 32, 64, 128}
    assert sizes_of(worker.runner.models) == (32, 32, 32, 32)
    assert not worker.has_work


@needs_avx512
@pytest.mark.parametrize(("quiet_s", "latest_s"), [(0.0, 1e9), (1e9, 0.0)], ids=["idle", "late"])
def test_a_worker_serves_a_packed_network_with_single_rows_and_measures_it_afterwards(
    device: Device, connection: Redis, unset: Settings, monkeypatch: pytest.MonkeyPatch, quiet_s: float, latest_s: float
) -> None:
    monkeypatch.setattr(batch_size, "QUIET_S", quiet_s)
    monkeypatch.setattr(batch_size, "LATEST_S", latest_s)
    monkeypatch.setattr("shared.diffusion.same_bits._copies", lambda stepper: even)
    worker = build(unset, connection)
    models = worker.runner.models
    assert sizes_of(models) == (MIN_PICTURES, 1, 1, MIN_PICTURES)
    assert device.calls == []
    assert worker.has_work == (quiet_s == 0.0)  # it must not wait for a job
    for _ in range(500):
        worker.runner.run_once()
        if sizes_of(models) != (MIN_PICTURES, 1, 1, MIN_PICTURES):
            break
    assert sizes_of(models) == (32, 32, 32, 32)
    assert set(device.calls) == {1, 2, 4, 8, 16, 32, 64, 128}
    assert not worker.has_work


@needs_avx512
def test_a_worker_that_ends_stops_measuring(
    device: Device, connection: Redis, unset: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def endless(stepper: Stepper, rows: int, **options: object) -> Iterator[None]:
        nonlocal calls
        while True:
            yield
            calls += 1

    monkeypatch.setattr(batch_size, "LATEST_S", 0.0)
    monkeypatch.setattr("shared.diffusion.same_bits._copies", lambda stepper: even)
    monkeypatch.setattr("shared.diffusion.same_bits.bounding", endless)
    models = build(unset, connection).runner.models
    models.follow_storage()
    until(lambda: calls)
    models.close(within_s=30)
    assert not any(thread.name == LOADER for thread in threading.enumerate())


@needs_avx512
def test_a_worker_that_cannot_measure_goes_on_with_single_rows(
    device: Device, connection: Redis, unset: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(stepper: Stepper, rows: int, **options: object) -> Iterator[None]:
        yield
        raise RuntimeError("no kernel")

    monkeypatch.setattr(batch_size, "QUIET_S", 0.0)
    monkeypatch.setattr("shared.diffusion.same_bits._copies", lambda stepper: even)
    monkeypatch.setattr("shared.diffusion.same_bits.bounding", broken)
    worker = build(unset, connection)
    for _ in range(100):
        worker.runner.run_once()
    assert sizes_of(worker.runner.models) == (MIN_PICTURES, 1, 1, MIN_PICTURES)
    assert not worker.has_work


def test_measuring_waits_until_the_worker_is_idle(unset: Settings) -> None:
    now = 0.0
    later = LaterSizes(unset, "toy", stepper(), lambda: now)
    assert not later.is_due(busy=False)
    now = QUIET_S
    assert later.is_due(busy=False)
    assert not later.is_due(busy=True)
    now += QUIET_S / 2
    assert not later.is_due(busy=False)
    assert not later.is_late
    now = LATEST_S
    assert later.is_late


def test_the_limit_is_never_below_the_minimum(device: Device, unset: Settings) -> None:
    device.cost = lambda rows: proportional(max(4, rows))
    assert choose(unset, stepper()) == BatchSizes(MIN_PICTURES, MIN_PICTURES, MIN_EFFICIENT_ROWS, MIN_PICTURES)
    device.memory = 0
    assert choose(unset, stepper()) == BatchSizes(MIN_PICTURES, MIN_PICTURES, None)


@pytest.mark.parametrize(
    ("pictures", "rows", "expected"),
    [
        (6, None, BatchSizes(6, 32, 32)),
        (None, 2, BatchSizes(MIN_PICTURES, 2, MIN_EFFICIENT_ROWS, MIN_PICTURES)),
        (6, 9, BatchSizes(6, 9)),
    ],
)
def test_sizes_that_are_set_are_not_measured(
    device: Device, unset: Settings, pictures: int | None, rows: int | None, expected: BatchSizes
) -> None:
    given = unset.model_copy(update={"batch_pictures": pictures, "batch_rows": rows})
    assert choose(given, stepper()) == expected
    assert max(device.calls, default=0) <= (rows or 128)
    assert bool(device.calls) == (pictures is None or rows is None)


def test_networks_of_one_shape_are_measured_once(
    device: Device, connection: Redis, unset: Settings, tmp_path: Path
) -> None:
    publish_toys(tmp_path / "models")
    publish_toy_denoiser(tmp_path / "models", "placed", 3, positions=True)
    models = Runner(connection, unset.model_copy(update={"storage": tmp_path / "models"}), "w1").models
    first = models.read_model("toy")
    assert device.calls
    device.calls.clear()
    again = [models.read_model(name) for name in ("toy", "other")]
    assert device.calls == []
    assert {(one.max_pictures, one.stepper.max_rows) for one in (first, *again)} == {(64, 32)}
    models.read_model("placed")
    assert device.calls
