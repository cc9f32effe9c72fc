"""A Redis that takes no writes: workers wait until it does, not for what is worth no wait, and the API says so."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from redis import Redis
from redis.exceptions import ExecAbortError, OutOfMemoryError, ReadOnlyError, RedisError, ResponseError
from rq import Queue

from service.settings import Settings
from service.store.connection import RetryUntilStopped, connect
from service.store.jobs import JobStore
from service.store.keys import WEBHOOKS, job_key, previews_key, watched_key
from service.worker.previews import Previews
from service.worker.runner import Runner
from tests.service.api.test_event_feed import events, submit, until_blocked
from tests.service.store.helpers import full, read_only
from tests.service.webhooks.test_worker import created
from tests.service.worker.test_previews import picture, row

TAKES_NO_WRITES = pytest.mark.parametrize("state", [full, read_only])


@pytest.fixture
def impatient(settings: Settings, connection: Redis) -> Iterator[Redis]:
    """A worker's connection that fails a test which tries anything again."""
    client = connect(settings.redis_url, retry=RetryUntilStopped(lambda: pytest.fail("it waits for Redis")))
    yield client
    client.close()


@TAKES_NO_WRITES
def test_a_worker_waits_until_redis_takes_writes(connection: Redis, settings: Settings, state: Any) -> None:
    looks = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(state(connection))

        def stopping() -> bool:
            looks.append(1)
            if len(looks) == 2:
                stack.close()
            return False

        worker = connect(settings.redis_url, retry=RetryUntilStopped(stopping))
        assert worker.set("key", "value")
        with worker.pipeline(transaction=True) as pipe:
            assert pipe.set("other", "value").execute() == [True]
        worker.close()
    assert len(looks) == 2


def test_a_worker_that_waits_for_jobs_goes_on_when_redis_becomes_a_replica(
    connection: Redis, settings: Settings
) -> None:
    worker = connect(settings.redis_url, retry=RetryUntilStopped(lambda: False))
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(worker.blpop, ["queue"], 10)
        until_blocked(connection, 1)
        with read_only(connection):
            pass
        connection.rpush("queue", "job")
        assert found.result(10) == (b"queue", b"job")
    worker.close()


@TAKES_NO_WRITES
def test_what_a_sweep_cannot_put_right_is_not_waited_for(
    connection: Redis, settings: Settings, impatient: Redis, state: Any
) -> None:
    job_id = created(JobStore(connection, settings), "http://127.0.0.1/hook")
    connection.hdel(job_key(job_id), "rq")
    runner = Runner(impatient, settings, "w1")
    for _ in range(2):  # only what is missing twice is put right
        runner._swept_at = 0.0
        with state(connection):
            runner._sweep()
    assert not connection.hexists(job_key(job_id), "rq")
    runner._swept_at = 0.0
    runner._sweep()
    assert connection.hexists(job_key(job_id), "rq")


AOF = "MISCONF Errors writing to the AOF file: No space left on device"


@pytest.mark.parametrize(
    "error",
    [
        ResponseError(AOF),
        ExecAbortError(f"Transaction discarded because of: {AOF}"),
        ResponseError(f"Error running script (call to f_0): @user_script:3: @user_script: 3: -{AOF}"),
        ReadOnlyError("You can't write against a read only replica."),
        OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
    ],
)
def test_what_redis_says_when_it_takes_no_writes_is_ridden_out(error: RedisError) -> None:
    answers = iter([error, None])

    def do() -> str:
        if (answer := next(answers)) is not None:
            raise answer
        return "done"

    assert RetryUntilStopped(lambda: False).call_with_retry(do, lambda error: None) == "done"


def test_what_redis_cannot_do_at_all_is_an_error_at_once(impatient: Redis) -> None:
    impatient.set("key", "value")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        impatient.rpush("key", "value")


@TAKES_NO_WRITES
def test_previews_are_not_waited_for(connection: Redis, impatient: Redis, state: Any) -> None:
    connection.set(watched_key("job"), 1)
    pairs = [(picture("job", 0), row(torch.zeros(3, 4, 4)))]
    previews = Previews(impatient, 0.0)
    with state(connection):
        previews.publish(pairs)
    assert not connection.exists(previews_key("job"))
    previews.publish(pairs)
    assert connection.xlen(previews_key("job")) == 1


def test_that_rq_hears_of_a_webhook_is_not_waited_for(connection: Redis, impatient: Redis, settings: Settings) -> None:
    store = JobStore(impatient, settings)
    job_id = created(store, "http://x/")
    with full(connection):
        assert store.cancel(job_id)
    assert Queue(settings.webhook_queue, connection=connection).count == 0
    assert connection.zcard(WEBHOOKS) == 1  # there the webhooks' worker finds it


def test_the_api_says_that_redis_takes_no_writes(client: httpx.Client, alive: JobStore, connection: Redis) -> None:
    job = client.post("/generate", json={"labels": [["red cube"]]}, headers={"prefer": "respond-async"}).json()
    with read_only(connection):
        for answer in (client.post("/generate", json={"labels": [["red cube"]]}), client.delete(f"/jobs/{job['id']}")):
            assert (answer.status_code, answer.json()["type"]) == (503, "urn:labelgrid:problem:unavailable")
            assert answer.headers["retry-after"] == "10"
        assert client.get(f"/jobs/{job['id']}").json()["status"] == "queued"
    assert client.delete(f"/jobs/{job['id']}").json()["status"] == "cancelled"


@TAKES_NO_WRITES
def test_a_job_is_told_of_without_previews(
    client: httpx.Client, alive: JobStore, connection: Redis, state: Any
) -> None:
    job_id = submit(client)
    with contextlib.ExitStack() as stack:
        stack.enter_context(state(connection))
        with client.stream("GET", f"/jobs/{job_id}/events") as response:
            told = events(response)
            assert next(told)["event"] == "job"
            until_blocked(connection, 1)
            assert not connection.exists(watched_key(job_id))
            stack.close()
            alive.cancel(job_id)
            assert [event["event"] for event in told] == ["end"]
