"""Jobs, finished pictures and states of Redis for the tests of the store."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from redis import ConnectionPool, Redis

from service.contract.options import PictureOptions
from service.contract.records import FinishedPicture, JobRecord, JobResult, Scores, Verdict, new_job_id
from service.store import async_jobs, keys
from service.store.async_jobs import IdempotentRequest
from service.store.claims import BegunClaim, PictureStream
from service.store.functions import call
from service.store.jobs import JobStore

DIGEST = "d" * 64
RESULT = JobResult(repeats=[Scores(accuracy=1, exact_match=1, f1=1)], best=0)


def record(n: int = 2, owner: str = "", **about: Any) -> JobRecord:
    """Return a job of `n` pictures; `about` replaces other fields."""
    usual = {
        "id": new_job_id(time.time()),
        "kind": "generate",
        "created_at": time.time(),
        "model": "toy",
        "digest": DIGEST,
        "labels": [["red cube"]] * n,
        "seed": 7,
        "columns": 8,
        "options": PictureOptions(steps=4),
    }
    return JobRecord(owner=owner, **{**usual, **about})


def add_job(store: JobStore, job: JobRecord, request: IdempotentRequest | None = None) -> str:
    """Create a job as `AsyncJobs` does, for tests that may block."""
    about = async_jobs.arguments(job, request, async_jobs.limits_of(store.settings))
    if (answer := call(store.connection, "create", *about)) is not None:
        return async_jobs.before(answer, request)
    return job.id


def stored(store: JobStore, job_id: str) -> JobRecord:
    return JobRecord.read(store.connection.hget(keys.job(job_id), "record") or "")


def statuses(store: JobStore, *job_ids: str) -> list[str]:
    """Return the status of each job; "gone" for one that is gone."""
    return [store.connection.hget(keys.job(job_id), "status") or "gone" for job_id in job_ids]


def done_count(store: JobStore, job_id: str) -> int:
    """Return how many pictures of a job are finished."""
    return store.connection.hlen(keys.verdicts(job_id))


def done(claim: BegunClaim, png: bytes = b"png") -> tuple[BegunClaim, FinishedPicture]:
    """Return a finished picture for a claim that has begun."""
    assert claim.index is not None
    picture = claim.record.picture(claim.index)
    verdict = Verdict(
        index=picture.index,
        labels=picture.labels,
        seed=picture.seed,
        accuracy=1.0,
        f1=1.0,
        exact=True,
        probabilities={"red cube": 1.0},
    )
    return claim, FinishedPicture(picture, verdict, png)


def commit_all(store: JobStore, stream: PictureStream) -> list[BegunClaim]:
    """Commit all pending pictures, and return the grids that are then to be composed."""
    return store.commit(stream, [done(claim) for claim in store.claim_new(stream, 1000)], {})[0]


def commands(connection: Redis, act: Callable[[], object]) -> list[str]:
    """Return the names of the commands that `act` sends; a function counts as one."""
    with connection.monitor() as monitor:  # type: ignore[no-untyped-call]
        act()
        connection.ping()
        sent = []
        for command in monitor.listen():
            if command["client_type"] != "lua":
                sent.append(command["command"].split()[0].upper())
            if sent[-1:] == ["PING"]:
                break
    return [command for command in sent[:-1] if command not in ("AUTH", "CLIENT")]


def connect_bytes(connection: Redis) -> Redis:
    """Return a connection for RQ, which reads bytes."""
    pool = connection.connection_pool
    options = {**pool.connection_kwargs, "decode_responses": False}
    return Redis(connection_pool=ConnectionPool(pool.connection_class, **options))


@contextlib.contextmanager
def full(connection: Redis) -> Iterator[None]:
    """Fill Redis, as far as it can tell."""
    connection.config_set("maxmemory", 1)
    try:
        yield
    finally:
        connection.config_set("maxmemory", 0)


@contextlib.contextmanager
def read_only(connection: Redis) -> Iterator[None]:
    """Make Redis a replica, as a failover does; here of nobody."""
    connection.replicaof("127.0.0.1", 1)
    try:
        yield
    finally:
        connection.replicaof("NO", "ONE")
