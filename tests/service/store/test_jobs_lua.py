"""The functions of `jobs.lua` by themselves, on the packaged server and on each Redis and Valkey that is on PATH."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError

from service.local.redis_server import RedisServer, packaged_binary
from service.store.connection import connect
from tests.paths import ROOT
from tests.service.store.helpers import full, read_only

SOURCE = (ROOT / "service" / "store" / "jobs.lua").read_text()
DIGEST = "d" * 64
STREAM = f"labelgrid:pictures:{DIGEST}"
ENDING = json.dumps({"ttl_s": 100, "remembered_s": 200, "rq_queue": "rq:queue:q", "rq_jobs": "rq:job:"})


class Library:
    """The functions, loaded from the file as it is."""

    def __init__(self, connection: Redis) -> None:
        self.connection = connection
        connection.function_load(SOURCE, replace=True)

    def __call__(self, function: str, *arguments: Any) -> Any:
        return self.connection.fcall(f"labelgrid_development_{function}", 0, *arguments)

    def create(self, job: str, pictures: int = 2, owner: str = "", uploaded: Sequence[bytes] = (), **more: Any) -> Any:
        """Create a job; `more`: other settings."""
        about = {
            "id": job,
            "owner": owner,
            "digest": DIGEST,
            "total": pictures,
            "rq_queue": "rq:queue:q",
            "rq_jobs": "rq:job:",
            "timeout_s": 50,
            "lifetime_s": 150,
            "remembered_s": 250,
            "idempotent_s": 300,
            "expected_bytes": 10,
            "most_queued": 1000,
            "most_own": 0,
            "most_bytes": 0,
            **more,
        }
        fields = {"status": "queued", "total": pictures, "record": f"record of {job}", "digest": DIGEST, "owner": owner}
        fields |= {"webhook_events": "running finished", "asked_at": 1}
        of_job, of_rq_job = flat(fields), ["status", "queued"]
        about |= {"fields": len(of_job), "rq_fields": len(of_rq_job)}
        waiting = [f'{{"job": "{job}", "index": {i}}}' for i in range(pictures)]
        sent = flat(dict(enumerate(uploaded)))
        return self("create", json.dumps(about), *of_job, *of_rq_job, *waiting, *sent)

    def claim(self, most: int, worker: str = "w") -> dict[str, str]:
        """Claim pictures; return each one's entry, by job and index such as "a0"."""
        found = [(entry.decode(), json.loads(fields[1])) for entry, fields in self("claim", DIGEST, worker, most)]
        return {f"{picture['job']}{picture['index']}": entry for entry, picture in found}

    def commit(self, entries: dict[str, str], **more: str) -> Any:
        """Store pictures, each by job and index, with a PNG of three bytes."""
        about = {"png": "png", "trajectory": "", "size": 5, "result": "", **more}
        arguments = []
        for name, entry in entries.items():
            job, index = name[:-1], name[-1]
            arguments += [entry, job, index, f"verdict {index}", *about.values()]
        return self("commit", ENDING, STREAM, 7.5, *arguments)

    def finish(self, job: str, is_kept: int = 0) -> Any:
        return self("finish", ENDING, 8.5, job, RESULT, "" if is_kept else "grid", 4, is_kept)

    def hash(self, key: str) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.connection.hgetall(key).items()}

    def names(self) -> set[str]:
        """The names of all keys."""
        return {key.decode() for key in self.connection.scan_iter()}

    def dump(self) -> dict[str, bytes | None]:
        """All that Redis holds."""
        return {key: self.connection.dump(key) for key in self.names()}


RESULT = json.dumps({"repeats": [{}, {}], "best": 1})


def flat(fields: dict[Any, Any]) -> list[Any]:
    return [part for pair in fields.items() for part in pair]


SERVERS = {"packaged": packaged_binary(), **{name: shutil.which(name) for name in ("redis-server", "valkey-server")}}


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
    assert library.create("a", 2, "ann", (b"first", b"second"), request_key="labelgrid:key:k", request_hash="h") is None
    (rq_id,) = library.connection.lrange("rq:queue:q", 0, -1)
    job = library.hash("labelgrid:job:a")
    overdue_at = int(job["overdue_at"])
    assert job["rq"] == rq_id.decode() == f"a-{DIGEST}-{overdue_at}"
    assert 45 <= overdue_at - library.connection.time()[0] <= 50
    assert (job["status"], job["total"], job["record"]) == ("queued", "2", "record of a")
    assert library.hash(f"rq:job:{rq_id.decode()}") == {"status": "queued"}
    assert library.hash("labelgrid:job:a:png") == {"0": "first", "1": "second"}
    assert library.connection.llen("labelgrid:job:a:waiting") == 2
    assert library.connection.lrange(f"labelgrid:turns:{DIGEST}:ann", 0, -1) == [b"a"]
    assert library.connection.zrange(f"labelgrid:turns:{DIGEST}", 0, -1) == [b"ann"]
    assert library.hash(f"labelgrid:waiting:{DIGEST}") == {"ann": "2"}
    assert library.connection.smembers("labelgrid:open") == {b"a"}
    assert library.connection.get("labelgrid:key:k") == b"a h"
    (member,) = library.connection.zrange("labelgrid:jobs:ann", 0, -1)
    assert member.endswith(b"-a")
    expires, size = library.hash("labelgrid:bytes:ann")["a"].split()
    assert (int(expires) - overdue_at, size) == (100, "10")
    expected = {"labelgrid:was:a": 250, "labelgrid:key:k": 300, "labelgrid:jobs:ann": 150, "labelgrid:bytes:ann": 150}
    lifetimes = {key: library.connection.ttl(key) for key in library.names()}
    assert {key for key, lifetime in lifetimes.items() if lifetime != -1} == set(expected)
    assert all(0 <= expected[key] - lifetimes[key] <= 5 for key in expected)


@pytest.mark.parametrize("pictures", [999, 1000, 1001, 2500])
def test_create_takes_more_pictures_than_a_lua_function_takes_arguments(library: Library, pictures: int) -> None:
    library.create("a", pictures, uploaded=[b"x"] * pictures, most_queued=10_000)
    assert library.connection.llen("labelgrid:job:a:waiting") == pictures
    assert library.connection.hlen("labelgrid:job:a:png") == pictures


@pytest.mark.parametrize(
    ("limits", "answer"),
    [
        ({"request_key": "labelgrid:key:k", "request_hash": "h"}, [b"request", b"a h", 0]),
        ({"most_queued": 3}, [b"queue", 2, 0]),
        ({"most_own": 3}, [b"owner", 2, 0]),
        ({"most_bytes": 19}, [b"bytes", 10, 150]),
    ],
)
def test_create_says_what_prevents_a_job_and_writes_nothing(
    library: Library, limits: dict[str, Any], answer: list[Any]
) -> None:
    library.create("a", 2, "ann", request_key="labelgrid:key:k", request_hash="h")
    before = library.dump()
    what, taken, expires_s = library.create("b", 2, "ann", **limits)
    assert [what, taken] == answer[:2]
    assert 0 <= answer[2] - expires_s <= 5
    assert library.dump() == before


def test_create_drops_old_jobs_from_their_owners_list_now_and_then(library: Library) -> None:
    library.connection.zadd("labelgrid:jobs:ann", {"0000000000001-old": 0})
    for i in range(1000):  # one in sixteen does, by the millisecond
        library.create(f"job{i}", 1, "ann", most_queued=2000)
        if library.connection.zscore("labelgrid:jobs:ann", "0000000000001-old") is None:
            break
    assert library.connection.zcard("labelgrid:jobs:ann") == i + 1


def test_create_forgets_a_request_whose_job_is_gone(library: Library) -> None:
    known = {"request_key": "labelgrid:key:k", "request_hash": "h"}
    library.create("a", **known)
    library.connection.delete("labelgrid:job:a")
    assert library.create("b", **known) is None
    assert library.connection.get("labelgrid:key:k") == b"b h"


def test_begin_moves_queued_jobs_and_says_which_pictures_are_finished(library: Library) -> None:
    for job in "ab":
        library.create(job)
    library.commit(library.claim(1))
    assert library("begin", 5.5, "a", 0, "nobody", 1, 0) == [[1, 1, b"record of a", []], None]
    assert library("begin", 6.5, "a", 2, 1, 0, "b", 0) == [[0, 0, b"record of a", [b"0"]], [1, 1, b"record of b", []]]
    job = library.hash("labelgrid:job:a")
    assert (job["status"], job["started_at"]) == ("running", "5.5")
    assert library.connection.zrange("labelgrid:webhooks", 0, -1) == [b"a running", b"b running"]
    assert [fields for _, fields in library.connection.xrange("labelgrid:job:b:events")] == [{b"status": b"running"}]


def test_pictures_are_claimed_in_turn_stored_and_finished(library: Library) -> None:
    library.create("a", 3, "ann")
    library.create("b", 1, "bob")
    assert list(first := library.claim(3)) == ["a0", "b0", "a1"]
    assert list(second := library.claim(9, "other")) == ["a2"]
    assert library.claim(9) == {}
    assert library.commit(first | second, trajectory="strip", result="{}") == [0, [1, b"record of b"], 0, 1]
    pngs = {**dict.fromkeys("012", "png"), **dict.fromkeys(["strip:0", "strip:1", "strip:2"], "strip")}
    assert library.hash("labelgrid:job:a:png") == pngs
    assert library.hash("labelgrid:job:b:png") == {"0": "png", "strip:0": "strip", "grid": "0"}
    assert library.connection.xlen(STREAM) == library.connection.xpending(STREAM, "workers")["pending"] == 0
    assert library.connection.smembers("labelgrid:open") == {b"a"}
    assert library.finish("a") == [[1, b"record of a"]]
    job = library.hash("labelgrid:job:a")
    assert (job["status"], job["finished_at"], job["result"]) == ("finished", "8.5", RESULT)
    assert "kept" not in job
    assert library.hash("labelgrid:job:a:png") == {**pngs, "grid": "grid"}
    assert int(job["bytes"]) == 3 * 5 + len("grid") + len("record of a")
    stored = {owner: library.hash(f"labelgrid:bytes:{owner}") for owner in ("ann", "bob")}
    assert stored["ann"][job["bytes_minute"]] == f"{int(job['bytes_minute']) * 60} {job['bytes']}"
    assert [len(of_owner) for of_owner in stored.values()] == [1, 1]  # what was expected no longer counts
    ended = [fields[b"job"] for _, fields in library.connection.xrange("labelgrid:ended")]
    assert ended == [b"b", b"a"]
    of_jobs = [key for key in library.names() if key.startswith("labelgrid:job:")]
    assert len(of_jobs) == 2 * 4
    assert all(95 <= library.connection.ttl(key) <= 100 for key in of_jobs)
    assert library.connection.llen("rq:queue:q") == 0
    assert not [key for key in library.names() if key.startswith("rq:job:")]


def test_a_picture_is_stored_once_and_only_while_its_job_is_open(library: Library) -> None:
    library.create("a")
    entries = library.claim(2)
    assert library.commit({"a0": entries["a0"]}, png="first") == [0]
    assert library.commit({"a0": entries["a0"]}, png="second") == [0]
    assert library.hash("labelgrid:job:a:png") == {"0": "first"}
    library("end_early", ENDING, "a", "cancelled", "finished_at", 9)
    assert library.commit({"a1": entries["a1"]}) == [0]
    assert library.hash("labelgrid:job:a:verdicts") == {"0": "verdict 0"}


def test_a_job_that_lacks_pictures_does_not_finish(library: Library) -> None:
    library.create("a")
    library.commit({"a0": library.claim(2)["a0"]})
    assert library.finish("a") == library.finish("nobody") == [None]
    assert library.hash("labelgrid:job:a")["status"] == "queued"


@pytest.mark.parametrize("events", ["", "finished"])
def test_a_kept_job_leaves_little_behind(library: Library, events: str) -> None:
    library.create("a", 1)
    library.connection.hset("labelgrid:job:a", "webhook_events", events)
    if not events:
        library.connection.hdel("labelgrid:job:a", "webhook_events")
    library.commit(library.claim(1))  # with its PNG, as while storage was away
    library.finish("a", is_kept=1)
    assert not library.connection.exists("labelgrid:job:a:png")
    job = library.hash("labelgrid:job:a")
    assert job["kept"] == "1"
    assert {"rq", "overdue_at", "asked_at", "digest"}.isdisjoint(job)
    lifetimes_s = [library.connection.ttl(f"labelgrid:job:a{part}") for part in ("", ":verdicts", ":events")]
    wanted_s = [100, 100, 100] if events else [100, 60, 60]
    assert all(0 <= wanted - lifetime <= 5 for wanted, lifetime in zip(wanted_s, lifetimes_s, strict=True))


def test_an_early_end_takes_the_jobs_pictures_out_of_queue_and_stream(library: Library) -> None:
    library.create("a", 3, "ann")
    library.create("b", 1, "ann")
    assert list(library.claim(2)) == ["a0", "b0"]
    assert library("end_early", ENDING, "a", "failed", "finished_at", 9, "error", "why") == [0, b"record of a"]
    assert library("end_early", ENDING, "a", "cancelled", "finished_at", 10) is None
    job = library.hash("labelgrid:job:a")
    assert (job["status"], job["finished_at"], job["error"]) == ("failed", "9", "why")
    assert [json.loads(fields[b"picture"])["job"] for _, fields in library.connection.xrange(STREAM)] == ["b"]
    assert library.connection.xpending(STREAM, "workers")["pending"] == 1
    gone = {"labelgrid:job:a:waiting", f"labelgrid:turns:{DIGEST}:ann", f"labelgrid:waiting:{DIGEST}"}
    assert gone.isdisjoint(library.names())
    assert 195 <= library.connection.ttl("labelgrid:was:a") <= 200


def test_delete_leaves_the_tombstone_and_no_counted_bytes(library: Library) -> None:
    library.create("a", 1, "ann")
    assert library("delete", "a") == library("delete", "nobody") == 0
    library.commit(library.claim(1), result="{}")
    assert library("delete", "a") == 1
    assert [key for key in library.names() if key.startswith("labelgrid:job:")] == []
    assert library.connection.exists("labelgrid:was:a")
    assert [value.split()[1] for value in library.hash("labelgrid:bytes:ann").values()] == ["0"]


def test_an_owners_bytes_are_counted_until_they_expire(library: Library) -> None:
    library.connection.hset("labelgrid:bytes:ann", "1", "60 5")  # fifty years ago
    library.create("a", 1, "ann")
    assert list(library.hash("labelgrid:bytes:ann")) == ["a"]
    library.connection.expire("labelgrid:bytes:ann", 10)
    library.commit(library.claim(1), result="{}")
    (value,) = library.hash("labelgrid:bytes:ann").values()
    assert library.connection.expiretime("labelgrid:bytes:ann") == int(value.split()[0])


def test_set_rq_does_not_bring_back_a_deleted_job(library: Library) -> None:
    library.create("a")
    assert library("set_rq", "a", "new") == b"record of a"
    assert library.hash("labelgrid:job:a")["rq"] == "new"
    assert library("set_rq", "nobody", "new") is None
    assert "labelgrid:job:nobody" not in library.names()


def test_read_gives_a_count_of_verdicts_until_there_is_a_result_and_then_the_best_repeat(library: Library) -> None:
    library.create("a", 4)
    entries = library.claim(4)
    library.commit({"a0": entries.pop("a0")})
    fields, count, verdicts = library("read", "a")[0]
    assert (fields[fields.index(b"status") + 1], count, verdicts) == (b"queued", 1, [])
    library.commit(entries)
    library.finish("a")
    (_, count, verdicts), nobody = library("read", "a", "nobody")
    assert (count, verdicts) == (0, [b"verdict 2", b"verdict 3"])  # RESULT has two repeats
    assert nobody == [[], 0, []]


# --- queue and workers ---


def test_owners_take_turns_from_one_claim_to_the_next_and_are_then_forgotten(library: Library) -> None:
    library.create("a", 3, "ann")
    library.create("b", 2, "bob")
    library.create("c", 1, "ann")
    claimed = [list(library.claim(1)) for _ in range(6)]
    assert claimed == [["a0"], ["b0"], ["c0"], ["b1"], ["a1"], ["a2"]]
    assert library.claim(1) == {}
    assert {key for key in library.names() if key.startswith(("labelgrid:turns:", "labelgrid:waiting:"))} == set()


def test_claim_goes_on_after_redis_was_emptied(library: Library) -> None:
    library("open_stream", DIGEST)
    library("open_stream", DIGEST)
    library.connection.flushall()
    library.create("a")
    assert list(library.claim(9)) == ["a0", "a1"]


def test_claim_gives_the_time_in_a_jobs_id(library: Library) -> None:
    dated = f"{1764355000125:012x}7" + "0" * 19
    library.create(dated, 1)
    library.create("undated-job-id", 1)
    assert [fields[2:] for _, fields in library("claim", DIGEST, "w", 9)] == [
        [b"asked_at", b"1764355000.125"],
        [b"asked_at", b""],
    ]


def test_discard_deletes_entries(library: Library) -> None:
    library.create("a")
    entries = library.claim(2)
    assert library("discard", DIGEST, entries["a0"]) is None
    assert [entry.decode() for entry, _ in library.connection.xrange(STREAM)] == [entries["a1"]]
    assert library.connection.xpending(STREAM, "workers")["pending"] == 1


def test_idle_consumers_without_pictures_are_dropped(library: Library) -> None:
    library("drop_consumers", DIGEST, 0)  # there is no stream
    library.create("a", 1)
    library.claim(1, "busy")
    for idle in ("first", "second"):
        library.connection.xgroup_createconsumer(STREAM, "workers", idle)
    library("drop_consumers", DIGEST, 60_000)
    assert library.connection.xinfo_groups(STREAM)[0]["consumers"] == 3
    while library.connection.xinfo_consumers(STREAM, "workers")[-1]["idle"] == 0:
        pass  # for a millisecond
    library("drop_consumers", DIGEST, 0)
    assert [one["name"] for one in library.connection.xinfo_consumers(STREAM, "workers")] == [b"busy"]


def test_recount_removes_jobs_that_are_gone(library: Library) -> None:
    library.create("a", 3, "ann")
    library.create("b", 2, "ann")
    library.create("c", 1, "bob")
    library.connection.delete("labelgrid:job:a", "labelgrid:job:c")
    library("recount", DIGEST)
    assert library.hash(f"labelgrid:waiting:{DIGEST}") == {"ann": "2"}
    assert library.connection.lrange(f"labelgrid:turns:{DIGEST}:ann", 0, -1) == [b"b"]
    assert list(library.claim(9)) == ["b0", "b1"]


def test_only_workers_whose_announcement_has_not_expired_live(library: Library) -> None:
    library("announce", "gone", "{}", 1)
    library("announce", "here", '{"host": "h"}', 60_000)
    while library.connection.exists("labelgrid:worker:gone"):
        pass  # for a millisecond
    assert library("live_workers") == [b'{"host": "h"}']


# --- a Redis that is full or read-only ---


def a_job_is_complete(library: Library) -> None:
    library.create("a")
    library.commit(library.claim(2))


CALLS: dict[str, Callable[[Library], Any]] = {
    "create": lambda library: library.create("b"),
    "set_rq": lambda library: library("set_rq", "a", "new"),
    "begin": lambda library: library("begin", 5.5, "a", 0),
    "commit": lambda library: library.commit({"a0": "1-1"}),
    "finish": lambda library: library.finish("a"),
    "end_early": lambda library: library("end_early", ENDING, "a", "failed", "error", "why"),
    "delete": lambda library: library("delete", "a"),
    "read": lambda library: library("read", "a"),
    "open_stream": lambda library: library("open_stream", "e" * 64),
    "claim": lambda library: library.claim(1),
    "discard": lambda library: library("discard", DIGEST, "1-1"),
    "drop_consumers": lambda library: library("drop_consumers", DIGEST, 0),
    "recount": lambda library: library("recount", DIGEST),
    "announce": lambda library: library("announce", "w", "{}", 1000),
    "live_workers": lambda library: library("live_workers"),
    "due_webhooks": lambda library: library("due_webhooks"),
    "take_webhook": lambda library: library("take_webhook", "a running", 60),
    "end_webhook": lambda library: library("end_webhook", "a running", 1, -1),
}
FOR_ROOM = {"create", "set_rq"}  # they wait until there is memory
READING = {"read", "live_workers", "due_webhooks"}


def test_every_function_is_called_here(library: Library) -> None:
    (found,) = library.connection.function_list("labelgrid")
    functions = found[found.index(b"functions") + 1]
    assert {one[one.index(b"name") + 1].decode().removeprefix("labelgrid_development_") for one in functions} == set(
        CALLS
    )


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
    library.create("a", 1)
    library.create("b", 1)
    entries = library.claim(2)
    library.connection.set("labelgrid:job:b:verdicts", "no hash")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        library.commit(entries)
    assert library.connection.xpending(STREAM, "workers")["pending"] == 2
