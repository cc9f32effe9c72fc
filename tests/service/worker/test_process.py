"""Worker processes: they share jobs, take over from dead ones, and survive an outage of Redis."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from redis import Redis
from redis.exceptions import ConnectionError

from service.contract.records import JobRecord
from service.local.redis_server import RedisServer
from service.settings import Settings
from service.store import keys, workers
from service.store.claims import GROUP
from service.store.connection import RetryUntilStopped, connect, text
from service.store.creation import RUN_JOB
from service.store.jobs import JobStore
from service.worker import process
from service.worker.process import PictureWorker
from service.worker.runner import Runner
from shared.options import SamplingOptions
from tests.service.conftest import Command
from tests.service.processes import WorkerProcess, environment, new_job, until, worker_processes
from tests.service.store.helpers import full
from tests.service.worker.conftest import status


@pytest.fixture
def two_workers(connection: Redis, settings: Settings) -> Iterator[dict[int, WorkerProcess]]:
    """Workers that have room for four pictures."""
    with worker_processes(connection, settings.model_copy(update={"batch_pictures": 4}), 2) as processes:
        yield processes


@pytest.fixture
def one_worker(connection: Redis, settings: Settings) -> Iterator[WorkerProcess]:
    """A worker that stops without finishing its pictures."""
    with worker_processes(connection, settings.model_copy(update={"drain_s": 0.0}), 1) as processes:
        yield next(iter(processes.values()))


def owners_of_pictures(connection: Redis, digest: str) -> set[int]:
    """Return the process ids of the workers that have claimed pictures."""
    consumers = connection.xpending(keys.stream(digest), GROUP)["consumers"]
    abouts = [connection.get(keys.worker(text(consumer["name"]))) for consumer in consumers]
    return {int(json.loads(about)["pid"]) for about in abouts if about}


def owner_of_pictures(connection: Redis, digest: str) -> int | None:
    """Return the process id of a worker that has claimed pictures."""
    return next(iter(owners_of_pictures(connection, digest)), None)


def test_an_idle_worker_takes_its_share_of_a_large_job(
    connection: Redis, settings: Settings, two_workers: dict[int, WorkerProcess]
) -> None:
    store = JobStore(connection, settings)
    job = new_job(settings, steps=300, pictures=12)  # three full batches
    store.create(job)
    until(lambda: owners_of_pictures(connection, job.digest) == set(two_workers))
    until(lambda: not store.is_open(job.id))
    assert store.statuses([job.id]) == {job.id: "finished"}
    reported = [fields[b"picture"] for _, fields in connection.xrange(keys.events(job.id)) if b"picture" in fields]
    assert sorted(int(index) for index in reported) == list(range(12))


def test_another_worker_finishes_a_killed_ones_job_with_the_same_pictures(
    connection: Redis, settings: Settings, two_workers: dict[int, WorkerProcess]
) -> None:
    store = JobStore(connection, settings)
    job = new_job(settings, steps=100, pictures=6)
    store.create(job)
    until(lambda: store.done_count(job.id) > 0)  # 4 are finished, 2 in progress
    killed = until(lambda: owner_of_pictures(connection, job.digest))
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    assert store.is_open(job.id)
    until(lambda: not store.is_open(job.id))
    assert store.statuses([job.id]) == {job.id: "finished"}
    # The other worker ends on SIGTERM and withdraws its announcement.
    (left,) = (one for pid, one in two_workers.items() if pid != killed)
    left.terminate()
    assert left.wait(timeout=60) == 0
    assert connection.keys(keys.worker("*")) == []
    undisturbed = job.model_copy(update={"id": uuid4().hex})
    store.create(undisturbed)
    Runner(connection, settings, "w").run(undisturbed.id)
    assert store.pngs(job.id, range(6)) == store.pngs(undisturbed.id, range(6))


def test_a_stopped_worker_hands_its_pictures_back(
    connection: Redis, settings: Settings, one_worker: WorkerProcess
) -> None:
    store = JobStore(connection, settings)
    job = new_job(settings, steps=1000, pictures=8)
    store.create(job)
    until(lambda: owner_of_pictures(connection, job.digest))
    one_worker.terminate()
    assert one_worker.wait(timeout=30) == 0
    assert store.statuses([job.id]) == {job.id: "running"}
    assert connection.llen(store.queue.key) == 1
    assert connection.scard(keys.WORKERS) == 0
    (pending,) = {
        one["times_delivered"] for one in connection.xpending_range(keys.stream(job.digest), GROUP, "-", "+", 9)
    }
    assert pending == 0  # as if never delivered


def test_a_worker_survives_a_restart_of_redis_and_stops_without_it(
    redis_server: RedisServer, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = tmp_path / "alive"
    monkeypatch.setenv("LABELGRID_ALIVE_FILE", str(alive))
    server = RedisServer(redis_server.folder / "restarted")
    server.start()
    settings = settings.model_copy(update={"redis_url": server.url, "drain_s": 0.0})
    connection = connect(server.url, retry=RetryUntilStopped(lambda: False))
    store = JobStore(connection, settings)
    log_file = tmp_path / "worker.log"
    with worker_processes(connection, settings, 1, log_file) as processes:
        (worker,) = processes.values()
        (name,) = connection.smembers(keys.WORKERS)
        job = new_job(settings, steps=100, pictures=12)
        store.create(job)
        until(lambda: store.done_count(job.id) > 0)  # 8 are finished, 4 in progress
        assert server.process is not None
        server.process.kill()
        server.process.wait()
        until(lambda: "Redis is away or refuses writes" in log_file.read_text())
        alive.unlink()
        until(alive.exists)  # so that nobody restarts the worker
        assert worker.poll() is None
        server.start()
        until(lambda: not store.is_open(job.id))
        assert store.statuses([job.id]) == {job.id: "finished"}
        reported = [fields[b"picture"] for _, fields in connection.xrange(keys.events(job.id)) if b"picture" in fields]
        assert sorted(int(index) for index in reported) == list(range(12))
        until(lambda: workers.is_alive(store.connection, text(name)))  # the same worker as before
        assert worker.poll() is None
        server.process.kill()
        server.process.wait()
        worker.terminate()
        assert worker.wait(timeout=30) == 0


def test_a_worker_survives_a_full_redis(connection: Redis, settings: Settings, tmp_path: Path) -> None:
    store = JobStore(connection, settings)
    log_file = tmp_path / "worker.log"
    with worker_processes(connection, settings, 1, log_file) as processes:
        (worker,) = processes.values()
        job = new_job(settings, steps=100, pictures=2)
        connection.config_set("maxmemory", 1)
        try:
            until(lambda: "Redis is away or refuses writes" in log_file.read_text())
        finally:
            connection.config_set("maxmemory", 0)
        store.create(job)
        until(lambda: not store.is_open(job.id))
        assert store.statuses([job.id]) == {job.id: "finished"}
        assert worker.poll() is None


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


@pytest.mark.parametrize(
    ("function", "about"),
    [("os.getcwd", {}), (RUN_JOB, {"success_callback_name": "os.getcwd"})],
    ids=["function", "callback"],
)
def test_no_other_function_is_run_than_ours(
    runner: Runner, store: JobStore, function: str, about: dict[str, str]
) -> None:
    """Whoever can write to Redis can name any function in an RQ job."""
    foreign, ours = (store.queue.enqueue_call(name) for name in (function, RUN_JOB))
    store.connection.hset(foreign.key, mapping={"timeout": -1, **about})
    found = PictureWorker(runner).dequeue_job_and_maintain_ttl(None)
    assert found is not None
    assert found[0].id == ours.id
    assert not store.connection.exists(foreign.key)


def run_next_job(worker: PictureWorker) -> None:
    """Take the RQ job that waits, and run it."""
    found = worker.dequeue_job_and_maintain_ttl(None)
    assert found is not None
    worker.execute_job(*found)


def test_a_busy_worker_takes_an_rq_job_at_times_only(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It samples their pictures anyway, and RQ executes some thirty commands for each job that a worker takes."""
    monkeypatch.setattr(process, "BUSY_TAKES_EVERY_S", 3600.0)
    worker = PictureWorker(runner)
    jobs = [create(options=SamplingOptions(steps=1000)) for _ in range(2)]
    monkeypatch.setattr(runner, "run", lambda job_id: runner.run_once())
    monkeypatch.setattr(process, "runner", runner)
    run_next_job(worker)
    assert [status(store, job) for job in jobs] == ["running", "running"]
    assert worker.dequeue_job_and_maintain_ttl(None) is None
    assert store.queue.count == 1
    monkeypatch.setattr(process, "BUSY_TAKES_EVERY_S", 0.0)
    assert worker.dequeue_job_and_maintain_ttl(None) is not None


def test_an_idle_worker_takes_the_next_rq_job_at_once(
    runner: Runner, create: Callable[..., JobRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "BUSY_TAKES_EVERY_S", 3600.0)
    monkeypatch.setattr(process, "runner", runner)
    worker = PictureWorker(runner)
    for _ in range(2):
        create()
        run_next_job(worker)
        worker.work_between_jobs()  # there is nothing to do


def test_a_worker_whose_pictures_all_ended_samples_those_that_wait_before_it_takes_an_rq_job(
    runner: Runner, store: JobStore, create: Callable[..., JobRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "runner", runner)
    worker = PictureWorker(runner)
    create()
    run_next_job(worker)
    waiting = create()
    assert not runner.models.busy
    assert worker.dequeue_job_and_maintain_ttl(None) is None
    until(lambda: runner.run_once() and status(store, waiting) == "finished")
    assert store.queue.count == 0


def test_a_worker_without_work_does_not_sleep_before_it_waits_for_an_rq_job(
    runner: Runner, create: Callable[..., JobRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client's next request comes milliseconds after the answer to the one before."""
    monkeypatch.setattr(process, "runner", runner)
    worker = PictureWorker(runner)
    create()
    run_next_job(worker)
    slept = list[float]()
    monkeypatch.setattr("service.worker.runner.time.sleep", slept.append)
    worker.work_between_jobs()
    assert worker.wants_job
    assert slept == []


def test_an_attempt_to_reach_redis_is_progress(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    monkeypatch.setattr(process, "runner", runner)
    runner.moved_at -= settings.stalled_after_s
    assert runner.stalled
    answers = iter([ConnectionError("away"), None])

    def command() -> None:
        if error := next(answers):
            raise error

    retry = partial(RetryUntilStopped(process._is_stopping).call_with_retry, command, lambda error: None)
    with ThreadPoolExecutor() as heartbeat:  # whose attempts say nothing of the loop
        heartbeat.submit(retry).result()
    assert runner.stalled
    answers = iter([ConnectionError("away"), None])
    retry()
    assert not runner.stalled


def test_a_heartbeat_restores_an_execution_that_expired_while_redis_was_away(
    runner: Runner, store: JobStore, connection: Redis
) -> None:
    """RQ reads it at the job's end, and fails the job if it cannot."""
    worker = PictureWorker(runner)
    worker.register_birth()
    job = store.queue.enqueue_call(RUN_JOB)
    execution = worker.prepare_execution(job)
    connection.delete(execution.key)
    process._beat(worker, born_at=0.0)
    assert [one.id for one in job.get_executions()] == [execution.id]
    assert 0 < connection.ttl(execution.key) <= worker.get_heartbeat_ttl(job)


def test_a_full_redis_does_not_hold_up_heartbeats(runner: Runner, store: JobStore, connection: Redis) -> None:
    """RQ writes what needs memory. A worker that repeats that until there is room counts as dead meanwhile."""
    worker = PictureWorker(runner)
    worker.register_birth()
    execution = worker.prepare_execution(store.queue.enqueue_call(RUN_JOB))
    with full(connection):
        process._beat(worker, born_at=0.0)
    assert workers.is_alive(connection, runner.name)
    connection.delete(execution.key)
    process._beat(worker, born_at=0.0)
    assert connection.exists(execution.key)


def test_one_of_all_workers_prunes_results_in_an_hour(
    connection: Redis, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned, ended = list[tuple[Any, ...]](), threading.Event()
    looks = iter([False, False, True])  # an Event's waits: it looks twice, and then the worker ends
    monkeypatch.setattr(process, "prune", lambda files, *limits, now: pruned.append((files.root, *limits, now)))
    monkeypatch.setattr(time, "time", lambda: 0.0)  # of a worker whose clock is wrong
    monkeypatch.setattr(ended, "wait", lambda seconds: next(looks))
    kept = settings.model_copy(update={"results": tmp_path, "results_days": 5, "results_bytes_per_owner": 7})
    process.prune_results(kept, connection, ended)
    [(*others, now)] = pruned
    assert others == [tmp_path, 5, 7, kept.job_timeout_s]
    assert 0 <= connection.time()[0] - now <= 60
    assert 0 < connection.ttl(keys.PRUNED) <= 3600
