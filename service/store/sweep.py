"""Repair what RQ lost: give open jobs a new RQ job, fail overdue ones, forget dead workers and former libraries."""

import math
import time
from collections.abc import Callable
from typing import Any

from redis import Redis
from rq.exceptions import NoSuchJobError
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer

from service.contract.records import ACTIVE
from service.store import functions, keys, workers
from service.store.claims import expired_leases
from service.store.connection import text
from service.store.creation import RqId
from service.store.jobs import JobStore

PRUNE_EVERY_S = 3600
FORGET_EVERY_S = 60.0  # dead workers and former libraries; a name costs each worker a command
JOBS_PER_SWEEP = 500  # roughly: a sweep stays short, however many jobs are open


class Sweeper:
    """One worker's sweeps. Remembers where the last one stopped, and which jobs lacked their RQ job.

    `has_model`: whether the worker has the model of this digest, and so claims its pictures anyway.
    """

    def __init__(self, store: JobStore, has_model: Callable[[str], bool] = lambda digest: False) -> None:
        self.store, self.has_model = store, has_model
        self.connection: Redis = store.connection
        self._cursor = 0  # in the set of open jobs
        self._missing: set[str] = set()
        self._forgot_at = -math.inf  # in monotonic seconds
        self.waiting: dict[str, str] = {}  # digest of another model -> a job in the last sweep that needs a worker

    def sweep(self) -> None:
        """Check some of the open jobs; the next call continues from there.

        Any worker may call it at any time: a job that is run twice finds its pictures done. Redis's clock decides
        what is overdue, because those of the API and the workers may be wrong. A job whose first RQ job waits, which
        has time left, and whose model this worker has, needs nothing: it is not looked at.
        """
        with self.connection.pipeline(transaction=False) as pipe:
            pipe.sscan(keys.OPEN, self._cursor, count=JOBS_PER_SWEEP)
            pipe.time()
            pipe.lrange(self.store.queue.key, 0, -1)
            (self._cursor, listed), (now, _), queue = pipe.execute()
        in_queue, missing = set(queue), set[str]()
        read = [one for rq_id in queue if (one := RqId.read(text(rq_id))) is not None]
        need_nothing = {one.job_id for one in read if now < one.overdue_at and self.has_model(one.digest)}
        first_of_others = {one.digest: one.job_id for one in reversed(read) if not self.has_model(one.digest)}
        job_ids = ({text(raw) for raw in listed} | self._missing | set(first_of_others.values())) - need_nothing
        with self.connection.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hmget(keys.job(job_id), ["status", "rq", "overdue_at", "digest"])
            states: list[Any] = pipe.execute()
        self.waiting = {}
        for job_id, (status, rq_id, overdue_at, digest) in zip(job_ids, states, strict=True):
            if status is None or text(status) not in ACTIVE:
                self.connection.srem(keys.OPEN, job_id)
                continue
            if overdue_at is not None and now >= int(overdue_at):
                self.store.fail(job_id, "not finished within the time limit for a job")
                continue
            may_wait = digest is not None and not (text(digest) in self.waiting or self.has_model(text(digest)))
            if may_wait and (status == b"queued" or self._has_free_picture(job_id, text(digest))):
                self.waiting[text(digest)] = job_id
            if rq_id not in in_queue and self._is_lost(job_id):
                missing.add(job_id)
        if any(status is None for status, *_ in states):
            _recount(self.connection)
        # RQ moves a job from queue to worker in several steps: only what is missing twice in a row is lost.
        for job_id in missing & self._missing:
            self.store.requeue(job_id)
        self._missing = missing - self._missing
        if time.monotonic() - self._forgot_at >= FORGET_EVERY_S:
            self._forgot_at = time.monotonic()
            workers.forget_dead(self.connection)
            functions.drop_others(self.connection, workers.libraries(self.connection))

    def _has_free_picture(self, job_id: str, digest: str) -> bool:
        """Whether nobody has claimed one of the job's pictures, or the worker died that had one of its model."""
        lease_ms = int(self.store.settings.lease_s * 1000)
        is_pending = bool(self.connection.exists(keys.pending(job_id)))
        return is_pending or bool(expired_leases(self.connection, keys.stream(digest), lease_ms, 1))

    def _is_lost(self, job_id: str) -> bool:
        """Whether the job's RQ job is neither in the queue nor with a live worker."""
        rq_id = self.connection.hget(keys.job(job_id), "rq")  # again: another worker may just have replaced it
        if rq_id is None:
            return True
        try:
            job = RqJob.fetch(text(rq_id), connection=self.connection, serializer=JSONSerializer)
        except NoSuchJobError:
            return True
        status = job.get_status(refresh=False)
        if status == "queued":
            return self.connection.lpos(self.store.queue.key, text(rq_id)) is None
        return not (status == "started" and job.worker_name and workers.is_alive(self.connection, job.worker_name))


def _recount(connection: Redis) -> None:
    """Repair the fair queues after an open job was deleted. Scans all keys of Redis."""
    for raw in connection.scan_iter(keys.pending_counts("*"), count=1000):
        functions.call(connection, "recount", text(raw).removeprefix(keys.pending_counts("")))


def is_time_to_prune(connection: Redis) -> bool:
    """Return whether this process is to remove old results from storage; one does, once in `PRUNE_EVERY_S`."""
    return bool(connection.set(keys.PRUNED, 1, nx=True, ex=PRUNE_EVERY_S))
