"""The worker process: an RQ worker whose models stay loaded and whose batch runs on from one RQ job to the next.

Knows RQ and signals; `runner.py` does the work.
"""

import contextlib
import os
import socket
import threading
import time
from types import FrameType
from uuid import uuid4

import torch
from redis import Redis
from redis.exceptions import RedisError

from service import alive_file
from service.pictures import PictureFiles
from service.rq_worker import QueueWorker
from service.settings import SettingError, Settings
from service.store import workers
from service.store.connection import RetryUntilStopped, connect
from service.store.doorbell import ANSWER
from service.store.sweep import is_time_to_prune
from service.telemetry.logs import get_logger
from service.telemetry.metrics import serve_worker
from service.watchdog import watch
from service.worker.runner import Runner
from shared.device import DeviceError, pick_device
from shared.openvino import TORCH_THREADS, EngineError, uses_openvino

log = get_logger(__name__)

MAINTENANCE_S = 30  # RQ counts a worker as dead after 80 s without
LOOK_EVERY_S = 60.0  # whether old files are to be removed

runner: Runner | None = None  # of this process; `service.worker.answer_doorbell` finds it here


class PictureWorker(QueueWorker):
    """Answers the doorbell when it has no work, and works between two rings.

    Any worker claims pictures of any job, so that idle workers share a large request.
    """

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner.store.doorbell.queue, runner.name, ANSWER, MAINTENANCE_S)
        self.runner, self.settings = runner, runner.settings

    @property
    def has_work(self) -> bool:
        """Whether pictures are in progress, or were a moment ago: after a batch that ended at once, others may wait."""
        return self.runner.busy or not self.runner.idle

    @property
    def wants_job(self) -> bool:
        return not self.has_work

    def work_between_jobs(self) -> None:
        self.runner.run_once(rests=False)  # without pictures, it waits for the next ring instead

    def _shutdown(self) -> None:
        """Claim nothing more; `teardown` drains the batch."""
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
    """Announce the worker every `heartbeat_s`, and renew its leases."""
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
        "storage_problem": worker.runner.storer.problem,
    }
    workers.announce(worker.connection, worker.name, about, worker.settings.lease_s)
    worker.runner.renew_claims()


def prune_pictures(settings: Settings, connection: Redis, ended: threading.Event) -> None:
    """Remove old files from storage every hour, in one of all workers. In a thread of its own: storage may hang.

    Redis's clock decides what is old: by its own, one worker whose clock is wrong would remove everything.
    """
    lifetime_s = settings.keep_s + settings.job_timeout_s
    while not ended.wait(LOOK_EVERY_S):
        try:
            if is_time_to_prune(connection):
                removed = PictureFiles(settings.pictures).remove_older(connection.time()[0] - lifetime_s)
                log.info("old pictures removed", hours=removed)
        except (RedisError, OSError) as error:
            log.warning("old pictures cannot be removed", reason=str(error))
        except Exception:  # the thread must live on
            log.exception("old pictures cannot be removed")


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
    threading.Thread(target=prune_pictures, args=(settings, connection, ended), name="prune", daemon=True).start()
    try:
        worker.work(logging_level="WARNING")
    finally:
        ended.set()
        worker.runner.models.close(within_s=3)
        heartbeats.join(timeout=5)
