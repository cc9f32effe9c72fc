"""The worker process: its start and end, and the threads beside its loop. `runner.py` does the work."""

import os
import signal
import socket
import threading
import time
from uuid import uuid4

import torch
from redis import Redis
from redis.exceptions import RedisError

from service import watchdog
from service.pictures import PictureFiles
from service.settings import SettingError, Settings
from service.store import workers
from service.store.connection import RetryUntilStopped, connect
from service.telemetry.logs import get_logger
from service.telemetry.metrics import serve_worker
from service.worker.runner import Runner
from shared.device import DeviceError, pick_device
from shared.openvino import TORCH_THREADS, EngineError, uses_openvino

log = get_logger(__name__)

PRUNE_EVERY_S = 3600.0


def send_heartbeats(runner: Runner, ended: threading.Event) -> None:
    """Announce the worker every `heartbeat_s`, and renew its leases."""
    born_at = time.time()
    while not ended.is_set():
        try:
            _beat(runner, born_at)
        except RedisError as error:
            log.warning("heartbeat failed", reason=str(error))
        except Exception:  # the thread must live on: without heartbeats the worker counts as dead
            log.exception("heartbeat failed")
        ended.wait(runner.settings.heartbeat_s)
    try:
        workers.withdraw(runner.connection, runner.name)
    except RedisError as error:
        log.warning("the worker counts as live until its lease expires", reason=str(error))


def _beat(runner: Runner, born_at: float) -> None:
    about = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": str(runner.device),
        "born_at": born_at,
        "models": [{"name": loaded.name, "digest": loaded.digest} for loaded in runner.models],
        "pictures_per_s": round(runner.rate.per_s, 3),
        "draining": runner.stopping,
        "stalled": runner.stalled,
        "storage_problem": runner.storer.problem,
    }
    workers.announce(runner.connection, runner.name, about, runner.settings.lease_s)
    runner.renew_claims()


def prune_pictures(settings: Settings, connection: Redis, ended: threading.Event) -> None:
    """Remove old files from storage, now and every hour. In a thread of its own: storage may hang.

    Redis's clock decides what is old: by its own, one worker whose clock is wrong would remove everything.
    """
    lifetime_s = settings.keep_s + settings.job_timeout_s
    while not ended.is_set():
        try:
            removed = PictureFiles(settings.pictures).remove_older(connection.time()[0] - lifetime_s)
            log.info("old pictures removed", hours=removed)
        except (RedisError, OSError) as error:
            log.warning("old pictures cannot be removed", reason=str(error))
        except Exception:  # the thread must live on
            log.exception("old pictures cannot be removed")
        ended.wait(PRUNE_EVERY_S)


def build(settings: Settings, connection: Redis) -> Runner:
    """Return a runner with the promoted model loaded.

    CheckpointError if storage has no usable model, SettingError if the machine does not have the device or engine.
    """
    try:
        if uses_openvino(settings.engine, pick_device(settings.device)):
            torch.set_num_threads(TORCH_THREADS)  # all the time; a Stepper does so for its steps alone
        runner = Runner(connection, settings, name=uuid4().hex)
    except DeviceError as error:
        raise SettingError("device", settings.device, f"{error}; auto takes what there is") from error
    except EngineError as error:
        raise SettingError("engine", settings.engine, str(error)) from error
    workers.forget_dead(connection)
    model = runner.models.load()
    log.info("worker ready", worker=runner.name, model=model.name, digest=model.digest, device=str(runner.device))
    return runner


def gives_up(runner: Runner) -> bool:
    """Whether a command is no longer retried. The main loop's retries count as progress: it is alive without Redis."""
    if threading.current_thread() is threading.main_thread():  # the heartbeat retries also while the loop hangs
        runner.moved_at = time.monotonic()
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
    """Work until SIGTERM or Ctrl-C. SettingError if the metrics' port or the alive file cannot be used."""
    watchdog.reset(settings)
    built: list[Runner] = []
    connection = connect(settings.redis_url, retry=RetryUntilStopped(lambda: any(map(gives_up, built))))
    runner = build(settings, connection)
    built.append(runner)
    _serve_metrics(runner, settings)  # before the first heartbeat, so that a failure is seen before "ready"

    def stop(*_: object) -> None:
        runner.stop(0.0 if runner.stopping else settings.drain_s)  # at once after a second signal

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    ended = threading.Event()
    heartbeats = threading.Thread(target=send_heartbeats, args=(runner, ended), name="heartbeat", daemon=True)
    heartbeats.start()
    watched = (settings, lambda: runner.moved_at, ended)
    threading.Thread(target=watchdog.watch, args=watched, name="watchdog", daemon=True).start()
    threading.Thread(target=prune_pictures, args=(settings, connection, ended), name="prune", daemon=True).start()
    try:
        runner.work()
    finally:
        ended.set()
        heartbeats.join(timeout=5)
