"""A worker whose results' storage hangs or fails: its loop goes on, and each picture is stored or sampled again."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from service.contract.records import JobRecord
from service.settings import Settings
from service.store import keys
from service.store.claims import GROUP
from service.store.jobs import JobStore
from service.worker.runner import Runner
from shared.options import SamplingOptions
from tests.service.processes import until
from tests.service.worker.conftest import LISTS, Counting, status


@pytest.fixture
def keeping(connection: Redis, settings: Settings, tmp_path: Path) -> Runner:
    """A runner that keeps results in a folder."""
    one = Runner(connection, settings.model_copy(update={"results": tmp_path, "lease_s": 3600.0}), "w1")
    one.models.load()
    return one


@pytest.fixture
def hang(keeping: Runner, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writes to storage wait until this is set."""
    free, writer = threading.Event(), keeping.storer.results
    assert writer is not None
    write = writer.files.write

    def late(*args: Any) -> None:
        free.wait()
        write(*args)

    monkeypatch.setattr(writer.files, "write", late)
    return free


def stored(runner: Runner, *jobs: JobRecord) -> Callable[[], bool]:
    """Return a condition that runs an iteration, and is true once these jobs have finished and no picture is left."""

    def condition() -> bool:
        runner.run_once()
        return not runner.models.busy and all(status(runner.store, job) == "finished" for job in jobs)

    return condition


def test_the_batch_is_stepped_while_storage_hangs(
    keeping: Runner, hang: threading.Event, store: JobStore, connection: Redis, create: Callable[..., JobRecord]
) -> None:
    model = keeping.models.load()
    counting = Counting(model)
    short, long = create(LISTS[:1], options=SamplingOptions(steps=1)), create(options=SamplingOptions(steps=9))
    for _ in range(6):
        keeping.run_once()
    assert [len(model.storing), len(model.claims)] == [1, 3]
    assert counting.batches == [4, 3, 3, 3, 3, 3]
    assert status(store, short) == "running"
    assert store.done_count(short.id) == 0
    keeping.renew_claims()
    assert connection.xpending(model.stream.key, GROUP)["pending"] == 4
    hang.set()
    until(stored(keeping, short, long))
    for job in (short, long):
        assert not connection.exists(keys.png(job.id))
        writer = keeping.storer.results
        assert writer is not None
        assert len(writer.read_pictures(job.owner, job.id, range(job.total))) == job.total


def test_pictures_that_wait_for_storage_are_few(
    keeping: Runner, hang: threading.Event, store: JobStore, create: Callable[..., JobRecord]
) -> None:
    model = keeping.models.load()
    most = model.max_pictures
    job = create(LISTS[:1] * (3 * most + 1), options=SamplingOptions(steps=1))
    for _ in range(5):
        keeping.run_once()
    assert len(model.storing) == most
    assert model.room == 0
    hang.set()
    until(stored(keeping, job))


def test_a_draining_worker_waits_for_what_is_being_stored(
    keeping: Runner, hang: threading.Event, store: JobStore, create: Callable[..., JobRecord]
) -> None:
    job = create(LISTS[:1], options=SamplingOptions(steps=1))
    keeping.run_once()
    threading.Timer(0.2, hang.set).start()
    keeping.stop(3600)
    keeping.drain()
    assert status(store, job) == "finished"


def test_a_worker_without_time_leaves_what_is_being_stored_to_another(
    keeping: Runner, hang: threading.Event, store: JobStore, runner: Runner, create: Callable[..., JobRecord]
) -> None:
    job = create(LISTS[:1], options=SamplingOptions(steps=1))
    keeping.run_once()
    keeping.stop(0)
    keeping.drain()
    assert not keeping.models.busy
    (left,) = store.connection.xpending_range(keys.stream(job.digest), GROUP, "-", "+", 5)
    assert left["times_delivered"] == 0  # released, so that the other need not wait until the lease expires
    runner.run(job.id)
    assert status(store, job) == "finished"
    assert runner.storer.results is None
    assert store.pngs(job.id, [0])
    hang.set()
    until(lambda: keeping.storer.collect()[0])  # the thread's late pictures change nothing
    assert status(store, job) == "finished"


@pytest.mark.parametrize("cancelled", [False, True])
def test_of_a_job_that_does_not_finish_after_all_pictures_stay_while_it_is_open(
    keeping: Runner, store: JobStore, connection: Redis, monkeypatch: pytest.MonkeyPatch,
    create: Callable[..., JobRecord], cancelled: bool,
) -> None:  # fmt: skip
    job = create(LISTS[:2], options=SamplingOptions(steps=1))
    writer = keeping.storer.results
    assert writer is not None
    verdict, finish = b"", keeping.store.finish

    def late(*arguments: Any) -> bool:
        nonlocal verdict
        if cancelled:
            store.cancel(job.id)
        else:
            verdict = connection.hget(keys.verdicts(job.id), "1") or b""
            connection.hdel(keys.verdicts(job.id), "1")  # as after a failover
        return finish(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(keeping.store, "finish", late)
        until(lambda: keeping.run_once() and not keeping.models.busy)
    assert status(store, job) == ("cancelled" if cancelled else "running")
    assert writer.files.read_job(job.owner, job.id) is None
    left = [writer.files.read(job.owner, job.id, f"{i}.png") for i in range(2)]
    assert [png is not None for png in left] == [not cancelled] * 2
    if not cancelled:
        connection.hset(keys.verdicts(job.id), "1", verdict)
        keeping.run(job.id)
        assert status(store, job) == "finished"
        assert writer.files.read_job(job.owner, job.id) is not None


def test_pictures_that_could_not_be_stored_are_let_go(
    keeping: Runner, store: JobStore, monkeypatch: pytest.MonkeyPatch, create: Callable[..., JobRecord]
) -> None:
    job = create(LISTS[:1], options=SamplingOptions(steps=1))

    def broken(*_: Any) -> set[str]:
        raise ValueError("a defect")

    def advance() -> bool:
        keeping.run_once()
        return False

    with monkeypatch.context() as patch:
        patch.setattr(keeping.store, "commit", broken)
        with pytest.raises(ValueError, match="a defect"):
            until(advance)
    assert not keeping.models.busy
    assert status(store, job) == "running"
