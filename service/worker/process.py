"""The worker process: an RQ worker that keeps its models loaded and its batch running from one job to the next.

Knows RQ and signals; what is done with a job is in `runner.py`.
"""

import contextlib
import os
import socket
import threading
import time
from types import FrameType
from typing import Any

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import RedisError
from rq import Queue, SimpleWorker
from rq.exceptions import DequeueTimeout
from rq.job import Job
from rq.serializers import JSONSerializer

from service.settings import SettingError, Settings
from service.store import workers
from service.store.connection import RetryUntilStopped, connect
from service.store.jobs import new_id
from service.telemetry.logs import get_logger
from service.telemetry.metrics import serve_worker
from service.worker.runner import LOOK_S, Runner
from shared.device import DeviceError

log = get_logger(__name__)

# RQ calls a job's function by its name alone, so the process's one runner is kept here.
_runner: Runner | None = None


def run_job(job_id: str) -> None:
    """What RQ runs: works until job `job_id` has ended."""
    assert _runner is not None, "run_job runs in a worker process only"
    _runner.run(job_id)


class PictureWorker(SimpleWorker):
    """RQ's in-process worker, with heartbeats during a job, a short lease, and a batch that outlives a job.

    RQ's `Worker` forks for every job, which would load the model each time and cannot use CUDA after it was started.
    """

    def __init__(self, runner: Runner, connection: Redis, settings: Settings) -> None:
        # A random name: RQ refuses a name that a killed worker still holds.
        super().__init__(
            [Queue(settings.queue, connection=connection, serializer=JSONSerializer)],
            name=runner.name,
            connection=connection,
            serializer=JSONSerializer,
            worker_ttl=20,
            maintenance_interval=LOOK_S,
        )
        self.runner, self.settings = runner, settings
        self.log_job_description = False

    @property
    def dequeue_timeout(self) -> int:
        return LOOK_S  # RQ looks for maintenance between two of these

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        return int(self.settings.lease_s) + 1

    def run_maintenance_tasks(self) -> None:
        super().run_maintenance_tasks()  # type: ignore[no-untyped-call]
        self.heartbeat()
        self.runner.look_at_storage()

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[Job, Queue] | None:
        """The next job; until one comes, pictures of other workers' jobs are made, too.

        There is one RQ job for a request: so a large one is shared by workers that would else be idle, and pictures
        that are left in the batch do not lie still when their own job runs in another worker, which waits for them.
        """
        while not self._stop_requested:
            at_once = self.runner.busy or self.runner.measuring
            found = self._next_job(None if at_once else timeout)
            if found is not None or timeout is None:
                return found
            self.runner.turn()
            if self.should_run_maintenance_tasks:
                self.run_maintenance_tasks()
        return None

    def heartbeat(self, timeout: int | None = None, pipeline: Pipeline | None = None) -> None:
        if pipeline is not None:
            super().heartbeat(timeout, pipeline)
            return
        with self.connection.pipeline(transaction=False) as pipe:  # RQ would send its commands one by one
            super().heartbeat(timeout, pipe)
            pipe.execute()

    def _next_job(self, timeout: int | None) -> tuple[Job, Queue] | None:
        """The next job of the queue; None if there is none within `timeout`, or with None at once.

        Not as RQ does: it would go on asking a Redis that is away when we are to stop.
        """
        try:
            result = self.queue_class.dequeue_any(
                self._ordered_queues,
                timeout,
                connection=self.connection,
                job_class=self.job_class,
                serializer=self.serializer,
                death_penalty_class=self.death_penalty_class,
            )
        except DequeueTimeout:
            return None
        if result is None:
            return None
        job, queue = result
        job.redis_server_version = self.get_redis_server_version()  # type: ignore[no-untyped-call]
        return job, queue

    def _shutdown(self) -> None:
        """On SIGTERM or Ctrl-C: the job in work goes to another worker at the next step; `teardown` does the rest.

        RQ would raise an exception here, out of the signal's handler, which code in the middle of anything may swallow.
        """
        self.runner.stop(self.settings.drain_s)
        self._stop_requested = True

    def request_force_stop(self, signum: int, frame: FrameType | None) -> None:
        """On a second signal: no time is left."""
        self.runner.stop(0)

    def teardown(self) -> None:
        with contextlib.suppress(RedisError):
            if self.runner.stopping:
                self.runner.drain()
        with contextlib.suppress(RedisError):
            self.runner.give_back()
        with contextlib.suppress(RedisError):  # what we said of ourselves is gone `lease_s` later all the same
            super().teardown()  # type: ignore[no-untyped-call]


class Heartbeat(threading.Thread):
    """Says every `heartbeat_s` that the worker lives, and renews its leases and RQ's notes of the running job."""

    def __init__(self, worker: PictureWorker, connection: Redis, settings: Settings) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.worker, self.connection, self.settings = worker, connection, settings
        self.ended = threading.Event()
        self.born_at = time.time()

    def run(self) -> None:
        while not self.ended.is_set():
            try:
                self.beat()
            except RedisError as error:
                log.warning("heartbeat failed", reason=str(error))
            except Exception:  # it must go on: without it the worker counts as dead
                log.exception("heartbeat failed")
            self.ended.wait(self.settings.heartbeat_s)

    def beat(self) -> None:
        runner = self.worker.runner
        workers.announce(runner.connection, runner.name, self.about(), self.settings.lease_s)
        runner.keep_claims()
        for execution in list(self.worker.executions.values()):
            if execution._job is not None:
                self.worker.maintain_heartbeats(execution._job, execution)

    def about(self) -> dict[str, Any]:
        runner = self.worker.runner
        models = [{"name": lane.name, "digest": lane.digest} for lane in list(runner.lanes.values())]
        host = {"host": socket.gethostname(), "pid": os.getpid()}
        rate = round(runner.rate.per_s, 3)
        return {
            **host,
            "device": str(runner.device),
            "born_at": self.born_at,
            "models": models,
            "pictures_per_s": rate,
            "draining": runner.stopping,
        }

    def end(self) -> None:
        self.ended.set()
        self.join(timeout=5)
        with contextlib.suppress(RedisError):
            workers.withdraw(self.worker.runner.connection, self.worker.runner.name)


def build(settings: Settings, connection: Redis) -> PictureWorker:
    """A worker with the promoted model loaded. CheckpointError if storage has none that can be used.

    SettingError for a device that this machine has not got.
    """
    global _runner
    try:
        _runner = Runner(connection, settings, name=new_id())
    except DeviceError as error:
        raise SettingError("device", settings.device, f"{error}; auto takes what there is") from error
    lane = _runner.lane()
    about = {"model": lane.name, "digest": lane.digest, "device": str(_runner.device)}
    log.info("worker ready", worker=_runner.name, **about)
    return PictureWorker(_runner, connection, settings)


def _serve_metrics(runner: Runner, host: str, port: int) -> None:
    try:
        served = serve_worker(runner, host, port)
    except OSError as error:
        reason = f"cannot be served on {host} (LABELGRID_METRICS_HOST): {error.strerror}; 0 takes a free port"
        raise SettingError("metrics_port", port, reason) from error
    log.info("metrics served", host=host, port=served)


def main(settings: Settings) -> None:
    """Works until SIGTERM or Ctrl-C. SettingError for a port of metrics that cannot be had."""
    connection = connect(settings.redis_url, retry=RetryUntilStopped(lambda: _runner is not None and _runner.stopping))
    worker = build(settings, connection)
    if settings.metrics_port is not None:  # before the first heartbeat: who cannot serve them was never there
        _serve_metrics(worker.runner, settings.metrics_host, settings.metrics_port)
    heartbeat = Heartbeat(worker, connection, settings)
    heartbeat.start()
    try:
        worker.work(logging_level="WARNING")
    finally:
        heartbeat.end()
