"""The soak's checks find what they must; its plan follows from the seed."""

import itertools
from collections import Counter

import numpy as np
import pytest
from redis import Redis

from service.contract.records import JobRecord
from service.files import GRID, PictureFiles, picture_name
from service.local.redis_server import RedisServer
from service.store import keys
from service.store.jobs import JobStore
from soak import outcome
from soak.load import BODIES, Ledger
from soak.memory import Sampler
from soak.strikes import GAP_S, KINDS, LASTING_S, Strike, plan, unplanned
from soak.trend import trend
from tests.test_faults import UNDISTURBED, commit, create, good, server, store

__all__ = ["server", "store"]  # fixtures

TIMES = np.arange(0, 1800, 15.0)
TWO = next(i for i, body in enumerate(BODIES) if body.total == 2)


def samples(growth_per_hour: float, seed: int = 0) -> list[float]:
    """A level of 100 with a random wave of a minute or two, as the load makes, that grows."""
    noise = np.convolve(np.random.default_rng(seed).normal(size=len(TIMES) + 7), np.ones(8) / 8, "valid")
    return list(100 + 3 * noise + 100 * growth_per_hour * TIMES / 3600)


@pytest.mark.parametrize("seed", range(4))
def test_growth_is_told_from_noise(seed: int) -> None:
    assert trend(TIMES, samples(0.0, seed)).is_flat
    assert trend(TIMES, samples(-0.2, seed)).is_flat
    grown = trend(TIMES, samples(0.2, seed))
    assert not grown.is_flat
    assert grown.low < 0.2 * 100 / grown.median < grown.high


def test_a_process_that_was_restarted_begins_a_new_series() -> None:
    sampler = Sampler(stack=None, is_disturbed=lambda: False)  # type: ignore[arg-type]
    sampler.series["worker 0, memory", 1] = [(at, 1.0) for at in TIMES[:60]]
    sampler.series["worker 0, memory", 2] = [(at, 2.0) for at in TIMES[60:]]
    sampler.series["worker 1, memory", 3] = [(at, 3.0) for at in TIMES]
    assert sampler.latest() == {"worker 0, memory": 2.0, "worker 1, memory": 3.0}
    whole = {what: trend.median for what, trend in sampler.trends(0.0, 1785.0).items()}
    assert whole == {"worker 1, memory": 3.0}
    half = {what: trend.median for what, trend in sampler.trends(900.0, 1785.0).items()}
    assert half == {"worker 0, memory": 2.0, "worker 1, memory": 3.0}


def test_the_plan_follows_from_the_seed() -> None:
    strikes = plan(7, 3600)
    assert strikes == plan(7, 3600) != plan(8, 3600)
    assert strikes[-1].at_s < 3540
    for at in range(0, len(strikes) - len(KINDS) + 1, len(KINDS)):
        assert Counter((one.kind, one.target) for one in strikes[at : at + len(KINDS)]) == Counter(KINDS)
    for one, following in itertools.pairwise(strikes):
        assert GAP_S[0] <= following.at_s - one.at_s - one.lasting_s <= GAP_S[1]
        assert one.lasting_s <= LASTING_S[1]


def test_a_process_that_ends_by_itself_and_a_fault_that_is_not_carried_out_are_found() -> None:
    strikes = [Strike(1, "kill", "api", 0), Strike(2, "pause", "worker 1", 5), Strike(3, "restart", "worker 0", 0)]
    assert unplanned(strikes, strikes, ["api", "worker 0"]) == []
    assert unplanned(strikes, strikes[:2], ["api", "worker 1", "api"]) == [
        "the fault restart worker 0 was not carried out",
        "the api ended by itself 1 times",
        "the worker 1 ended by itself 1 times",
    ]


@pytest.fixture
def files(store: JobStore) -> PictureFiles:
    return PictureFiles(store.settings.pictures)


def problems(
    server: RedisServer, files: PictureFiles, *jobs: JobRecord, cancelled: tuple[str, ...] = (), late: str = ""
) -> list[str]:
    """Return the problems of these jobs, as if the others of this module's Redis did not exist."""
    ledger = Ledger(jobs={job.id: TWO for job in jobs}, may_be_cancelled=set(cancelled), may_be_late={late})
    found, _ = outcome.problems(ledger, {TWO: UNDISTURBED}, server.folder, files)
    return [one for one in found if not one.endswith("was not accepted")]


def test_correct_jobs_have_no_problems(store: JobStore, server: RedisServer, files: PictureFiles) -> None:
    deleted, cancelled, late = good(store), create(store), create(store)
    store.delete(deleted.id)
    store.cancel(cancelled.id)
    commit(store, cancelled, 0)
    store.fail(late.id, "too late", by_deadline=True)
    jobs = good(store), deleted, cancelled, late
    assert problems(server, files, *jobs, cancelled=(cancelled.id,), late=late.id) == []
    assert problems(server, files, late) == [f"job {late.id}: it did not finish: its states were ['queued', 'failed']"]


def test_a_lost_job_is_found(store: JobStore, server: RedisServer, files: PictureFiles) -> None:
    lost, open_ = good(store).model_copy(update={"id": "0" * 32}), create(store)
    first, *others = problems(server, files, lost, open_)
    assert first == f"job {lost.id} was accepted but does not exist"
    assert f"job {open_.id}: its states were queued" in others
    unknown, _ = outcome.problems(Ledger(), {}, server.folder, files)
    assert f"job {open_.id} exists but was not accepted" in unknown


def test_a_job_that_nobody_cancelled_is_found(store: JobStore, server: RedisServer, files: PictureFiles) -> None:
    job = create(store)
    store.cancel(job.id)
    assert problems(server, files, job) == [f"job {job.id}: it did not finish: its states were ['queued', 'cancelled']"]


def test_a_picture_after_the_end_or_after_deletion_is_found(
    store: JobStore, server: RedisServer, files: PictureFiles
) -> None:
    cancelled, deleted = create(store), good(store)
    store.cancel(cancelled.id)
    store.connection.hset(keys.verdicts(cancelled.id), "0", b"late")
    store.delete(deleted.id)
    store.connection.hset(keys.verdicts(deleted.id), "0", b"late")
    found = problems(server, files, cancelled, deleted, cancelled=(cancelled.id,))
    assert found == [
        f"job {cancelled.id}: pictures ['0'] were stored after its end",
        f"job {deleted.id}: its pictures were stored 0: 2 times",
        f"job {deleted.id}: verdicts was written after it was deleted or had expired",
        f"job {deleted.id}: pictures ['0'] were stored after its end",
    ]


def test_what_is_left_over_is_found(connection: Redis, settings: object) -> None:
    connection.set(keys.events("1" * 32), "", ex=60)
    connection.set("forgotten:" + "2" * 32, "")
    connection.set("short-lived", "", ex=60)
    connection.sadd(keys.WORKERS, "w")
    assert outcome.left_over(connection) == {"labelgrid:job:*:events": 1, "forgotten:*": 1}


def test_other_pictures_are_found(store: JobStore, server: RedisServer, files: PictureFiles) -> None:
    job = good(store)
    for index, png in enumerate(UNDISTURBED.pictures):
        files.write(job.id, picture_name(index), png)
    files.write(job.id, GRID, UNDISTURBED.grid)
    assert problems(server, files, job) == []
    for index in range(2):
        files.write(job.id, picture_name(index), b"other")
    assert problems(server, files, job) == [f"job {job.id}: its pictures [0, 1] differ from an undisturbed run"]
