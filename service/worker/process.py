"""The worker process is an RQ worker: RQ wakes, lists, suspends and ends it. `runner.py` does the work.

Only RQ 3.0 is allowed: each method of it that is replaced here says why, and a test of its own watches it.
"""

import contextlib
import math
import os
import socket
import threading
from collections.abc import Callable, Mapping
from functools import partial
from types import FrameType
from typing import Any
from uuid import uuid4

import torch
from redis import Redis
from redis.exceptions import RedisError
from rq import Queue, SimpleWorker
from rq.exceptions import DequeueTimeout, NoSuchJobError, StopRequested
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.utils import as_text, now
from rq.worker import WorkerStatus

from service.files import PictureFiles
from service.settings import SettingError, Settings
from service.start import read_to_serve
from service.store import functions, workers
from service.store.connection import RetryUntilStopped, best_effort, connect
from service.telemetry.boundary import CRASHED, confined, start_vital
from service.telemetry.logs import get_logger
from service.telemetry.metrics import serve_worker
from service.worker.runner import Runner
from shared.device import DeviceError, pick_device
from shared.openvino import TORCH_THREADS, EngineError, uses_openvino

log = get_logger(__name__)

PRUNE_EVERY_S = 3600.0
WAIT_S = 1  # how long an idle worker waits for an RQ job before it looks by itself
CLEAN_EVERY_S = 60  # how often one worker looks for RQ jobs whose workers died; `rq info` does, too
FORESEEN = RedisError, OSError  # while Redis or storage is away
OLD_RING = "labelgrid.work"  # what APIs of the release before this one enqueue
READ = {"created_at", "data", "description", "enqueued_at", "origin", "started_at", "status", "worker_name"}


def sample() -> None:
    """What RQ jobs name. A `Worker` samples until nothing is left; any other worker fails the job, with this reason."""
    raise RuntimeError("only service.worker.process.Worker can run this")


class Task(Job):
    """An RQ job that names `sample`, or fails. `work`: what its worker does for it.

    Whoever can write to Redis can name any function, as the job's own or as a callback, and any address as a webhook.
    """

    work: Callable[[], None]

    @classmethod
    def fetch(cls, *which: Any, **more: Any) -> Job:
        """Read a job from Redis. NoSuchJobError also if it cannot be read: of any other, RQ's worker would end."""
        try:
            return super().fetch(*which, **more)
        except (ValueError, TypeError, AttributeError) as error:
            raise NoSuchJobError(f"an RQ job cannot be read: {error}") from error

    def restore(self, raw_data: Mapping[bytes, bytes]) -> None:
        """Take over the known fields. Others name functions, addresses and other jobs."""
        super().restore({name: value for name, value in raw_data.items() if as_text(name) in READ})
        self.timeout, self.failure_ttl = -1, workers.FAILURE_S

    def perform(self) -> None:
        """Do the worker's work. PermissionError if the job names another function or has arguments."""
        if self.func_name not in (workers.TASK, OLD_RING) or self.instance or self.args or self.kwargs:
            raise PermissionError(f"workers run {workers.TASK} only, without arguments")
        self.work()


def repeat(what: str, work: Callable[[], None], every_s: float, ended: threading.Event) -> threading.Thread:
    """Do something now and every so often, in a thread of its own, which lives on whatever fails.

    If it ends all the same, so does the process: without a heartbeat it would work unseen, and renew no lease.
    """

    def run() -> None:
        while not ended.is_set():
            try:
                with confined("periodic task", passes=lambda error: isinstance(error, FORESEEN), task=what):
                    work()
            except FORESEEN as error:
                log.warning(f"{what} failed", reason=str(error))
            ended.wait(every_s)

    return start_vital(what, run)


def about(runner: Runner) -> dict[str, Any]:
    """Return what a worker says about itself. Safe in another thread."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": str(runner.device),
        "models": [
            {
                "name": loaded.name,
                "digest": loaded.digest,
                "rows_per_s": round(loaded.rate.per_s, 3),
                "max_pictures": loaded.engine.max_pictures,
            }
            for loaded in runner.models
        ],
        "pictures_per_s": round(runner.sampled / runner.worked_s, 3) if runner.worked_s else 0.0,
        "draining": runner.stopping,
        "stalled": runner.watchdog.stalled,
        "loading": runner.loading,
        "storage_problem": runner.storage.problem,
    }


def prune(settings: Settings, connection: Redis) -> None:
    """Remove old files from storage, which may hang.

    Redis's clock decides what is old: by its own, one worker whose clock is wrong would remove everything.
    """
    created_before = connection.time()[0] - settings.keep_s - settings.job_timeout_s
    log.info("old pictures removed", hours=PictureFiles(settings.pictures).remove_older(created_before))


def build(settings: Settings, connection: Redis, name: str) -> Runner:
    """Return a runner without models. SettingError if the machine does not have the device or engine."""
    try:
        if uses_openvino(settings.engine, pick_device(settings.device)):
            torch.set_num_threads(TORCH_THREADS)  # all the time; a Stepper does so for its steps alone
        runner = Runner(connection, settings, name)
    except DeviceError as error:
        raise SettingError("device", settings.device, f"{error}; auto takes what there is") from error
    except EngineError as error:
        raise SettingError("engine", settings.engine, str(error)) from error
    functions.remove_former(connection)
    return runner


def _serve_metrics(runner: Runner, settings: Settings) -> None:
    if settings.metrics_port is None:
        return
    host = settings.metrics_host
    try:
        log.info("metrics served", host=host, port=serve_worker(runner, host, settings.metrics_port))
    except OSError as error:
        reason = f"cannot be served on {host} (LABELGRID_METRICS_HOST): {error.strerror}; 0 takes a free port"
        raise SettingError("metrics_port", settings.metrics_port, reason) from error


class Worker(SimpleWorker):
    """An RQ worker in this process. It runs `Task`s only, from RQ's queue `labelgrid`.

    `name`: random by default, as it should be. `settings`: those of the environment by default, for `rq worker`, whose
    queues, connection and other options are ignored.
    """

    job_class = Task

    def __init__(
        self,
        queues: Any = (),
        name: str | None = None,
        connection: Redis | None = None,
        settings: Settings | None = None,
        prepare_for_work: bool = True,
        **_: Any,
    ) -> None:
        if settings is None and prepare_for_work:
            settings = read_to_serve("worker")
        self.runner: Runner | None = None
        self._ended = threading.Event()
        if settings is not None:
            self.settings = settings
            # RQ wants bytes. A function, for redis-py copies a method with its object.
            retry = RetryUntilStopped(lambda: self._gives_up_or_works())
            connection = connect(settings.redis_url, retry=retry, decodes=False)
        super().__init__(
            [workers.QUEUE] if prepare_for_work else [],
            name or uuid4().hex,
            connection=connection,
            serializer=JSONSerializer,
            default_result_ttl=workers.RESULT_S,
            maintenance_interval=CLEAN_EVERY_S,
            prepare_for_work=prepare_for_work,
        )

    def register_birth(self) -> None:
        """List the worker, by its heartbeat, and load the promoted model. RQ's own way fails if Redis is full.

        Raises what `build` raises, and CheckpointError if storage has no usable model.
        """
        connection = connect(self.settings.redis_url, retry=RetryUntilStopped(lambda: self._gives_up()))
        self.runner = build(self.settings, connection, self.name)
        _serve_metrics(self.runner, self.settings)  # a failure is seen before the worker is listed
        self.birth_date = now()
        # Before it loads: else others that load the same take it for dead.
        self._heartbeats = repeat("heartbeat", self._beat, self.settings.heartbeat_s, self._ended)
        try:
            model = self.runner.models.load()
        except BaseException:
            self._withdraw()
            raise
        self.runner.loading = False
        about_model = {"model": model.name, "digest": model.digest, "device": str(self.runner.device)}
        log.info("worker ready", worker=self.name, **about_model)
        self.runner.watchdog.ends_process = True
        self.runner.watchdog.moved()
        repeat("removing old pictures", partial(prune, self.settings, connection), PRUNE_EVERY_S, self._ended)

    def set_state(self, state: Any, pipeline: Any = None) -> None:
        """Note the state. A full Redis refuses it, which must not end the worker: the next heartbeat repeats it."""
        with best_effort():
            super().set_state(state, pipeline)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Drain, or end at once after a second signal. RQ's own handler writes to Redis, and knows no drain."""
        assert self.runner is not None
        self._stop_requested = True
        self.runner.stop(0.0 if self.runner.stopping else self.settings.drain_s)

    def teardown(self) -> None:
        """Leave the registry, and end with status 1 if nobody asked for an end: RQ swallows what a worker dies of."""
        assert self.runner is not None
        has_crashed = not self.runner.stopping
        self._withdraw()
        with contextlib.suppress(RedisError):
            super().teardown()  # type: ignore[no-untyped-call]
        if has_crashed:
            raise SystemExit(CRASHED)

    def unsubscribe(self) -> None:
        """End the thread that hears RQ's commands. It closes its connection itself; RQ would do so at the same time."""
        if self.pubsub_thread is not None:
            self.pubsub_thread.stop()  # before what wakes it: else it may wait for another minute
            self.pubsub.unsubscribe()
            self.pubsub_thread.join(timeout=1)

    def _withdraw(self) -> None:
        """End the heartbeat, and count as dead."""
        assert self.runner is not None
        self.runner.stopping = True  # without further attempts to reach Redis
        self._ended.set()
        self._heartbeats.join(timeout=5)
        with contextlib.suppress(RedisError):  # then the worker counts as live until its lease expires
            workers.withdraw(self.runner.connection, self.name)

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[Job, Queue] | None:
        """Wait for an RQ job. RQ's own wait looks at nothing else, and never ends while Redis is away.

        `timeout`: None for `rq worker --burst`, which ends when the queue is empty.
        """
        assert self.runner is not None
        self.set_state(WorkerStatus.IDLE)
        while True:
            self.heartbeat()
            if self.runner.paused:
                self.check_for_suspension(burst=timeout is None)
                self.runner.paused = False
            if self._stop_requested:
                raise StopRequested
            if self.should_run_maintenance_tasks:
                self.run_maintenance_tasks()  # type: ignore[no-untyped-call]
            try:
                found = self.queue_class.dequeue_any(
                    self.queues,
                    timeout and WAIT_S,
                    connection=self.connection,
                    job_class=self.job_class,
                    serializer=self.serializer,
                )
            except DequeueTimeout:
                with self.runner.confined("periodic task", task="looking for work"):
                    if self.runner.look():
                        workers.wake(self.runner.connection)
                continue
            if found is None:
                self.request_stop(0, None)
            return found

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Give the job what it runs."""
        assert isinstance(job, Task)
        job.work = self._work
        super().execute_job(job, queue)

    def _work(self) -> None:
        assert self.runner is not None
        try:
            self.runner.work()
        except BaseException:
            self._stop_requested = True  # RQ would go on, whatever state the models are in
            raise

    def heartbeat(self, *_: Any, **__: Any) -> None:
        """Tell the watchdog that the loop moves. A thread tells Redis: RQ does not while it runs a job."""
        if self.runner is not None:
            self.runner.watchdog.moved()

    def get_heartbeat_ttl(self, *_: Any) -> int:
        """Return how long an RQ job outlives its worker, in seconds: as long as our leases; RQ's would be minutes."""
        return math.ceil(self.settings.lease_s)

    def _beat(self) -> None:
        """Say that the worker and its RQ job live, renew the leases, and see whether RQ's workers are suspended."""
        assert self.runner is not None
        self.last_heartbeat = now()
        fields = {**self.serialize(), "state": self.get_state()}  # each time, since Redis may lose them
        connection, lease_s = self.runner.connection, self.settings.lease_s
        self.runner.paused = workers.announce(connection, self.name, about(self.runner), lease_s, fields)
        self.runner.renew_claims()
        for execution in list(self.executions.values()):
            ttl = self.get_heartbeat_ttl()
            with best_effort(), self.connection.pipeline() as pipe:
                execution.heartbeat(execution.job.started_job_registry, ttl, pipe)
                pipe.expire(self.executions_key, ttl + 60)
                pipe.execute()

    def _gives_up(self) -> bool:
        """Whether a command is no longer retried. The main loop's retries count as progress: it lives without Redis."""
        if self.runner is not None and threading.current_thread() is threading.main_thread():
            self.runner.watchdog.moved()  # but not the heartbeat's, which retries also while the loop hangs
        return self.runner is not None and self.runner.stopping

    def _gives_up_or_works(self) -> bool:
        """Work while RQ cannot: a full Redis refuses RQ's commands, and only work makes room again."""
        is_main = threading.current_thread() is threading.main_thread()
        if self.runner is not None and is_main and not self.runner.stopping:
            self.runner.work()
        return self._gives_up()


def main(settings: Settings) -> None:
    """Work until SIGTERM or Ctrl-C. SettingError if the metrics' port cannot be used; others as `register_birth`."""
    Worker(settings=settings).work(logging_level="WARNING")  # as for other libraries
