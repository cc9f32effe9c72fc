"""Storing: storage that hangs or fails delays pictures and loses none, and jobs that are gone leave no files. Grids."""

import asyncio
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from redis import Redis

from service.contract.options import PictureOptions
from service.contract.records import JobRecord
from service.files import picture_name
from service.settings import Settings
from service.store import keys, workers
from service.store.claims import GROUP, MAX_DELIVERIES, BegunClaim
from service.store.jobs import OVERDUE, JobStore
from service.worker import process, storer
from service.worker.runner import Runner
from tests.service.api.answers import pixels
from tests.service.processes import until
from tests.service.store.helpers import done, done_count, record
from tests.service.worker.conftest import (
    LISTS,
    ONE_STEP,
    Create,
    batches_of,
    engine_of,
    error_of,
    grid_of,
    model_of,
    pngs,
    run,
    run_until,
    settle,
    started,
    status,
)


@pytest.fixture
def store(connection: Redis, settings: Settings, tmp_path: Path) -> JobStore:
    """A store with the test's own pictures, and with leases that last longer than the test."""
    return JobStore(connection, settings.model_copy(update={"pictures": tmp_path / "pictures", "lease_s": 3600.0}))


@pytest.fixture
def runner(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr("service.worker.job_files.RETRY_S", 0.01)
    return started(store.connection, store.settings)


@pytest.fixture
def back(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writes of `runner` to storage wait until this is set."""
    free, write = threading.Event(), runner.storage.files.write

    def late(*given: Any) -> None:
        free.wait()
        write(*given)

    monkeypatch.setattr(runner.storage.files, "write", late)
    return free


def leased(store: JobStore, job: JobRecord) -> list[int]:
    """Return how often each picture in the stream was delivered."""
    found: Any = store.connection.xpending_range(keys.pictures(job.digest), GROUP, "-", "+", 99)
    return [one["times_delivered"] for one in found]


# Storage that hangs or fails.


def test_the_batch_is_stepped_while_storage_hangs(
    runner: Runner, back: threading.Event, store: JobStore, create: Create
) -> None:
    batches = batches_of(engine_of(runner))
    short, long = create(LISTS[:1], options=ONE_STEP), create(options=PictureOptions(steps=9))
    for _ in range(6):
        runner.run_once()
    assert batches == [4, 3, 3, 3, 3, 3]
    assert (status(store, short), done_count(store, short.id)) == ("running", 0)
    runner.renew_claims()
    assert leased(store, short) == [1] * 4
    back.set()
    run(runner, short.id, long.id)
    assert [len(pngs(store, job.id, range(job.total))) for job in (short, long)] == [1, 3]
    assert leased(store, short) == []


def test_pictures_that_wait_for_storage_are_few(
    runner: Runner, back: threading.Event, store: JobStore, create: Create
) -> None:
    model = model_of(runner)
    job = create(LISTS[:1] * (3 * model.engine.max_pictures + 1), options=ONE_STEP)
    for _ in range(6):
        runner.run_once()
    most = 2 * model.engine.max_pictures  # a batch is drawn while another is judged
    assert runner.storer.count(model.stream) == most
    assert len(leased(store, job)) == most
    back.set()
    run(runner, job.id)
    assert status(store, job) == "finished"


@pytest.mark.parametrize("hangs", [False, True])
def test_while_storage_is_away_nothing_is_lost_and_a_job_past_its_deadline_fails(
    runner: Runner, store: JobStore, create: Create, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    hangs: bool,
) -> None:  # fmt: skip
    write, is_back, batches = runner.storage.files.write, threading.Event(), batches_of(engine_of(runner))
    runner.storage.patience_s = 0.05 if hangs else 60.0

    def late(*given: Any) -> None:
        if hangs:
            is_back.wait()
        elif not is_back.is_set():
            raise OSError("no space left")
        write(*given)

    monkeypatch.setattr(runner.storage.files, "write", late)
    overdue, waits = create(LISTS[:1], options=ONE_STEP), create(options=ONE_STEP)
    run_until(runner, lambda: runner.storage.problem)
    reason = "storage has not answered" if hangs else "no space left"
    workers.announce(runner.connection, runner.name, process.about(runner), lease_s=60)
    assert [reason in one["storage_problem"] for one in workers.list_live(store.connection)] == [True]
    store.connection.zadd(keys.DEADLINES, {overdue.id: 0})
    other = create(LISTS[:1], options=ONE_STEP)
    run(runner, overdue.id)
    assert error_of(store, overdue) == OVERDUE["timeout"]
    assert [status(store, job) for job in (waits, other)] == ["running", "queued"]  # left to a worker that can store
    assert done_count(store, waits.id) == 0
    is_back.set()
    runner.storage.patience_s = 60.0
    run(runner, waits.id, other.id)
    assert [status(store, job) for job in (waits, other)] == ["finished", "finished"]
    settle(runner)
    assert (runner.storage.problem, batches) == ("", [4, 1])  # nothing was sampled again
    assert (done_count(store, overdue.id), len(pngs(store, waits.id, range(3)))) == (0, 3)
    assert "pictures cannot be stored; retrying" in caplog.messages


def test_a_draining_worker_waits_for_what_is_being_stored(
    runner: Runner, back: threading.Event, store: JobStore, create: Create
) -> None:
    job = create(LISTS[:1], options=ONE_STEP)
    runner.run_once()
    threading.Timer(0.2, back.set).start()
    runner.stop(3600)
    runner.drain()
    assert status(store, job) == "finished"


def test_a_draining_worker_leaves_what_is_not_stored_in_time_to_another(
    runner: Runner, back: threading.Event, store: JobStore, create: Create
) -> None:
    job = create(options=ONE_STEP)
    runner.run_once()
    runner.stop(within_s=0.1)
    runner.drain()
    assert not runner.busy
    assert leased(store, job) == [0] * 3  # released, so that the other need not wait until the leases expire
    run(Runner(store.connection, store.settings, "w2"), job.id)
    assert status(store, job) == "finished"
    made = pngs(store, job.id, range(3))
    back.set()
    until(lambda: not asyncio.all_tasks(runner.storage._loop))  # the late pictures change nothing
    assert (status(store, job), pngs(store, job.id, range(3))) == ("finished", made)


def test_pictures_that_cannot_be_stored_for_a_reason_that_nobody_foresaw_fail_their_job_alone(
    runner: Runner, store: JobStore, monkeypatch: pytest.MonkeyPatch, create: Create
) -> None:
    write, commit = runner.storage.files.write, runner.store.commit
    picture, verdict, good = (create(LISTS[:2], options=ONE_STEP) for _ in range(3))

    def broken_write(job_id: str, name: str, content: bytes) -> None:
        if (job_id, name) == (picture.id, "1.png"):
            raise ValueError("a defect")
        write(job_id, name, content)

    def broken_commit(stream: Any, finished: Any, results: Any) -> Any:
        if finished[0][0].job == verdict.id:
            raise KeyError("another")
        return commit(stream, finished, results)

    monkeypatch.setattr(runner.storage.files, "write", broken_write)
    monkeypatch.setattr(runner.store, "commit", broken_commit)
    run(runner, picture.id, verdict.id, good.id)
    settle(runner)
    assert error_of(store, picture) == "picture 1: ValueError: a defect"
    assert error_of(store, verdict) == "KeyError: 'another'"
    assert status(store, good) == "finished"
    assert (leased(store, good), model_of(runner).stream.leased) == ([], set())


def test_work_that_cannot_begin_is_not_held_for_its_leases_would_be_renewed_for_ever(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(work: Any) -> None:
        work.close()
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(runner.storage, "start", refuse)
    stream: Any
    claim: Any
    stream, claim = SimpleNamespace(leased={"1-0", "2-0"}), SimpleNamespace(entry="1-0")
    with pytest.raises(RuntimeError, match="new thread"):
        runner.storer.submit(storer.Work(job="j", stream=stream, judged_by=None, complete=[claim]))
    assert (runner.busy, stream.leased) == (False, {"2-0"})


@pytest.mark.parametrize("trouble", ["a file stands there", "hangs", "cancelled"])
def test_a_job_whose_folder_cannot_be_written_keeps_no_other_from_being_stored(
    runner: Runner, store: JobStore, create: Create, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """It fails after some attempts, and after its client has cancelled it nothing is tried any more."""
    if trouble == "cancelled":
        monkeypatch.setattr("service.worker.job_files.ATTEMPTS", -1)
    bad, good = create(LISTS * 6, options=ONE_STEP), create()  # more than there are threads
    folder, write, back = runner.storage.files.folder(bad.id), runner.storage.files.write, threading.Event()
    if trouble == "hangs":
        runner.storage.patience_s = 0.2

        def hang(job_id: str, *rest: Any) -> None:
            if job_id == bad.id:
                back.wait()
            write(job_id, *rest)

        monkeypatch.setattr(runner.storage.files, "write", hang)
    else:
        folder.parent.mkdir(parents=True)
        folder.touch()
    run(runner, good.id)
    assert status(store, good) == "finished"
    if trouble == "cancelled":
        assert runner.storer.works
        store.cancel(bad.id)
        settle(runner)
    else:
        run(runner, bad.id)
        reason = {"hangs": "Stalled: storage has not answered within 0.2 s"}.get(trouble, "Error: ")
        assert error_of(store, bad).startswith("picture ")
        assert reason in error_of(store, bad)
    assert runner.storage.problem == ""
    settle(runner)
    assert (leased(store, good), model_of(runner).stream.leased) == ([], set())
    back.set()


# Jobs that end, or are deleted, while they are stored.


@pytest.mark.parametrize(("pictures", "name"), [(1, "0.png"), (2, "1.png"), (2, "grid.png")])
def test_a_job_that_is_deleted_while_a_file_of_it_is_written_leaves_none(
    runner: Runner, store: JobStore, create: Create, monkeypatch: pytest.MonkeyPatch, pictures: int, name: str
) -> None:
    files, write = runner.storage.files, runner.storage.files.write

    def deleting(job_id: str, written: str, content: bytes) -> None:
        if written == name and store.cancel(job_id):
            assert store.delete(job_id)
            files.remove(job_id)
        write(job_id, written, content)

    monkeypatch.setattr(files, "write", deleting)
    job = create(LISTS[:pictures], options=ONE_STEP)
    run(runner, job.id)
    settle(runner)
    assert list(store.settings.pictures.rglob("*.png")) == []
    assert store.connection.xlen(keys.pictures(job.digest)) == 0


# Workers that die before the grid.


@pytest.mark.parametrize("deaths", [1, 3, 4])
def test_a_grid_that_a_worker_died_before_is_composed_by_another_unless_too_many_died(
    store: JobStore, create: Create, monkeypatch: pytest.MonkeyPatch, deaths: int
) -> None:
    quick, job, later = store.settings.model_copy(update={"lease_s": 0.2}), create(), list[JobRecord]()
    died = list[int]()
    with monkeypatch.context() as patch:
        patch.setattr(storer, "compose", lambda *_: died.append(1) or threading.Event().wait())  # it does nothing more
        for number in range(deaths):
            if number >= 2:  # it is suspected by now, so nothing else may be in its worker
                time.sleep(0.3)  # until its lease has expired
                later.append(create())
            run_until(Runner(store.connection, quick, f"dead{number}"), lambda: len(died) > number)  # noqa: B023
            assert (status(store, job), done_count(store, job.id)) == ("running", 3)
            assert {status(store, one) for one in later} <= {"queued"}
    run(Runner(store.connection, quick, "w"), job.id, *(one.id for one in later))
    if deaths < MAX_DELIVERIES:
        assert status(store, job) == "finished"
        assert grid_of(store, job.id)
    else:
        assert error_of(store, job) == "workers died or failed 4 times while composing the grid"
    assert store.connection.xlen(keys.pictures(job.digest)) == 0


# Scores and grids.


def test_of_repeats_with_the_same_accuracy_the_first_with_most_exact_matches_is_best() -> None:
    _, made = done(BegunClaim("1-1", "j", 0, record=record(1)))
    verdicts = [made.verdict.model_copy(update={"index": i, "exact": i > 0}) for i in range(3)]
    assert storer.score(verdicts, 1).best == 1


def test_the_worst_pictures_of_all_repeats_are_those_with_the_lowest_f1() -> None:
    """Thirty repeats of one picture: twenty of the 29 that are not as asked, and of equal ones the first."""
    _, made = done(BegunClaim("1-1", "j", 0, record=record(1)))
    scores = [{"index": i, "exact": i == 7, "f1": i % 4 / 4} for i in range(30)]
    verdicts = [made.verdict.model_copy(update=score) for score in scores]
    assert storer.score(verdicts, 1).worst == [*range(0, 30, 4), *range(1, 30, 4), *range(2, 16, 4)]


def test_a_grid_of_several_batches_is_that_of_one(runner: Runner, store: JobStore, create: Create) -> None:
    """Those of earlier batches are read from storage."""
    lists = LISTS * 4
    job = create(lists)
    run(runner, job.id)
    whole = started(store.connection, store.settings.model_copy(update={"batch_pictures": len(lists)}), "w2")
    other = create(lists)
    run(whole, other.id)
    assert np.array_equal(*(pixels(grid_of(store, one.id)) for one in (job, other)))


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("no picture", "picture 0: LookupError: it is no longer in storage"),
        ("no PNG", "picture 0: ValueError: it is damaged"),
        ("no verdict", "ValidationError"),
    ],
)
def test_a_job_whose_grid_cannot_be_composed_fails_alone(
    runner: Runner, store: JobStore, create: Create, broken: str, reason: str
) -> None:
    job, other = create(LISTS * 3), create()  # more than a batch, so that the first pictures are read for the grid
    while not done_count(store, job.id):
        runner.run_once()
    if broken == "no picture":
        (runner.storage.files.folder(job.id) / picture_name(0)).unlink()
    elif broken == "no PNG":
        runner.storage.files.write(job.id, picture_name(0), b"no PNG")
    else:
        store.connection.hset(keys.verdicts(job.id), "0", b"no JSON")
    run(runner, job.id, other.id)
    assert error_of(store, job).startswith(f"the result cannot be composed: {reason}")
    assert status(store, other) == "finished"
