"""The worker as an RQ worker: what RQ's commands show and do, and each of its methods that `process.py` replaces."""

import os
import signal
import threading
from typing import Any

import pytest
from click.testing import CliRunner
from redis import Redis
from redis.client import PubSub, PubSubWorkerThread
from rq import Callback, Queue
from rq.cli import main as rq_command
from rq.command import send_shutdown_command
from rq.job import Job
from rq.registry import FailedJobRegistry, StartedJobRegistry
from rq.serializers import JSONSerializer
from rq.suspension import resume, suspend
from rq.worker import WorkerStatus

from service.settings import Settings
from service.store import keys, workers
from service.store.jobs import JobStore
from service.telemetry.boundary import Watchdog
from service.worker import process
from service.worker.process import Worker
from service.worker.runner import Runner
from tests.service.processes import new_job, until, worker_processes
from tests.service.store.helpers import add_job, connect_bytes, done_count, full
from tests.service.worker.conftest import LONG, Create, status


def rq(settings: Settings, *arguments: str) -> str:
    """Return what an operator's `rq` prints."""
    done = CliRunner().invoke(rq_command, [*arguments, "-u", settings.redis_url])
    assert done.exit_code == 0, done.output
    return done.output


def rq_worker() -> None:
    """Do what `rq worker` does. Its output would hide the tests'."""
    address = os.environ["LABELGRID_REDIS_URL"]
    rq_command(["worker", "--quiet", "--worker-class", "service.worker.process.Worker", "-u", address])


@pytest.fixture
def queue(connection: Redis) -> Queue:
    return Queue(workers.QUEUE, connection=connect_bytes(connection), serializer=JSONSerializer)


@pytest.fixture
def worker(connection: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """A worker in this process, which leaves the tests' signals alone and does not end them if it hangs."""
    monkeypatch.setattr(Worker, "_install_signal_handlers", lambda _: None)
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda *_, **__: None)
    return Worker(settings=settings)


def test_rq_lists_suspends_and_ends_a_worker(connection: Redis, settings: Settings, queue: Queue) -> None:
    store = JobStore(connection, settings)
    with worker_processes(connection, settings, 1) as processes:
        (worker,) = processes.values()
        (key,) = connection.smembers(keys.WORKERS)
        name = key.removeprefix(keys.worker(""))
        until(lambda: "0, 0 executing, 0 finished, 0 failed" in rq(settings, "info"))
        assert f"({os.uname().nodename} " in (listed := rq(settings, "info", "--only-workers"))
        assert f" {worker.pid}): idle labelgrid." in listed
        job = new_job(settings, steps=100, pictures=32)  # four batches
        add_job(store, job)
        until(lambda: done_count(store, job.id) > 0)
        assert f" {worker.pid}): busy labelgrid." in rq(settings, "info")
        assert "0, 1 executing, 0 finished, 0 failed" in rq(settings, "info")
        (started,) = StartedJobRegistry(queue=queue).get_job_ids()
        assert Job.fetch(started, queue.connection, JSONSerializer).worker_name == name
        rq(settings, "suspend")
        until(lambda: connection.hget(key, "state") == "suspended")  # once the pictures in progress are done
        done = done_count(store, job.id)
        assert 0 < done < 32
        pending: Any = connection.xpending(keys.pictures(job.digest), "workers")
        assert pending["pending"] == 0
        assert (status(store, job), done_count(store, job.id)) == ("running", done)
        assert workers.is_alive(connection, name)
        rq(settings, "resume")
        until(lambda: store.ended([job.id]))
        assert status(store, job) == "finished"
        send_shutdown_command(connection, name)
        assert worker.wait(60) == 0
        assert workers.list_live(connection) == []
        assert FailedJobRegistry(queue=queue).get_job_ids() == []


def test_a_killed_worker_is_in_the_failed_registry(connection: Redis, settings: Settings, queue: Queue) -> None:
    store, job = JobStore(connection, settings), new_job(settings, steps=1000, pictures=2)
    with worker_processes(connection, settings, 1) as processes:
        add_job(store, job)
        until(lambda: status(store, job) == "running")  # RQ takes a job for lost only if its worker has marked it, too
        (started,) = StartedJobRegistry(queue=queue).get_job_ids()
        (worker,) = processes.values()
        os.kill(worker.pid, signal.SIGKILL)
        until(lambda: "1 failed" in rq(settings, "info"), every_s=0.5)  # which looks for the dead
    assert FailedJobRegistry(queue=queue).get_job_ids() == [started]
    dead = Job.fetch(started, queue.connection, JSONSerializer)
    assert "AbandonedJobError" in (dead.latest_result().exc_string or "")
    assert 0 < connection.ttl(f"rq:job:{started}") <= workers.FAILURE_S


@pytest.mark.parametrize("dies", ["model", "memory"])
def test_a_worker_that_fails_ends_with_its_traceback_in_the_failed_registry(
    worker: Worker, create: Create, queue: Queue, dies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create()
    monkeypatch.setattr(Runner, "work", lambda _: [][0] if dies == "model" else exec("raise MemoryError"))
    create()
    with pytest.raises(SystemExit) as end:
        worker.work()
    assert end.value.code == process.CRASHED
    (failed,) = FailedJobRegistry(queue=queue).get_job_ids()
    found = Job.fetch(failed, queue.connection, JSONSerializer).latest_result()
    assert ("IndexError" if dies == "model" else "MemoryError") in (found.exc_string or "")


def test_rqs_own_command_starts_a_worker(connection: Redis, settings: Settings) -> None:
    with worker_processes(connection, settings, 1, command=rq_worker) as processes:
        (started,) = processes.values()
        (about,) = workers.list_live(connection)
        assert about["pid"] == started.pid
        store, job = JobStore(connection, settings), new_job(settings, steps=4, pictures=2)
        add_job(store, job)
        until(lambda: store.ended([job.id]))
        started.terminate()
        assert started.wait(60) == 0


def test_an_rq_job_samples_until_nothing_is_left(
    worker: Worker, store: JobStore, create: Create, connection: Redis, queue: Queue
) -> None:
    jobs = [create(model=model) for model in ("other", "toy", "other")]
    assert queue.count == 1
    worker.work(burst=True)
    assert [status(store, job) for job in jobs] == ["finished"] * 3
    assert (queue.count, worker.successful_job_count) == (0, 0)
    assert connection.hget(worker.key, "successful_job_count") == "1"
    assert all(0 < connection.ttl(key) <= workers.RESULT_S for key in connection.keys("rq:job:*"))


@pytest.mark.parametrize(
    ("forged", "is_run"),
    [
        ({"func": "shutil.rmtree", "args": ("x",)}, False),
        ({"func": workers.TASK, "args": ("x",)}, False),
        ({"func": workers.TASK, "on_success": Callback("service.worker.process.prune")}, True),
        ({"func": "shutil.rmtree", "args": ("x",), "on_failure": Callback("service.worker.process.prune")}, False),
        ({"func": workers.TASK, "timeout": 1}, True),
        ({"func": process.OLD_RING, "job_id": "labelgrid-" + "d" * 64, "unique": True}, True),
    ],
)
def test_whoever_writes_to_redis_cannot_name_another_function(
    worker: Worker,
    store: JobStore,
    create: Create,
    queue: Queue,
    forged: dict[str, Any],
    is_run: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What an API of the release before this one enqueues is run, too."""
    for named in ("shutil.rmtree", "service.worker.process.prune"):
        monkeypatch.setattr(named, lambda *_: pytest.fail("it was run"))
    monkeypatch.setattr(process, "repeat", lambda what, *of: what == "heartbeat" and REPEAT(what, *of))
    job = create()
    queue.empty()
    sent = queue.enqueue_call(**forged)
    worker.work(burst=True)
    assert (status(store, job) == "finished") == is_run
    failed = FailedJobRegistry(queue=queue).get_job_ids()
    assert failed == ([] if is_run else [sent.id])
    if not is_run:
        assert "PermissionError" in (sent.latest_result().exc_string or "")


REPEAT = process.repeat


def test_webhooks_of_an_rq_job_are_not_sent(worker: Worker, create: Create, connection: Redis, queue: Queue) -> None:
    create()
    (sent,) = queue.job_ids
    address = '[{"url": "http://127.0.0.1:1/", "job_status": "finished"}]'
    connection.hset(f"rq:job:{sent}", mapping={"webhooks": address, "retries_left": 5, "rate_limit_key": "x"})
    read = process.Task.fetch(sent, worker.connection, JSONSerializer)
    assert (read.webhooks, read.retries_left, read.has_rate_limit) == ([], None, False)
    assert len(Job.fetch(sent, queue.connection, JSONSerializer).webhooks) == 1


@pytest.mark.parametrize("name", ["damaged", "no id"])
def test_what_cannot_be_read_ends_no_worker(
    worker: Worker, store: JobStore, create: Create, connection: Redis, queue: Queue, name: str
) -> None:
    connection.hset(f"rq:job:{name}", mapping={"data": "?", "created_at": "?"})
    connection.rpush(queue.key, name)
    job = create()
    workers.wake(connection)
    assert queue.count == 1
    connection.rpush(queue.key, "0")
    as_rq_writes_it = {"id": "0", "origin": workers.QUEUE, "connection": queue.connection, "serializer": JSONSerializer}
    Job.create(workers.TASK, (), **as_rq_writes_it).save()
    worker.work(burst=True)
    assert status(store, job) == "finished"


def test_no_other_worker_can_run_the_function() -> None:
    with pytest.raises(RuntimeError, match=r"only service\.worker\.process\.Worker"):
        process.sample()


def test_an_idle_worker_finds_work_that_woke_nobody(
    worker: Worker, store: JobStore, create: Create, queue: Queue
) -> None:
    job = create()
    queue.empty()
    thread = threading.Timer(0.0, lambda: (until(lambda: store.ended([job.id])), worker.request_stop(0, None)))
    thread.start()
    worker.work()
    thread.join()
    assert status(store, job) == "finished"


def test_only_the_thread_that_hears_rqs_commands_closes_its_connection(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ's worker closes it as well: on a busy machine at the same time, which raises an error in either."""
    close, closing = PubSub.close, list[type[threading.Thread]]()
    monkeypatch.setattr(PubSub, "close", lambda of: (closing.append(type(threading.current_thread())), close(of)))
    worker.work(burst=True)
    until(lambda: closing)
    assert closing == [PubSubWorkerThread]


def test_a_suspended_worker_can_be_stopped(worker: Worker, connection: Redis, queue: Queue) -> None:
    suspend(connection)
    thread = threading.Timer(
        0.0, lambda: (until(lambda: worker.get_state() == WorkerStatus.SUSPENDED), worker.request_stop(0, None))
    )
    thread.start()
    worker.work()
    thread.join()
    resume(connection)


def test_a_suspended_worker_feeds_its_watchdog(
    worker: Worker, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves = list[str]()
    monkeypatch.setattr(Watchdog, "moved", lambda _: moves.append(worker.get_state()))
    suspend(connection)
    thread = threading.Timer(0.0, lambda: (until(lambda: moves.count("suspended") > 1), worker.request_stop(0, None)))
    thread.start()
    worker.work()
    thread.join()
    resume(connection)


def test_a_full_redis_keeps_no_worker_from_beginning_nor_from_its_work(
    worker: Worker, store: JobStore, create: Create, connection: Redis
) -> None:
    """Only work makes room again."""
    jobs = [create(), create()]

    def end() -> None:
        until(lambda: len(store.ended([one.id for one in jobs])) == 2)
        connection.config_set("maxmemory", 0)
        worker.request_stop(0, None)

    with full(connection):
        thread = threading.Timer(0.0, end)
        thread.start()
        worker.work()
        thread.join()
    assert [status(store, job) for job in jobs] == ["finished"] * 2


def test_a_heartbeat_names_what_redis_has_lost(worker: Worker, connection: Redis, create: Create) -> None:
    beats = list[dict[str, str]]()

    def beat() -> None:
        connection.flushall()
        worker._beat()
        beats.append(connection.hgetall(worker.key))
        worker.request_stop(0, None)

    thread = threading.Timer(0.0, lambda: (until(lambda: worker.get_state() == WorkerStatus.IDLE), beat()))
    thread.start()
    worker.work()
    thread.join()
    (about,) = beats
    assert {"birth", "last_heartbeat", "queues", "pid", "hostname", "state", "about"} <= about.keys()


def test_an_rq_job_outlives_its_worker_by_a_lease(
    worker: Worker, connection: Redis, create: Create, settings: Settings, queue: Queue
) -> None:
    create(options=LONG)
    ttls = list[float]()

    def look() -> None:
        (execution,) = until(lambda: list(worker.executions.values()))
        connection.pexpire(execution.key, 1_000_000)
        until(lambda: connection.pttl(execution.key) <= 1000 * (settings.lease_s + 1))
        ttls.append(connection.pttl(worker.key))
        worker.request_stop(0, None)

    thread = threading.Timer(0.0, look)
    thread.start()
    worker.work()
    thread.join()
    assert 0 < ttls[0] <= 1000 * settings.lease_s
