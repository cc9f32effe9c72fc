"""The fair queue: owners and jobs take turns, each picture is dispatched once, and small jobs end first."""

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from redis import Redis

from service.contract.job_ids import new_job_id
from service.contract.records import JobRecord, JobResult
from service.settings import Settings
from service.store import keys
from service.store.claims import Claim, PictureStream
from service.store.jobs import JobStore
from service.worker.runner import Runner
from shared.checkpoint import read_info
from shared.registry import resolve
from tests.service.processes import until
from tests.service.store.helpers import DIGEST, add_job, full, record


@pytest.fixture
def stream(connection: Redis, settings: Settings) -> PictureStream:
    return PictureStream(connection, settings, DIGEST, "a")


def created(store: JobStore, *jobs: JobRecord) -> dict[str, str]:
    """Create jobs and return a letter for each id."""
    for job in jobs:
        add_job(store, job)
    return {job.id: letter for job, letter in zip(jobs, "ABCDEFGH", strict=False)}


def claimed(stream: PictureStream, names: dict[str, str], room: int) -> str:
    return " ".join(f"{names[claim.job]}{claim.picture.index}" for claim in stream.claim_new(room))


def test_jobs_take_turns_however_the_claims_are_cut(store: JobStore, stream: PictureStream) -> None:
    names = created(store, record(5), record(1), record(3))
    assert claimed(stream, names, 4) == "A0 B0 C0 A1"
    assert claimed(stream, names, 1) == "C1"
    assert claimed(stream, names, 9) == "A2 C2 A3 A4"
    assert claimed(stream, names, 9) == ""


def test_a_claim_says_when_its_job_was_created(store: JobStore, stream: PictureStream) -> None:
    created(store, record(1, id=new_job_id(1764355000.125)))
    assert [claim.asked_at for claim in stream.claim_new(2)] == [1764355000.125]


def test_owners_take_turns_however_many_jobs_each_has(store: JobStore, stream: PictureStream) -> None:
    names = created(store, *(record(2, "alice") for _ in range(4)), record(3, "bob"))
    assert claimed(stream, names, 3) == "A0 E0 B0"
    assert claimed(stream, names, 4) == "E1 C0 E2 D0"
    assert claimed(stream, names, 9) == "A1 B1 C1 D1"


def test_frequent_requests_do_not_come_first_every_time(store: JobStore, stream: PictureStream) -> None:
    names = created(store, record(4, "alice"))
    order = ""
    for _ in range(3):
        names |= dict.fromkeys(created(store, record(1, "bob")), "b")
        order += claimed(stream, names, 1) + " "
    assert order == "A0 b0 A1 "


def test_owners_without_pictures_are_forgotten_once_others_have_had_their_turn(
    store: JobStore, stream: PictureStream, connection: Redis
) -> None:
    names = created(store, record(4, "alice"), *(record(1, owner) for owner in ("bob", "carol", "dave")))
    assert claimed(stream, names, 4) == "A0 B0 C0 D0"
    assert connection.zrange(keys.owners(DIGEST), 0, -1) == [b"alice", b"bob", b"carol", b"dave"]  # whose turn is later
    assert claimed(stream, names, 1) == "A1"
    assert claimed(stream, names, 1) == "A2"
    assert connection.zrange(keys.owners(DIGEST), 0, -1) == [b"alice"]
    assert connection.hgetall(keys.pending_counts(DIGEST)) == {b"alice": b"1"}
    assert claimed(stream, names, 9) == "A3"
    assert not connection.exists(keys.owners(DIGEST), keys.pending_counts(DIGEST))


def test_a_late_job_waits_for_one_turn_of_each_other_job(store: JobStore, stream: PictureStream) -> None:
    names = created(store, record(3), record(3))
    first = claimed(stream, names, 1)
    names |= dict.fromkeys(created(store, record(1)), "late")
    assert f"{first} {claimed(stream, names, 3)}" == "A0 B0 A1 late0"


@pytest.mark.parametrize("seed", range(5))
def test_every_picture_is_dispatched_once_unless_its_job_is_cancelled(
    store: JobStore, stream: PictureStream, connection: Redis, seed: int
) -> None:
    random_ = random.Random(seed)
    jobs, cancelled, seen = list[JobRecord](), set[str](), Counter[tuple[str, int]]()
    for _ in range(60):
        match random_.randrange(4):
            case 0:
                jobs.append(record(random_.randint(1, 9), random_.choice(["", "alice", "bob"])))
                add_job(store, jobs[-1])
            case 1 if jobs:
                job = random_.choice(jobs)
                cancelled |= {job.id} if store.cancel(job.id) else set()
            case _:
                claims = stream.claim_new(random_.randint(1, 5))
                seen.update(claim.picture.key for claim in claims)
                assert not {claim.job for claim in claims} & cancelled
    while claims := stream.claim_new(8):
        seen.update(claim.picture.key for claim in claims)
    assert set(seen.values()) == {1}
    assert {(job.id, i) for job in jobs if job.id not in cancelled for i in range(job.total)} <= set(seen)
    assert not connection.exists(keys.pending_counts(DIGEST), keys.owners(DIGEST))
    assert connection.keys("labelgrid:job:*:waiting") == []


def test_a_job_that_ends_early_leaves_the_queue(store: JobStore, stream: PictureStream, connection: Redis) -> None:
    for _ in range(3):
        job = record(2, "alice")
        add_job(store, job)
        store.cancel(job.id)
    assert connection.keys(keys.owner_jobs(DIGEST, "*")) == []
    names = created(store, record(2, "alice"), record(1, "alice"))
    assert claimed(stream, names, 9) == "A0 B0 A1"


def test_a_job_that_ends_early_leaves_the_queue_though_the_process_that_ends_it_dies(
    connection: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else would remove its pictures if no worker has the model, and no other job might fit for ever."""
    store = JobStore(connection, settings.model_copy(update={"max_queued_pictures": 3}))
    job = record(3, "alice")
    add_job(store, job)

    def die(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(store, "_moved", die)
        with pytest.raises(SystemExit):
            store.cancel(job.id)
    assert not connection.exists(keys.pending(job.id), keys.pending_counts(DIGEST), keys.owner_jobs(DIGEST, "alice"))
    add_job(store, record(1, "alice"))


def test_pictures_are_dispatched_while_redis_is_full(store: JobStore, stream: PictureStream, connection: Redis) -> None:
    names = created(store, record(3))
    with full(connection):
        assert claimed(stream, names, 2) == "A0 A1"


def test_a_large_score_job_does_not_starve_small_requests(
    connection: Redis, settings: Settings, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = read_info(resolve(settings.storage, "toy", "denoiser")).digest
    runner = Runner(connection, settings, "w")
    runner.models.load()
    large = record(8, digest=digest, repeats=10)
    add_job(store, large)
    runner.run_once()  # the batch of 8 is full of it
    small = [record(2, digest=digest) for _ in range(3)]
    for job in small:
        add_job(store, job)
    seen, finish = dict[str, int](), runner.store.finish

    def note(stream: PictureStream, results: Sequence[tuple[Claim, JobResult]]) -> set[str]:
        seen.update({claim.job: store.done_count(large.id) for claim, _ in results})
        return finish(stream, results)

    monkeypatch.setattr(runner.store, "finish", note)
    until(lambda: runner.run_once() or store.ended([large.id]), every_s=0)
    assert list(seen)[-1] == large.id
    # the next batch had two pictures of each of the four jobs, and others may have been stored before the grids
    assert all(10 <= seen[job.id] < 40 for job in small)
