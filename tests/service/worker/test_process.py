"""Worker processes: they share jobs, take over from dead ones, and survive an outage of Redis."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from service.contract.records import new_job_id
from service.files import PictureFiles
from service.local.redis_server import RedisServer
from service.settings import Settings
from service.store import keys, workers
from service.store.claims import GROUP
from service.store.connection import RetryUntilStopped, connect
from service.store.jobs import JobStore
from service.worker import process
from service.worker.models import LoadedModels
from service.worker.runner import Runner
from shared.checkpoint import CheckpointError
from tests.service.conftest import Command
from tests.service.processes import WorkerProcess, environment, new_job, until, worker_processes
from tests.service.store.helpers import add_job, done_count
from tests.service.worker.conftest import pngs, run, status


@pytest.fixture
def two_workers(connection: Redis, settings: Settings) -> Iterator[dict[int, WorkerProcess]]:
    """Workers that have room for four pictures."""
    with worker_processes(connection, settings.model_copy(update={"batch_pictures": 4}), 2) as processes:
        yield processes


def test_another_worker_finishes_a_killed_ones_job_with_the_same_pictures(
    connection: Redis, settings: Settings, two_workers: dict[int, WorkerProcess]
) -> None:
    store = JobStore(connection, settings)
    job = new_job(settings, steps=100, pictures=6)
    add_job(store, job)
    until(lambda: done_count(store, job.id) > 0)  # 4 are finished, 2 in progress
    (consumer, *_) = until(lambda: connection.xpending(keys.pictures(job.digest), GROUP)["consumers"])
    killed = int(connection.hget(keys.worker(consumer["name"]), "pid") or 0)
    os.kill(killed, signal.SIGKILL)
    assert not store.ended([job.id])
    until(lambda: store.ended([job.id]))
    assert status(store, job) == "finished"
    # The other worker ends on SIGTERM and withdraws its announcement.
    (left,) = (one for pid, one in two_workers.items() if pid != killed)
    left.terminate()
    assert left.wait(timeout=60) == 0
    assert workers.list_live(connection) == []
    undisturbed = job.model_copy(update={"id": new_job_id(time.time())})
    add_job(store, undisturbed)
    run(Runner(connection, settings, "w"), undisturbed.id)
    assert pngs(store, job.id, range(6)) == pngs(store, undisturbed.id, range(6))


def test_a_worker_survives_a_restart_of_redis_and_stops_without_it(
    redis_server: RedisServer, settings: Settings, tmp_path: Path
) -> None:
    server = RedisServer(redis_server.folder / "restarted")
    server.start()
    settings = settings.model_copy(update={"redis_url": server.url, "drain_s": 0.0})
    connection = connect(server.url, retry=RetryUntilStopped(lambda: False))
    store = JobStore(connection, settings)
    log_file = tmp_path / "worker.log"
    with worker_processes(connection, settings, 1, log_file) as processes:
        (worker,) = processes.values()
        (key,) = connection.smembers(keys.WORKERS)
        job = new_job(settings, steps=100, pictures=12)
        add_job(store, job)
        until(lambda: done_count(store, job.id) > 0)  # 8 are finished, 4 in progress
        assert server.process is not None
        server.process.kill()
        server.process.wait()
        until(lambda: "Redis is away or refuses writes" in log_file.read_text())
        assert worker.poll() is None
        server.start()
        until(lambda: store.ended([job.id]))
        assert status(store, job) == "finished"
        reported = [fields["picture"] for _, fields in connection.xrange(keys.events(job.id)) if "picture" in fields]
        assert sorted(int(index) for index in reported) == list(range(12))
        until(lambda: connection.hget(key, workers.ABOUT))  # the same worker as before
        assert worker.poll() is None
        server.process.kill()
        server.process.wait()
        worker.terminate()
        assert worker.wait(timeout=30) == 0


def test_a_wrong_password_ends_the_worker_at_once(
    redis_server: RedisServer, settings: Settings, tmp_path: Path
) -> None:
    wrong = settings.model_copy(update={"redis_url": redis_server.url.replace(redis_server.password, "wrong")})
    worker = WorkerProcess(wrong, tmp_path / "worker.log")
    assert worker.wait(timeout=60) == 1
    log = (tmp_path / "worker.log").read_text()
    assert "Traceback" not in log
    assert log.splitlines()[-1].startswith("labelgrid: ")


def test_a_worker_without_a_port_for_its_metrics_does_not_start(
    command: Command, connection: Redis, settings: Settings
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, _, err = command("worker", environment={**environment(settings), "LABELGRID_METRICS_PORT": port})
    assert code == 1
    assert err.splitlines()[-1].startswith(f"labelgrid: LABELGRID_METRICS_PORT={port}: cannot be served on")
    assert connection.scard(keys.WORKERS) == 0


def test_a_worker_is_announced_while_it_loads_its_first_model_and_is_not_ready(
    connection: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else others that load the same model would take it for one that died of that."""
    seen = list[int]()

    def load(models: LoadedModels) -> None:
        until(lambda: workers.is_alive(connection, models.consumer))
        workers.begin_loading(connection, "d", models.consumer)
        seen.append(workers.died_loading(connection, "d"))
        seen.append(len(workers.ready(workers.list_live(connection))))
        raise CheckpointError("toy", "damaged")

    monkeypatch.setattr(LoadedModels, "load", load)
    with pytest.raises(CheckpointError):
        process.main(settings)
    assert seen == [0, 0]
    assert workers.list_live(connection) == []


def test_a_worker_removes_old_pictures(
    connection: Redis, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = settings.model_copy(update={"pictures": tmp_path, "keep_days": 5})
    files, now = PictureFiles(tmp_path), connection.time()[0]
    ages_s = (0, kept.keep_s, kept.keep_s + kept.job_timeout_s + 2 * 3600)
    recent, ended, expired = (new_job_id(now - age_s) for age_s in ages_s)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # of a worker whose clock is wrong
    for job_id in (recent, ended, expired):
        files.write(job_id, "0.png", b"")
    process.prune(kept, connection)
    assert {path.name for path in tmp_path.glob("*/*")} == {recent, ended}
