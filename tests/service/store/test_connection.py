"""A Redis that is slow or refuses writes: workers retry, skip best-effort writes, and the API answers 503.

And how the functions come into Redis: versions side by side, and a library that is missing when it is called.
"""

import asyncio
import contextlib
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis
from redis.exceptions import ExecAbortError, RedisError, ResponseError, TimeoutError

from faults.gate import Gate, gate
from service.local.redis_server import RedisServer
from service.settings import Settings, StartError
from service.store import functions, hub, keys, workers
from service.store.async_jobs import AsyncJobs
from service.store.connection import (
    RetryUntilStopped,
    check_version,
    connect,
    connect_async,
)
from service.store.functions import LIBRARY, Pipeline, call
from service.store.jobs import JobStore
from service.worker.runner import Runner
from tests.conftest import serving
from tests.service.api.answers import submitted
from tests.service.api.test_events import events
from tests.service.processes import until
from tests.service.store.helpers import full, read_only, record
from tests.service.webhooks.conftest import create_job


@pytest.fixture
def impatient(settings: Settings, connection: Redis) -> Iterator[Redis]:
    """A worker's connection that fails the test if it retries."""
    client = connect(settings.redis_url, retry=RetryUntilStopped(lambda: pytest.fail("it retries")))
    yield client
    client.close()


@contextlib.contextmanager
def retrying_twice(settings: Settings, trouble: contextlib.ExitStack) -> Iterator[Redis]:
    """A worker's connection, which must retry twice: with the second time, Redis's trouble ends."""
    looks = []

    def stopping() -> bool:
        looks.append(1)
        if len(looks) == 2:
            trouble.close()
        return False

    with connect(settings.redis_url, retry=RetryUntilStopped(stopping)) as worker:
        yield worker
    assert len(looks) == 2


@pytest.mark.parametrize("state", [full, read_only])
def test_a_worker_retries_until_redis_takes_writes(connection: Redis, settings: Settings, state: Any) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(state(connection))
        with retrying_twice(settings, stack) as worker:
            assert worker.set("key", "value")


def test_a_worker_retries_while_a_new_replica_answers_nothing(connection: Redis, settings: Settings) -> None:
    """As the former primary does after a failover, while it fetches its data from the new one."""
    connection.set("key", "value")
    with contextlib.ExitStack() as stack:
        connection.config_set("replica-serve-stale-data", "no")
        stack.callback(connection.config_set, "replica-serve-stale-data", "yes")
        stack.enter_context(read_only(connection))
        with retrying_twice(settings, stack) as worker:
            assert worker.get("key") == "value"


def test_a_blocking_read_continues_after_redis_was_a_replica(connection: Redis, settings: Settings) -> None:
    worker = connect(settings.redis_url, retry=RetryUntilStopped(lambda: False))
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(worker.blpop, ["queue"], 10)
        until(lambda: connection.info("clients")["blocked_clients"] == 1)
        with read_only(connection):
            pass
        connection.rpush("queue", "job")
        assert found.result(10) == ("queue", "job")
    worker.close()


def test_a_look_does_not_wait_for_redis(
    connection: Redis, settings: Settings, impatient: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = create_job(JobStore(connection, settings), "http://127.0.0.1/hook")
    connection.zadd(keys.DEADLINES, {job_id: 1})
    runner = Runner(impatient, settings, "w1")
    monkeypatch.setattr("service.worker.runner.CHECK_EVERY_S", 0.0)
    with read_only(connection):
        runner._load_wanted()
    assert connection.hget(keys.job(job_id), "status") == "queued"
    with full(connection):
        runner._load_wanted()
    assert connection.hget(keys.job(job_id), "status") == "failed"


AOF = "MISCONF Errors writing to the AOF file: No space left on device"


@pytest.mark.parametrize(
    "error",
    [
        ResponseError(AOF),
        ExecAbortError(f"Transaction discarded because of: {AOF}"),
    ],
)
def test_every_refusal_of_writes_is_retried(error: RedisError) -> None:
    answers = iter([error, None])

    def do() -> str:
        if (answer := next(answers)) is not None:
            raise answer
        return "done"

    assert RetryUntilStopped(lambda: False).call_with_retry(do, lambda error: None) == "done"


def test_other_errors_are_not_retried(impatient: Redis) -> None:
    impatient.set("key", "value")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        impatient.rpush("key", "value")


def test_the_api_follows_a_failover_although_its_connections_stay_open(settings: Settings, tmp_path: Path) -> None:
    """The address leads to another server now; open connections still lead to the former one, now a replica."""
    body, headers = {"labels": [["red cube"]]}, {"prefer": "respond-async"}
    with tempfile.TemporaryDirectory(prefix="lg-") as folder:
        first, second = (RedisServer(Path(folder) / name) for name in "ab")
        second.password, link = first.password, Path(folder) / "redis.sock"
        before, after = started(first), started(second)
        link.symlink_to(first.socket)
        url = first.url.replace(str(first.socket), str(link))
        with serving(settings.model_copy(update={"redis_url": url})) as client:
            ids = [client.post("/generate", json=body, headers=headers).json()["id"] for _ in range(3)]
            before.replicaof("127.0.0.1", 1)
            link.unlink()
            link.symlink_to(second.socket)
            answers = [client.post("/generate", json=body, headers=headers) for _ in range(3)]
            assert [answer.status_code for answer in answers] == [503, 202, 202]
            assert after.zcard(keys.DEADLINES) == 2
            assert client.get(f"/jobs/{answers[1].json()['id']}").json()["status"] == "queued"
            assert client.get(f"/jobs/{ids[0]}").status_code == 404  # here nothing is replicated
        for server, connection in ((first, before), (second, after)):
            connection.close()
            server.stop()


def started(server: RedisServer) -> Redis:
    """Start a server, announce a worker there, and connect to it."""
    server.start()
    connection = connect(server.url)
    workers.announce(connection, "w", {}, 600)
    return connection


@pytest.mark.parametrize("state", [full, read_only])
def test_events_are_sent_without_previews_while_redis_refuses_writes(
    client: httpx.Client, alive: JobStore, connection: Redis, state: Any
) -> None:
    job_id = submitted(client)
    with contextlib.ExitStack() as stack:
        stack.enter_context(state(connection))
        with client.stream("GET", f"/jobs/{job_id}/events") as response:
            stream = events(response)
            assert next(stream)["event"] == "job"
            connection.config_resetstat()
            until(lambda: "cmdstat_xrange" in connection.info("commandstats"))
            assert not connection.exists(keys.watched(job_id))
            stack.close()
            alive.cancel(job_id)
            assert [event["event"] for event in stream] == ["end"]


@pytest.mark.parametrize(("size", "checked_every_s"), [(0, 0), (100 << 20, 1e-9)])
def test_a_redis_that_hangs_is_given_up(size: int, checked_every_s: float) -> None:
    """Also where the address has a `health_check_interval`, after which a command waits for an answer to PING."""

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answered = b""
        while b"PING" not in answered:
            given = await reader.read(1000)
            writer.write(b"+OK\r\n" * given.count(b"*"))
            answered += given
        await over.wait()
        writer.close()

    over = asyncio.Event()

    async def check() -> None:
        server = await asyncio.start_server(hang, "127.0.0.1", 0)
        url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with asyncio.timeout(30), connect_async(url, timeout_s=0.5, max_connections=1) as client:
            await client.execute_command("PING")  # connects
            used = await client.connection_pool.get_connection()
            used.health_check_interval = checked_every_s
            await client.connection_pool.release(used)
            with pytest.raises(TimeoutError):
                await client.set("a", bytes(size))
        over.set()
        server.close()
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})

    asyncio.run(check())


WAIT_S = 2.0  # for an answer of a silent connection
IDLE = 4  # connections of a pool


@pytest.fixture
def network(redis_server: RedisServer) -> Iterator[tuple[Gate, str]]:
    """What stands between a client and Redis, and the address of Redis behind it."""
    with gate(redis_server.socket) as one:
        yield one, f"redis://:{redis_server.password}@127.0.0.1:{one.port}/0"


def idle(client: Redis) -> Redis:
    pool = client.connection_pool
    for used in [pool.get_connection() for _ in range(IDLE)]:
        pool.release(used)
    return client


def answers_of_all(client: Redis) -> list[str]:
    """Use all connections of a pool, as threads do at the same time, and return what each answers."""
    used = [client.connection_pool.get_connection() for _ in range(IDLE)]
    for one in used:
        one.send_command("PING")
    return [str(one.read_response()) for one in used]


def test_a_time_out_drops_all_idle_connections(network: tuple[Gate, str], connection: Redis) -> None:
    between, url = network
    with idle(connect(url, timeout_s=WAIT_S)) as client:
        between.freeze()
        with pytest.raises(TimeoutError):
            client.ping()
        assert answers_of_all(client) == ["PONG"] * IDLE


def test_a_worker_tries_once_more_whatever_number_of_connections_are_silent(
    network: tuple[Gate, str], connection: Redis
) -> None:
    between, url = network
    looks = []
    retry = RetryUntilStopped(lambda: bool(looks.append(1)))
    with idle(connect(url, timeout_s=WAIT_S, retry=retry)) as client:
        between.freeze()
        assert client.ping()
        assert answers_of_all(client) == ["PONG"] * IDLE
    assert len(looks) == 1


def test_the_event_loop_drops_all_idle_connections_after_one_time_out(
    network: tuple[Gate, str], connection: Redis
) -> None:
    between, url = network

    async def run() -> None:
        async with connect_async(url, timeout_s=WAIT_S, max_connections=IDLE) as client:
            pool = client.connection_pool
            for used in [await pool.get_connection() for _ in range(IDLE)]:
                await pool.release(used)
            between.freeze()
            with pytest.raises(TimeoutError):
                await Pipeline(client)("PING")
            assert await asyncio.gather(*(client.ping() for _ in range(IDLE))) == [True] * IDLE

    asyncio.run(run())


def test_a_silent_connection_of_messages_is_replaced_and_those_who_wait_look(
    network: tuple[Gate, str], connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "PING_AFTER_S", WAIT_S / 4)
    monkeypatch.setattr(hub, "RECONNECT_S", 0.0)
    between, url = network

    async def run() -> None:
        async with connect_async(url, timeout_s=WAIT_S, max_connections=IDLE) as client, asyncio.timeout(60):
            heard = hub.Hub(client)
            with heard.watch("a") as watch:
                heard.start()
                await watch.heard.wait()  # subscribed
                connection.config_resetstat()
                await asyncio.sleep(WAIT_S)  # pings keep it
                assert calls(connection, "subscribe") == 0
                assert calls(connection, "ping") >= 1
                watch.heard.clear()
                between.freeze()
                await watch.heard.wait()  # as after any reconnection
                assert calls(connection, "subscribe") == 1
                connection.publish(keys.CHANGES, '{"a": true}')
                while not watch.has_ended:
                    await asyncio.sleep(0.01)
            await heard.close()

    asyncio.run(run())


def calls(connection: Redis, command: str) -> int:
    return int(connection.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0))


def libraries(connection: Redis) -> set[str]:
    return {library[1] for library in connection.function_list()}


@pytest.fixture
def without_library(connection: Redis) -> Redis:
    connection.function_flush()
    return connection


def test_a_call_loads_the_library_if_it_is_missing(without_library: Redis) -> None:
    assert call(without_library, "live_workers") == []
    assert libraries(without_library) == {LIBRARY}


def test_the_event_loop_loads_the_library_too(without_library: Redis, settings: Settings) -> None:
    jobs = [record(1) for _ in range(3)]

    async def run() -> None:
        async with connect_async(settings.redis_url, timeout_s=5, max_connections=4) as client:
            async_jobs = AsyncJobs(client, settings)
            ids = await asyncio.gather(*(async_jobs.create(job) for job in jobs))
            assert ids == [job.id for job in jobs]
            without_library.function_flush()
            assert (await async_jobs.job(jobs[0].id)).status == "queued"

    asyncio.run(run())
    assert without_library.zcard("labelgrid:deadlines") == 3


FORMER = "#!lua name=labelgrid_0123456789ab\nredis.register_function('labelgrid_0123456789ab_read', function() end)"


def test_the_library_of_a_former_version_is_removed_unless_redis_is_too_full_to_take_it_again(
    connection: Redis,
) -> None:
    connection.function_load(FORMER)
    connection.function_load(FORMER.replace("labelgrid_", "other_"))
    with full(connection):
        functions.remove_former(connection)
    assert libraries(connection) == {LIBRARY, "labelgrid_0123456789ab", "other_0123456789ab"}
    functions.remove_former(connection)
    assert libraries(connection) == {LIBRARY, "other_0123456789ab"}
    connection.function_delete("other_0123456789ab")


def test_a_redis_before_version_7_is_refused(
    settings: Settings, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_version(settings.redis_url)
    check_version("redis://127.0.0.1:1")  # which is away
    monkeypatch.setattr(Redis, "info", lambda *_: {"redis_version": "6.2.22"})
    with pytest.raises(StartError, match=r"is Redis 6\.2\.22: upgrade it to Redis 7 or later, or to Valkey"):
        check_version(settings.redis_url)
