"""The functions of `jobs.lua` by themselves, on the packaged server and on each Redis and Valkey that is on PATH.

`test_job_model.py` has what becomes of jobs and their pictures whatever the order of the calls.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError

from service.local.redis_server import RedisServer, find_binary
from service.store.connection import connect
from tests.paths import ROOT
from tests.service.store.helpers import full, read_only

SOURCE = (ROOT / "service" / "store" / "jobs.lua").read_text()
DIGEST = "d" * 64
STREAM = f"labelgrid:pictures:{DIGEST}"
OWNERS, COUNTS = f"labelgrid:turns:{DIGEST}", f"labelgrid:waiting:{DIGEST}"
KEEP_S = 100
RESULT = json.dumps({"repeats": [{}, {}], "best": 1})
CREATED_S = 1764355000.125
HOUR = str(int(CREATED_S // 3600))


def job_id(letter: str, created_s: float = CREATED_S) -> str:
    """Return an id that was made at this time and ends with the letter."""
    return f"{int(created_s * 1000):012x}7{letter * 19}"


A, B, C, NOBODY = map(job_id, "abc0")


class Library:
    """The functions, loaded from the file as it is."""

    def __init__(self, connection: Redis) -> None:
        self.connection = connection
        connection.function_load(SOURCE, replace=True)

    def __call__(self, function: str, *arguments: Any) -> Any:
        return self.connection.fcall(f"labelgrid_development_{function}", 0, *arguments)

    def create(self, job: str, pictures: int = 2, owner: str = "", digest: str = DIGEST, **more: Any) -> Any:
        """Create a job; `more`: other settings."""
        fields = {"status": "queued", "total": pictures, "record": f"record of {job[-1]}", "digest": digest}
        fields |= {"owner": owner, "webhook_events": "running finished"}
        of_job = [part for pair in fields.items() for part in pair]
        about = {"id": job, "owner": owner, "digest": digest, "model": "{}", "total": pictures, "fields": len(of_job)}
        about |= {"timeout_s": 50, "lifetime_s": 150, "idempotent_s": 300}
        about |= {"most_queued": 10_000, "most_own": 0, "most_stored": 0, **more}
        waiting = [f'{{"job": "{job}", "index": {i}}}' for i in range(pictures)]
        return self("create", json.dumps(about), *of_job, *waiting)

    def claim(self, most: int, worker: str = "w") -> dict[str, str]:
        """Claim pictures; return each one's entry, by job and index such as "a0"; of a grid, by "a grid"."""
        return self.named(self("claim", DIGEST, worker, most))

    @staticmethod
    def named(leased: Any) -> dict[str, str]:
        found = {}
        for entry, (what, value, *_) in leased:
            picture = json.loads(value) if what == b"picture" else {"job": value.decode(), "index": " grid"}
            found[f"{picture['job'][-1]}{picture['index']}"] = entry.decode()
        return found

    def commit(self, entries: dict[str, str], verdict: str = "verdict", result: str = "", worker: str = "w") -> Any:
        """Store pictures, each by job and index. Return the answers, and the grids that are leased to the worker."""
        arguments = []
        for name, entry in entries.items():
            arguments += [entry, job_id(name[0]), name[1], f"{verdict} {name[1]}", result]
        answers, leased = self("commit", KEEP_S, DIGEST, worker, 7.5, *arguments)
        return answers, self.named(leased)

    def finish(self, job: str, entry: str) -> Any:
        return self("finish", KEEP_S, DIGEST, 8.5, entry, job, RESULT)

    def end(self, job: str, status: str, *fields: Any) -> Any:
        return self("end_early", KEEP_S, job, status, *fields)

    def hash(self, key: str) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.connection.hgetall(key).items()}

    def names(self) -> set[str]:
        """The names of all keys."""
        return {key.decode() for key in self.connection.scan_iter()}

    def dump(self) -> dict[str, bytes | None]:
        """All that Redis holds."""
        return {key: self.connection.dump(key) for key in self.names()}

    def in_stream(self) -> tuple[int, int]:
        """Return how many entries are in the stream, and how many of them are leased."""
        return self.connection.xlen(STREAM), self.connection.xpending(STREAM, "workers")["pending"]


SERVERS = {"packaged": find_binary(), **{name: shutil.which(name) for name in ("redis-server", "valkey-server")}}


@pytest.fixture(scope="module", params=[name for name, binary in SERVERS.items() if binary])
def server(request: pytest.FixtureRequest) -> Iterator[Redis]:
    with tempfile.TemporaryDirectory(prefix="lg-") as folder:
        running = RedisServer(Path(folder), Path(SERVERS[request.param]))
        running.start()
        with connect(running.url) as client:
            yield client
        running.stop()


@pytest.fixture
def library(server: Redis) -> Library:
    server.flushall()
    server.script_flush()
    return Library(server)


# --- a job's life ---


def test_create_writes_every_key_of_a_job(library: Library) -> None:
    limits = {"request_key": "labelgrid:key:k", "request_hash": "h", "most_stored": 9}
    assert library.create(A, 2, "ann", model='{"name": "toy"}', **limits) is None
    now = library.connection.time()[0]
    job = library.hash(f"labelgrid:job:{A}")
    assert (job["status"], job["total"], job["record"]) == ("queued", "2", "record of a")
    assert library.connection.llen(f"labelgrid:job:{A}:waiting") == 2
    assert library.connection.lrange(f"{OWNERS}:ann", 0, -1) == [A.encode()]
    assert library.connection.zrange(OWNERS, 0, -1) == [b"ann"]
    assert library.hash(COUNTS) == {"ann": "2"}
    ((opened, overdue_at),) = library.connection.zrange("labelgrid:deadlines", 0, -1, withscores=True)
    assert opened == A.encode()
    assert 45 <= overdue_at - now <= 50
    assert library.hash("labelgrid:models") == {DIGEST: '{"name": "toy"}'}
    assert library.connection.get("labelgrid:key:k") == f"{A} h".encode()
    assert library.connection.zrange("labelgrid:jobs:ann", 0, -1) == [f"1764355000125-{A}".encode()]
    assert library.hash("labelgrid:stored:ann") == {HOUR: "2"}
    expected = {"labelgrid:key:k": 300, "labelgrid:jobs:ann": 150, "labelgrid:stored:ann": 150 + 3600}
    lifetimes = {key: library.connection.ttl(key) for key in library.names()}
    assert {key for key, lifetime in lifetimes.items() if lifetime != -1} == set(expected)
    assert all(0 <= expected[key] - lifetimes[key] <= 5 for key in expected)


@pytest.mark.parametrize("ahead_s", [0, 10**9])
def test_create_drops_old_jobs_from_their_owners_list_and_only_these(library: Library, ahead_s: int) -> None:
    """Also if the clock of an API is ahead."""
    now = library.connection.time()[0]
    for name, age_s in (("old", 152), ("young", 100)):
        library.connection.zadd("labelgrid:jobs:ann", {f"{int((now - age_s) * 1000):013}-{name}": 0})
    new = job_id("1", now + ahead_s)
    library.create(new, 1, "ann")
    members = [member.decode() for member in library.connection.zrange("labelgrid:jobs:ann", 0, -1)]
    assert [member.partition("-")[2] for member in members] == ["young", new]


@pytest.mark.parametrize("pictures", [999, 1000, 1001, 2500])
def test_create_takes_more_pictures_than_a_lua_function_takes_arguments(library: Library, pictures: int) -> None:
    library.create(A, pictures)
    assert library.connection.llen(f"labelgrid:job:{A}:waiting") == pictures


@pytest.mark.parametrize(
    ("limits", "answer"),
    [
        ({"request_key": "labelgrid:key:k", "request_hash": "h"}, [b"request", f"{A} h".encode()]),
        ({"most_queued": 3}, [b"queue", 2]),
        ({"most_own": 3}, [b"owner", 2]),
        ({"most_stored": 3, "lifetime_s": 10**9}, [b"stored", 2]),
    ],
    ids=["request", "queue", "owner", "stored"],
)
def test_create_says_what_prevents_a_job_and_writes_nothing(
    library: Library, limits: dict[str, Any], answer: list[Any]
) -> None:
    library.create(A, 2, "ann", request_key="labelgrid:key:k", request_hash="h", most_stored=9)
    before = library.dump()
    assert library.create(B, 2, "ann", **limits) == answer
    assert library.dump() == before


def test_pictures_are_claimed_in_turn_stored_and_finished(library: Library) -> None:
    library.create(A, 3, "ann")
    library.create(B, 1, "bob")
    first, second = library.claim(3), library.claim(9, "other")
    assert [list(first), list(second), list(library.claim(9))] == [["a0", "b0", "a1"], ["a2"], []]
    answers, leased = library.commit(first | second, result="{}")
    assert (answers, list(leased)) == ([1, b"record of b", 1, 1], ["a grid"])
    assert library.in_stream() == (1, 1)
    assert library.hash(f"labelgrid:job:{A}:verdicts") == {index: f"verdict {index}" for index in "012"}
    assert library.connection.zrange("labelgrid:deadlines", 0, -1) == [A.encode()]
    assert library.finish(A, leased["a grid"]) == [b"record of a"]
    assert library.in_stream() == (0, 0)
    for job, told in ((A, ("finished", "8.5", RESULT)), (B, ("finished", "7.5", "{}"))):
        fields = library.hash(f"labelgrid:job:{job}")
        assert (fields["status"], fields["finished_at"], fields["result"]) == told
    of_jobs = [key for key in library.names() if key.startswith("labelgrid:job:")]
    assert len(of_jobs) == 2 * 3
    assert all(KEEP_S - 5 <= library.connection.ttl(key) <= KEEP_S for key in of_jobs)


def test_of_a_picture_that_two_workers_sampled_the_first_verdict_counts(library: Library) -> None:
    library.create(A)
    entries = library.claim(1)
    assert [library.commit(entries, verdict) for verdict in ("first", "second")] == [([1], {})] * 2
    assert library.hash(f"labelgrid:job:{A}:verdicts") == {"0": "first 0"}


def test_a_commit_makes_the_group_that_a_redis_has_lost(library: Library) -> None:
    """As one that came back without its last writes: the job's pictures are pending again."""
    library.create(A, 1)
    assert library.commit({"a0": "1-1"})[1].keys() == {"a grid"}
    assert library.in_stream() == (1, 1)


def test_an_attempt_of_a_webhook_that_took_longer_than_its_lease_ends_no_later_one(library: Library) -> None:
    message = f"{A} running"
    library.connection.zadd("labelgrid:webhooks", {message: 0})
    assert library("take_webhook", message, 60) == [1, None]
    assert library("take_webhook", message, 60) is None
    library.connection.zadd("labelgrid:webhooks", {message: 0})  # the lease is over
    assert library("take_webhook", message, 60) == [2, None]
    before = library.dump()
    for wait_s in (-1, 0):
        library("end_webhook", message, 1, wait_s)
        assert library.dump() == before
    library("end_webhook", message, 2, -1)
    assert library.names() == set()


def test_overdue_jobs_are_named_and_those_that_are_gone_forgotten(library: Library) -> None:
    library.create(A, timeout_s=0)
    library.create(B)
    library.connection.zadd("labelgrid:deadlines", {NOBODY: 5})
    assert library("overdue") == [A.encode()]
    assert library.connection.zrange("labelgrid:deadlines", 0, -1) == [A.encode(), B.encode()]


def test_overdue_takes_over_the_open_jobs_of_former_versions(library: Library) -> None:
    library.connection.sadd("labelgrid:open", A, B)
    record = json.dumps({"model": "toy", "digest": DIGEST})
    library.connection.hset(f"labelgrid:job:{A}", mapping={"overdue_at": 5, "record": record})
    assert [library("overdue"), library("overdue")] == [[A.encode()]] * 2
    assert not library.connection.exists("labelgrid:open")
    assert json.loads(library.hash("labelgrid:models")[DIGEST]) == {
        "name": "toy", "digest": DIGEST, "is_evaluator": False,
    }  # fmt: skip


# --- queue and workers ---


def test_claim_gives_the_time_in_a_jobs_id(library: Library) -> None:
    library.create(A, 1)
    ((_, fields),) = library("claim", DIGEST, "w", 9)
    assert fields[2:] == [b"asked_at", b"1764355000.125"]


def test_only_workers_whose_announcement_has_not_expired_live(library: Library) -> None:
    library("announce", "gone", "{}", 1)
    library("announce", "here", '{"host": "h"}', 60_000)
    while library.connection.exists("labelgrid:worker:gone"):
        pass  # for a millisecond
    assert library("live_workers") == [b'{"host": "h"}']


# --- a Redis that is full or read-only ---


def a_job_is_complete(library: Library) -> None:
    library.create(A)
    library.commit(library.claim(2))


CALLS: dict[str, Callable[[Library], Any]] = {
    "create": lambda library: library.create(B),
    "begin": lambda library: library("begin", 5.5, A, 0),
    "commit": lambda library: library.commit({"a0": "1-1"}),
    "finish": lambda library: library.finish(A, "1-1"),
    "end_early": lambda library: library.end(A, "failed", "error", "why"),
    "delete": lambda library: library("delete", A),
    "overdue": lambda library: library("overdue"),
    "read": lambda library: library("read", A),
    "open_stream": lambda library: library("open_stream", "e" * 64),
    "claim": lambda library: library.claim(1),
    "discard": lambda library: library("discard", DIGEST, "1-1"),
    "drop_consumers": lambda library: library("drop_consumers", DIGEST, 0),
    "wanted": lambda library: library("wanted", 0),
    "jobs_of": lambda library: library("jobs_of", DIGEST),
    "announce": lambda library: library("announce", "w", "{}", 1000),
    "live_workers": lambda library: library("live_workers"),
    "due_webhooks": lambda library: library("due_webhooks"),
    "take_webhook": lambda library: library("take_webhook", "a running", 60),
    "end_webhook": lambda library: library("end_webhook", "a running", 1, -1),
}
FOR_ROOM = {"create"}  # it waits until there is memory
READING = {"read", "jobs_of", "live_workers", "due_webhooks"}


def test_every_function_is_called_here(library: Library) -> None:
    (found,) = library.connection.function_list("labelgrid")
    functions = found[found.index(b"functions") + 1]
    names = {one[one.index(b"name") + 1].decode().removeprefix("labelgrid_development_") for one in functions}
    assert names == set(CALLS)


@pytest.mark.parametrize("function", CALLS)
def test_a_full_redis_runs_all_but_what_takes_up_more(library: Library, function: str) -> None:
    a_job_is_complete(library)
    before = library.dump()
    with full(library.connection):
        if function not in FOR_ROOM:
            CALLS[function](library)
            return
        with pytest.raises(OutOfMemoryError):
            CALLS[function](library)
    assert library.dump() == before


@pytest.mark.parametrize("function", CALLS)
def test_a_replica_runs_what_only_reads(library: Library, function: str) -> None:
    a_job_is_complete(library)
    with read_only(library.connection):
        if function in READING:
            CALLS[function](library)
            return
        with pytest.raises(ReadOnlyError):
            CALLS[function](library)


def test_an_error_in_the_middle_leaves_the_pictures_in_the_stream(library: Library) -> None:
    library.create(A, 1)
    library.create(B, 1)
    entries = library.claim(2)
    library.connection.set(f"labelgrid:job:{B}:verdicts", "no hash")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        library.commit(entries)
    library.connection.delete(f"labelgrid:job:{B}:verdicts")
    assert library.commit(entries)[1].keys() == {"a grid", "b grid"}
    assert library.in_stream() == (2, 2)


def test_a_model_is_wanted_whose_pictures_no_worker_has_ever_claimed(library: Library) -> None:
    library.connection.xadd(STREAM, {"job": A})
    library.connection.hset("labelgrid:models", DIGEST, "{}")
    assert library("wanted", 50_000) == [[DIGEST.encode(), b"{}"]]
