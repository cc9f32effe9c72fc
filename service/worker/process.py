"""The worker process: an RQ worker that keeps its models loaded and its batch running from one job to the next.

Knows RQ and signals; `runner.py` does the work.
"""

import contextlib
import os
import socket
import threading
import time
from types import FrameType

from redis import Redis
from redis.exceptions import RedisError
from rq.job import Job

from service.settings import SettingError, Settings
from service.store import workers
from service.store.connection import RetryUntilStopped, connect
from service.store.jobs import new_id
from service.store.rq_worker import QueueWorker
from service.telemetry.logs import get_logger
from service.telemetry.metrics import serve_worker
from service.worker.runner import Runner
from shared.device import DeviceError

log = get_logger(__name__)

# RQ calls a job's function by its name, so the runner must be reachable from the module.
_runner: Runner | None = None


def run_job(job_id: str) -> None:
    """Work until the job has ended."""
    assert _runner is not None, "run_job runs in a worker process only"
    _runner.run(job_id)


class PictureWorker(QueueWorker):
    """Runs jobs with one runner. The batch outlives a job, and leases are short."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner.store.queue, runner.name)
        self.runner, self.settings = runner, runner.settings

    @property
    def has_work(self) -> bool:
        return self.runner.models.busy

    def work_between_jobs(self) -> None:
        """Work on the pictures of other workers' jobs.

        A request has one RQ job, so this is how idle workers share a large request. It also finishes pictures that are
        left in the batch when their job runs in another worker, which waits for them.
        """
        self.runner.run_once()

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


class Heartbeat(threading.Thread):
    """Announces the worker every `heartbeat_s`, and renews its leases and RQ's heartbeat of the running job."""

    def __init__(self, worker: PictureWorker) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.worker, self.runner = worker, worker.runner
        self.connection, self.settings = worker.runner.connection, worker.runner.settings
        self.ended = threading.Event()
        self.born_at = time.time()

    def run(self) -> None:
        while not self.ended.is_set():
            try:
                self.beat()
            except RedisError as error:
                log.warning("heartbeat failed", reason=str(error))
            except Exception:  # the thread must live on: without heartbeats the worker counts as dead
                log.exception("heartbeat failed")
            self.ended.wait(self.settings.heartbeat_s)

    def beat(self) -> None:
        about = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "device": str(self.runner.device),
            "born_at": self.born_at,
            "models": [{"name": loaded.name, "digest": loaded.digest} for loaded in self.runner.models],
            "pictures_per_s": round(self.runner.rate.per_s, 3),
            "draining": self.runner.stopping,
        }
        workers.announce(self.connection, self.runner.name, about, self.settings.lease_s)
        self.runner.renew_claims()
        for execution in list(self.worker.executions.values()):
            if execution._job is not None:
                self.worker.maintain_heartbeats(execution._job, execution)

    def end(self) -> None:
        self.ended.set()
        self.join(timeout=5)
        with contextlib.suppress(RedisError):
            workers.withdraw(self.connection, self.runner.name)


def build(settings: Settings, connection: Redis) -> PictureWorker:
    """Return a worker with the promoted model loaded and its batch size measured.

    CheckpointError if storage has no usable model, SettingError if the machine does not have the device.
    """
    global _runner
    try:
        _runner = Runner(connection, settings, name=new_id())
    except DeviceError as error:
        raise SettingError("device", settings.device, f"{error}; auto takes what there is") from error
    model = _runner.models.load()
    device = str(_runner.device)
    log.info("worker ready", worker=_runner.name, model=model.name, digest=model.digest, device=device)
    return PictureWorker(_runner)


def main(settings: Settings) -> None:
    """Work until SIGTERM or Ctrl-C. SettingError if the metrics cannot be served at their port."""
    connection = connect(settings.redis_url, retry=RetryUntilStopped(lambda: _runner is not None and _runner.stopping))
    worker = build(settings, connection)
    if settings.metrics_port is not None:  # before the first heartbeat, so that a failure is seen before "ready"
        host = settings.metrics_host
        try:
            log.info("metrics served", host=host, port=serve_worker(worker.runner, host, settings.metrics_port))
        except OSError as error:
            reason = f"cannot be served on {host} (LABELGRID_METRICS_HOST): {error.strerror}; 0 takes a free port"
            raise SettingError("metrics_port", settings.metrics_port, reason) from error
    heartbeat = Heartbeat(worker)
    heartbeat.start()
    try:
        worker.work(logging_level="WARNING")
    finally:
        heartbeat.end()
