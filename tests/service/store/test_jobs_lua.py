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
KEEP_S = 100
RESULT = json.dumps({"repeats": [{}, {}], "best": 1})
CREATED_S = 1764355000.125


def job_id(letter: str, created_s: float = CREATED_S) -> str:
    """Return an id that was made at this time and ends with the letter."""
    return f"{int(created_s * 1000):012x}7{letter * 19}"


A, B, C = map(job_id, "abc")


class Library:
    """The functions, loaded from the file as it is."""

    def __init__(self, connection: Redis) -> None:
        self.connection = connection
        connection.function_load(SOURCE, replace=True)

    def __call__(self, function: str, *arguments: Any) -> Any:
        return self.connection.fcall(f"labelgrid_development_{function}", 0, *arguments)

    def create(self, job: str, pictures: int = 2, owner: str = "", digest: str = DIGEST, **more: Any) -> Any:
        """Create a job; `more`: other settings."""
        about = {"owner": owner, "total": pictures}
        about |= {"webhook_events": "running finished", "timeout_s": 50, "lifetime_s": 150, "idempotent_s": 300}
        about |= {"draws": about["total"], "cost": 10, "most_queued": 10_000, "most_own": 0, "most_stored": 0, **more}
        summary = {"id": job, "model": "toy", "digest": digest, "sent": False}
        return self("create", json.dumps(about), f"record of {job[-1]}", json.dumps(summary))

    def claim(self, most: int, worker: str = "w") -> dict[str, str]:
        """Claim pictures; return each one's entry, by job and index such as "a0"; of a grid, by "a grid"."""
        return self.named(self("claim", DIGEST, worker, most)[0])

    @staticmethod
    def named(leased: Any) -> dict[str, str]:
        found = {}
        for entry, pairs in leased:
            fields = dict(zip(pairs[::2], pairs[1::2], strict=True))
            found[f"{fields['job'][-1]}{fields.get('index', ' grid')}"] = entry
        return found

    def commit(self, entries: dict[str, str], verdict: str = "verdict", **results: str) -> Any:
        """Store pictures, each by job and index; `results`: of jobs without a grid. Return answers and grids."""
        pictures = []
        for name, entry in entries.items():
            about = {"entry": entry, "job": job_id(name[0]), "index": int(name[1]), "verdict": f"{verdict} {name[1]}"}
            pictures.append(about | ({"fields": {"result": results[name[0]]}} if name[0] in results else {}))
        answers, leased = self("commit", KEEP_S, DIGEST, "w", json.dumps(pictures))
        return answers, self.named(leased)

    def finish(self, job: str, entry: str, **fields: Any) -> Any:
        """End a job with these fields, if any."""
        grid = {"entry": entry, "job": job, **({"fields": fields} if fields else {})}
        return self("finish", KEEP_S, DIGEST, json.dumps([grid]))

    def begin(self, **indices: list[int]) -> Any:
        """Begin jobs, each by its letter."""
        return self("begin", json.dumps([[job_id(letter), of_job] for letter, of_job in indices.items()]))

    def end(self, job: str, status: str, **fields: Any) -> Any:
        return self("end_early", KEEP_S, job, status, json.dumps(fields))

    def hash(self, key: str) -> dict[str, str]:
        return self.connection.hgetall(key)

    def names(self) -> set[str]:
        """The names of all keys."""
        return set(self.connection.scan_iter())

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


@pytest.mark.parametrize("ahead_s", [0, 10**9])
def test_create_drops_old_jobs_from_their_owners_list_and_only_these(library: Library, ahead_s: int) -> None:
    """Also if the clock of an API is ahead."""
    now = library.connection.time()[0]
    for name, age_s in (("old", 152), ("young", 100)):
        library.connection.zadd("labelgrid:jobs:ann", {f"{int((now - age_s) * 1000):013}-{name}": 0})
    new = job_id("1", now + ahead_s)
    library.create(new, 1, "ann")
    members = library.connection.zrange("labelgrid:jobs:ann", 0, -1)
    assert [member.partition("-")[2] for member in members] == ["young", new]


def test_pictures_are_claimed_in_turn_stored_and_finished(library: Library) -> None:
    library.create(A, 3, "ann")
    library.create(B, 1, "bob")
    first, second = library.claim(3), library.claim(9, "other")
    assert [list(first), list(second), list(library.claim(9))] == [["a0", "b0", "a1"], ["a2"], []]
    answers, leased = library.commit(first | second, b="{}")
    assert (answers, list(leased)) == (["stored", "finished", "stored", "stored"], ["a grid"])
    assert library.in_stream() == (1, 1)
    assert library.hash(f"labelgrid:job:{A}:verdicts") == {index: f"verdict {index}" for index in "012"}
    assert library.connection.zrange("labelgrid:deadlines", 0, -1) == [A]
    assert library.finish(A, leased["a grid"], result=RESULT) == ["finished"]
    assert library.in_stream() == (0, 0)
    for job, told in ((A, ("finished", RESULT)), (B, ("finished", "{}"))):
        fields = library.hash(f"labelgrid:job:{job}")
        assert (fields["status"], fields["result"]) == told
    of_jobs = [key for key in library.names() if key.startswith("labelgrid:job:")]
    assert len(of_jobs) == 2 * 3
    assert all(KEEP_S - 5 <= library.connection.ttl(key) <= KEEP_S for key in of_jobs)


def test_every_date_of_a_job_is_by_the_clock_of_redis(library: Library) -> None:
    """Nobody sends a date, for the clocks of API and workers may be wrong."""

    def now_s() -> float:
        seconds, microseconds = library.connection.time()
        return float(seconds + microseconds / 1e6)

    begun_s = now_s()
    for job in (A, B):
        library.create(job, 1)
    library.begin(a=[], b=[])
    between_s = now_s()
    library.commit(library.claim(1), a="{}")
    library.end(B, "failed", error="why")
    for job in (A, B):
        started_at, finished_at = library.connection.hmget(f"labelgrid:job:{job}", "started_at", "finished_at")
        assert begun_s <= float(started_at or "") <= between_s <= float(finished_at or "") <= now_s()


def test_of_a_picture_that_two_workers_sampled_the_first_verdict_counts(library: Library) -> None:
    library.create(A)
    entries = library.claim(1)
    answers = [library.commit(entries, verdict) for verdict in ("first", "second")]
    assert answers == [(["stored"], {}), (["duplicate"], {})]
    assert library.hash(f"labelgrid:job:{A}:verdicts") == {"0": "first 0"}


def test_a_job_whose_last_picture_came_after_its_worker_looked_does_not_finish_without_a_result(
    library: Library,
) -> None:
    library.create(A, 1)
    grids = library.commit(library.claim(1))[1]
    assert library.finish(A, grids["a grid"]) == ["open"]
    assert library.hash(f"labelgrid:job:{A}")["status"] == "running"


def test_a_commit_makes_the_group_that_a_redis_has_lost(library: Library) -> None:
    """As one that came back without its last writes: the job's pictures are pending again."""
    library.create(A, 1)
    assert library.commit({"a0": "1-1"})[1].keys() == {"a grid"}
    assert library.in_stream() == (1, 1)


@pytest.mark.parametrize("shown", [{"shown": "[2, 3, 1]"}, {}], ids=["by this version", "by the release before"])
def test_a_job_is_read_with_the_verdicts_that_its_result_shows(library: Library, shown: dict[str, str]) -> None:
    library.create(A, 4)
    assert library("read", A, "status", "absent") == [["queued", None], 0, []]
    entries = library.claim(4)
    grids = (
        library.commit({name: entries[name] for name in ("a0", "a1", "a2")})[1]
        | library.commit({"a3": entries["a3"]})[1]
    )
    assert library("read", A, "status") == [["running"], 4, []]
    result = json.dumps({**json.loads(RESULT), "worst": [1]})
    library.finish(A, grids["a grid"], result=result, **shown)
    assert library("read", A, "status", "result") == [
        ["finished", result],
        0,
        ["verdict 2", "verdict 3", "verdict 1"],
    ]


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


def test_a_deadline_ends_a_job_once_no_worker_could_meet_it_and_others_at_their_time(library: Library) -> None:
    """20 pictures of ten rows take 20 s at ten rows a second; those that a worker has begun may be nearly done."""
    library("announce", "w", json.dumps({"models": [{"digest": DIGEST, "rows_per_s": 10.0}]}), 60_000)
    library.create(A, pictures=20, deadline_s=30)
    library.create(B, pictures=20)
    assert library("overdue") == []
    library.create(C, pictures=20, deadline_s=15)
    assert library("overdue") == [[C, "deadline"]]
    for _ in range(6):  # each job gives two more
        library.claim(3)
    assert library("overdue") == []
    library.connection.zadd("labelgrid:deadlines", {A: 1, B: 1})
    assert sorted(library("overdue")) == [[A, "deadline"], [B, "timeout"]]
    library.end(A, "failed", error="why", reason="deadline")
    library.end(C, "cancelled")
    assert not library.connection.exists("labelgrid:timed")


# --- a Redis that is full or read-only ---


CALLS: dict[str, Callable[[Library], Any]] = {
    "create": lambda library: library.create(B),
    "begin": lambda library: library.begin(a=[]),
    "commit": lambda library: library.commit({"a0": "1-1"}),
    "finish": lambda library: library.finish(A, "1-1"),
    "end_early": lambda library: library.end(A, "failed", error="why"),
    "delete": lambda library: library("delete", A),
    "overdue": lambda library: library("overdue"),
    "queue": lambda library: library("queue", DIGEST),
    "read": lambda library: library("read", A, "status"),
    "open_stream": lambda library: library("open_stream", DIGEST, 0),
    "claim": lambda library: library.claim(1),
    "wanted": lambda library: library("wanted", 0),
    "wake": lambda library: library("wake", "0"),
    "announce": lambda library: library("announce", "w", "{}", 1000),
    "live_workers": lambda library: library("live_workers"),
    "take_webhook": lambda library: library("take_webhook", "a running", 60),
    "end_webhook": lambda library: library("end_webhook", "a running", 1, -1),
}
READING = {"read", "overdue", "queue", "live_workers"}


def test_every_function_is_called_here(library: Library) -> None:
    (found,) = library.connection.function_list("labelgrid")
    functions = found[found.index("functions") + 1]
    names = {one[one.index("name") + 1].removeprefix("labelgrid_development_") for one in functions}
    assert names == set(CALLS)


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize(
    ("state", "takes", "error"),
    [(full, CALLS.keys() - {"create", "wake"}, OutOfMemoryError), (read_only, READING, ReadOnlyError)],
    ids=["full", "replica"],
)
def test_a_full_redis_takes_all_but_new_jobs_and_a_replica_is_read(
    library: Library, function: str, state: Any, takes: set[str], error: type[Exception]
) -> None:
    library.create(A)
    library.commit(library.claim(2))
    before = library.dump()
    with state(library.connection):
        if function in takes:
            CALLS[function](library)
            return
        with pytest.raises(error):
            CALLS[function](library)
    assert library.dump() == before


def test_a_job_whose_data_is_damaged_keeps_no_other_from_beginning(library: Library) -> None:
    library.create(A, 1)
    library.create(B, 1)
    library.connection.set(f"labelgrid:job:{A}:verdicts", "no hash")
    leased, (damaged, begun) = library("claim", DIGEST, "w", 2)
    assert library.named(leased).keys() == {"a0", "b0"}
    assert (damaged[:2], damaged[2].startswith("WRONGTYPE")) == ([A, "damaged"], True)
    assert begun == [B, "begun", "record of b", []]


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


def test_one_rq_job_waits_however_many_jobs_are_created(library: Library) -> None:
    for job in (A, B):
        library.create(job)
    library("wake", "another")
    assert library.connection.lrange("rq:queue:labelgrid", 0, -1) == [A]
    assert library.connection.keys("rq:job:*") == [f"rq:job:{A}"]


def test_an_end_is_published_and_any_other_change_only_while_somebody_follows_the_job(library: Library) -> None:
    with library.connection.pubsub() as heard:
        heard.subscribe("labelgrid:changes")

        def news() -> list[dict[str, bool]]:
            library.connection.publish("labelgrid:changes", "null")
            messages = iter(lambda: heard.get_message(timeout=60)["data"], "null")
            return [json.loads(data) for data in messages if isinstance(data, str)]

        for job in (A, B):
            library.create(job, 1)
        library.connection.set(f"labelgrid:job:{B}:watched", 1)
        entries = library.claim(2)
        assert news() == [{B: False}]
        library.commit(entries)
        assert news() == [{B: False}]
        library.end(A, "failed", error="why")
        assert news() == [{A: True}]


def test_a_model_is_wanted_whose_leased_pictures_are_late_or_that_has_others_besides(library: Library) -> None:
    library.create(A, 2)
    library.claim(2)
    assert library("wanted", 50_000) == []
    assert [digest for digest, _ in library("wanted", 0)] == [DIGEST]
    library.connection.xadd(STREAM, {"job": A})
    assert [digest for digest, _ in library("wanted", 50_000)] == [DIGEST]


def test_a_model_is_wanted_whose_pictures_no_worker_has_ever_claimed(library: Library) -> None:
    library.connection.xadd(STREAM, {"job": A})
    library.connection.hset("labelgrid:models", DIGEST, "{}")
    assert [digest for digest, _ in library("wanted", 50_000)] == [DIGEST]
