"""The worker process: its start and end, and the threads beside its loop. `runner.py` does the work."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from uuid import uuid4

import torch
from redis import Redis
from redis.exceptions import RedisError

from service import watchdog
from service.files import PictureFiles
from service.settings import SettingError, Settings
from service.store import functions, workers
from service.store.connection import RetryUntilStopped, connect
from service.telemetry.boundary import confined
from service.telemetry.logs import get_logger
from service.telemetry.metrics import serve_worker
from service.worker.runner import Runner
from shared.device import DeviceError, pick_device
from shared.openvino import TORCH_THREADS, EngineError, uses_openvino

log = get_logger(__name__)

PRUNE_EVERY_S = 3600.0
FORESEEN = RedisError, OSError  # while Redis or storage is away


def repeat(what: str, work: Callable[[], None], every_s: float, ended: threading.Event) -> None:
    """Do something now and every so often, in a thread of its own, which lives on whatever fails."""
    while not ended.is_set():
        try:
            with confined("periodic task", passes=lambda error: isinstance(error, FORESEEN), task=what):
                work()
        except FORESEEN as error:
            log.warning(f"{what} failed", reason=str(error))
        ended.wait(every_s)


def beat(runner: Runner, born_at: float) -> None:
    """Announce the worker, and renew its leases."""
    about = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": str(runner.device),
        "born_at": born_at,
        "models": [{"name": loaded.name, "digest": loaded.digest} for loaded in runner.models],
        "pictures_per_s": round(runner.sampled / runner.worked_s, 3) if runner.worked_s else 0.0,
        "draining": runner.stopping,
        "stalled": runner.stalled,
        "loading": runner.loading,
        "storage_problem": runner.storage.problem,
    }
    workers.announce(runner.connection, runner.name, about, runner.settings.lease_s)
    runner.renew_claims()


def prune(settings: Settings, connection: Redis) -> None:
    """Remove old files from storage, which may hang.

    Redis's clock decides what is old: by its own, one worker whose clock is wrong would remove everything.
    """
    created_before = connection.time()[0] - settings.keep_s - settings.job_timeout_s
    log.info("old pictures removed", hours=PictureFiles(settings.pictures).remove_older(created_before))


def build(settings: Settings, connection: Redis) -> Runner:
    """Return a runner without models. SettingError if the machine does not have the device or engine."""
    try:
        if uses_openvino(settings.engine, pick_device(settings.device)):
            torch.set_num_threads(TORCH_THREADS)  # all the time; a Stepper does so for its steps alone
        runner = Runner(connection, settings, name=uuid4().hex)
    except DeviceError as error:
        raise SettingError("device", settings.device, f"{error}; auto takes what there is") from error
    except EngineError as error:
        raise SettingError("engine", settings.engine, str(error)) from error
    workers.forget_dead(connection)
    functions.remove_former(connection)
    return runner


def load(runner: Runner) -> None:
    """Load the promoted model. CheckpointError if storage has no usable one."""
    model = runner.models.load()
    runner.loading = False
    log.info("worker ready", worker=runner.name, model=model.name, digest=model.digest, device=str(runner.device))


def gives_up(runner: Runner) -> bool:
    """Whether a command is no longer retried. The main loop's retries count as progress: it is alive without Redis."""
    if threading.current_thread() is threading.main_thread():  # the heartbeat retries also while the loop hangs
        runner.moved()
    return runner.stopping


def _serve_metrics(runner: Runner, settings: Settings) -> None:
    if settings.metrics_port is None:
        return
    host = settings.metrics_host
    try:
        log.info("metrics served", host=host, port=serve_worker(runner, host, settings.metrics_port))
    except OSError as error:
        reason = f"cannot be served on {host} (LABELGRID_METRICS_HOST): {error.strerror}; 0 takes a free port"
        raise SettingError("metrics_port", settings.metrics_port, reason) from error


def main(settings: Settings) -> None:
    """Work until SIGTERM or Ctrl-C. CheckpointError as `load`; SettingError if the machine lacks what is set."""
    watchdog.reset(settings)
    built: list[Runner] = []
    connection = connect(settings.redis_url, retry=RetryUntilStopped(lambda: any(map(gives_up, built))))
    runner = build(settings, connection)
    built.append(runner)
    _serve_metrics(runner, settings)  # before the first heartbeat, so that a failure is seen before "ready"

    ended = threading.Event()
    beating = ("heartbeat", partial(beat, runner, time.time()), settings.heartbeat_s, ended)
    heartbeats = threading.Thread(target=repeat, args=beating, daemon=True)
    heartbeats.start()  # before it loads: else others that load the same take it for dead
    try:
        load(runner)

        def stop(*_: object) -> None:
            runner.stop(0.0 if runner.stopping else settings.drain_s)  # at once after a second signal

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        runner.watchdog = watchdog.Watchdog(settings)
        runner.moved()
        pruning = ("removing old pictures", partial(prune, settings, connection), PRUNE_EVERY_S, ended)
        threading.Thread(target=repeat, args=pruning, daemon=True).start()
        runner.work()
    finally:
        runner.stopping = True  # without further attempts to reach Redis
        ended.set()
        heartbeats.join(timeout=5)
        with contextlib.suppress(RedisError):  # then the worker counts as live until its lease expires
            workers.withdraw(connection, runner.name)
