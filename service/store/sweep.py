"""Repair what RQ lost: give open jobs a new RQ job, fail overdue ones, forget dead workers."""

from typing import Any

from redis import Redis
from rq.exceptions import NoSuchJobError
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer

from service.contract.records import ACTIVE
from service.store import fair_queue, keys, workers
from service.store.connection import text
from service.store.jobs import JobStore

PRUNE_EVERY_S = 3600
JOBS_PER_SWEEP = 500  # roughly: a sweep stays short, however many jobs are open


class Sweeper:
    """One worker's sweeps. Remembers where the last one stopped, and which jobs lacked their RQ job."""

    def __init__(self, store: JobStore) -> None:
        self.store = store
        self.connection: Redis = store.connection
        self._cursor = 0  # in the set of open jobs
        self._missing: set[str] = set()
        self.waiting: dict[str, str] = {}  # digest -> a job, of those in the last sweep that need a worker

    def sweep(self) -> None:
        """Check some of the open jobs; the next call continues from there.

        Any worker may call it at any time: a job that is run twice finds its pictures done. Redis's clock decides
        what is overdue, because those of the API and the workers may be wrong.
        """
        self._cursor, listed = self.connection.sscan(keys.OPEN, self._cursor, count=JOBS_PER_SWEEP)
        job_ids = {text(raw) for raw in listed} | self._missing
        states: list[Any]
        with self.connection.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hmget(keys.job(job_id), ["status", "rq", "overdue_at", "digest"])
            pipe.time()
            pipe.lrange(self.store.queue.key, 0, -1)
            *states, (now, _), queue = pipe.execute()
        self.waiting = {}
        in_queue, missing = set(queue), set[str]()
        for job_id, (status, rq_id, overdue_at, digest) in zip(job_ids, states, strict=True):
            if status is None or text(status) not in ACTIVE:
                self.connection.srem(keys.OPEN, job_id)
                continue
            if overdue_at is not None and now >= int(overdue_at):
                self.store.fail(job_id, "not finished within the time limit for a job")
                continue
            is_taken = rq_id not in in_queue
            if digest is not None and (not is_taken or self.connection.exists(keys.pending(job_id))):
                self.waiting[text(digest)] = job_id
            if is_taken and self._is_lost(job_id):
                missing.add(job_id)
        if any(status is None for status, *_ in states):
            fair_queue.recount(self.connection)
        # RQ moves a job from queue to worker in several steps: only what is missing twice in a row is lost.
        for job_id in missing & self._missing:
            self.store.requeue(job_id)
        self._missing = missing - self._missing
        workers.forget_dead(self.connection)

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


def is_time_to_prune(connection: Redis) -> bool:
    """Return whether this process is to remove old results from storage; one does, once in `PRUNE_EVERY_S`."""
    return bool(connection.set(keys.PRUNED, 1, nx=True, ex=PRUNE_EVERY_S))
