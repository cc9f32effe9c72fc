"""The worker process: an RQ worker that keeps its models loaded and its batch running from one job to the next.

Knows RQ and signals; `runner.py` does the work.
"""

import contextlib
import math
import os
import socket
import threading
import time
from types import FrameType
from uuid import uuid4

import torch
from redis import Redis
from redis.exceptions import RedisError
from rq import Queue
from rq.job import Job

from service import alive_file
from service.results.files import ResultFiles
from service.results.retention import prune
from service.rq_worker import QueueWorker
from service.settings import SettingError, Settings
from service.store import workers
from service.store.connection import RetryUntilStopped, best_effort, connect
from service.store.creation import RUN_JOB
from service.store.sweep import is_time_to_prune
from service.telemetry.logs import get_logger
from service.telemetry.metrics import serve_worker
from service.watchdog import watch
from service.worker.runner import Runner
from shared.device import DeviceError, pick_device
from shared.openvino import TORCH_THREADS, EngineError, uses_openvino

log = get_logger(__name__)

BUSY_TAKES_EVERY_S = 10.0  # how long after an RQ job a busy worker takes the next one
MAINTENANCE_S = 30  # RQ counts a worker as dead after 80 s without; sweeps find lost jobs sooner
LOOK_EVERY_S = 60.0  # whether results are to be pruned

runner: Runner | None = None  # of this process; `service.worker.run_job` finds it here


class PictureWorker(QueueWorker):
    """Runs jobs with one runner. The batch outlives a job, and leases are short."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner.store.queue, runner.name, RUN_JOB, MAINTENANCE_S)
        self.runner, self.settings = runner, runner.settings
        self._job_ended_at = -math.inf

    @property
    def has_work(self) -> bool:
        return self._is_busy

    @property
    def wants_job(self) -> bool:
        """Whether to take an RQ job now: a worker with pictures in progress samples those of queued jobs anyway.

        It still takes one now and then, since a job may be of a model that is not loaded, or lack only its end.
        """
        return not self._is_busy or time.monotonic() - self._job_ended_at >= BUSY_TAKES_EVERY_S

    @property
    def _is_busy(self) -> bool:
        """Whether pictures are in progress, or were a moment ago: after a batch that ended at once, others may wait."""
        return self.runner.models.busy or not self.runner.idle

    def execute_job(self, job: Job, queue: Queue) -> None:
        super().execute_job(job, queue)
        self._job_ended_at = time.monotonic()

    def work_between_jobs(self) -> None:
        """Work on the pictures of other workers' jobs.

        A request has one RQ job, so this is how idle workers share a large request. It also finishes pictures that are
        left in the batch when their job runs in another worker, which waits for them.
        """
        self.runner.run_once(rests=False)  # without pictures, it waits for the next RQ job instead

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        return int(self.settings.lease_s) + 1

    def _shutdown(self) -> None:
        """Leave the current job to another worker at the next step; `teardown` drains the batch."""
        super()._shutdown()
        self.runner.stop(self.settings.drain_s)

    def request_force_stop(self, signum: int, frame: FrameType | None) -> None:
        """On a second signal, stop without draining."""
        self.runner.stop(0)

    def teardown(self) -> None:
        with contextlib.suppress(RedisError):
            if self.runner.stopping:
                self.runner.drain()
        with contextlib.suppress(RedisError):
            self.runner.release_claims()
        super().teardown()


def send_heartbeats(worker: PictureWorker, ended: threading.Event) -> None:
    """Announce the worker every `heartbeat_s`, and renew its leases and RQ's heartbeat of the running job."""
    born_at = time.time()
    while not ended.is_set():
        try:
            _beat(worker, born_at)
        except RedisError as error:
            log.warning("heartbeat failed", reason=str(error))
        except Exception:  # the thread must live on: without heartbeats the worker counts as dead
            log.exception("heartbeat failed")
        ended.wait(worker.settings.heartbeat_s)
    with contextlib.suppress(RedisError):
        workers.withdraw(worker.connection, worker.name)


def _beat(worker: PictureWorker, born_at: float) -> None:
    about = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": str(worker.runner.device),
        "born_at": born_at,
        "models": [{"name": loaded.name, "digest": loaded.digest} for loaded in worker.runner.models],
        "pictures_per_s": round(worker.runner.rate.per_s, 3),
        "draining": worker.runner.stopping,
        "stalled": worker.runner.stalled,
    }
    workers.announce(worker.connection, worker.name, about, worker.settings.lease_s)
    worker.runner.renew_claims()
    for execution in list(worker.executions.values()):
        if (job := execution._job) is not None:
            with best_effort():  # a full Redis refuses it, and retries would hold up the next heartbeat
                # All of it, since RQ would renew one field only of what may have expired while Redis was away, and
                # could not read it at the job's end.
                execution.save(ttl=worker.get_heartbeat_ttl(job))
                worker.maintain_heartbeats(job, execution)


def prune_results(settings: Settings, connection: Redis, ended: threading.Event) -> None:
    """Remove old results from storage every hour, in one of all workers. In a thread of its own: storage may hang.

    Redis's clock decides what is old: by its own, one worker whose clock is wrong would remove everything.
    """
    assert settings.results is not None
    while not ended.wait(LOOK_EVERY_S):
        try:
            if is_time_to_prune(connection):
                limits = settings.results_days, settings.results_bytes_per_owner, settings.job_timeout_s
                prune(ResultFiles(settings.results), *limits, now=connection.time()[0])
        except (RedisError, OSError) as error:
            log.warning("results cannot be pruned", reason=str(error))
        except Exception:  # the thread must live on
            log.exception("results cannot be pruned")


def build(settings: Settings, connection: Redis) -> PictureWorker:
    """Return a worker with the promoted model loaded.

    CheckpointError if storage has no usable model, SettingError if the machine does not have the device or engine.
    """
    global runner
    try:
        if uses_openvino(settings.engine, pick_device(settings.device)):
            torch.set_num_threads(TORCH_THREADS)  # all the time; a Stepper does so for its steps alone
        runner = Runner(connection, settings, name=uuid4().hex)
    except DeviceError as error:
        raise SettingError("device", settings.device, f"{error}; auto takes what there is") from error
    except EngineError as error:
        raise SettingError("engine", settings.engine, str(error)) from error
    model = runner.models.load()
    log.info("worker ready", worker=runner.name, model=model.name, digest=model.digest, device=str(runner.device))
    return PictureWorker(runner)


def _is_stopping() -> bool:
    """Whether retries should end. A retry of the main loop counts as progress: a loop that waits for Redis is alive."""
    if runner is None:
        return False
    if threading.current_thread() is threading.main_thread():  # the heartbeat retries also while the loop hangs
        runner.moved_at = time.monotonic()
    return runner.stopping


def main(settings: Settings) -> None:
    """Work until SIGTERM or Ctrl-C. SettingError if the metrics' port or the alive file cannot be used."""
    alive_file.reset(settings)
    connection = connect(settings.redis_url, retry=RetryUntilStopped(_is_stopping))
    worker = build(settings, connection)
    if settings.metrics_port is not None:  # before the first heartbeat, so that a failure is seen before "ready"
        host = settings.metrics_host
        try:
            log.info("metrics served", host=host, port=serve_worker(worker.runner, host, settings.metrics_port))
        except OSError as error:
            reason = f"cannot be served on {host} (LABELGRID_METRICS_HOST): {error.strerror}; 0 takes a free port"
            raise SettingError("metrics_port", settings.metrics_port, reason) from error
    ended = threading.Event()
    heartbeats = threading.Thread(target=send_heartbeats, args=(worker, ended), name="heartbeat", daemon=True)
    heartbeats.start()

    def progress() -> float:
        alive_file.touch(settings)
        return worker.runner.moved_at

    watched = (progress, settings.stalled_after_s, ended)
    threading.Thread(target=watch, args=watched, name="watchdog", daemon=True).start()
    if settings.results is not None:
        threading.Thread(target=prune_results, args=(settings, connection, ended), name="prune", daemon=True).start()
    try:
        worker.work(logging_level="WARNING")
    finally:
        ended.set()
        worker.runner.models.close(within_s=3)
        heartbeats.join(timeout=5)
