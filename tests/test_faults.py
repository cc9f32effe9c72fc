"""The fault checks find what they must, in an append-only file that a real Redis wrote."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from faults import checks, history, report
from faults.checks import Fetched
from service.contract.records import JobRecord
from service.local.redis_server import RedisServer
from service.settings import Settings
from service.store import keys
from service.store.claims import BegunClaim, Claim, PictureStream
from service.store.connection import connect
from service.store.jobs import JobStore
from tests.service.store.helpers import DIGEST, RESULT, add_job, done, record


def png(shade: int, *, compress_level: int = 1) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), shade).save(file, "PNG", compress_level=compress_level)
    return file.getvalue()


FIRST, SECOND, GRID, OTHER = map(png, range(4))
UNDISTURBED = Fetched([FIRST, SECOND], GRID)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer) -> Iterator[RedisServer]:
    """A Redis whose append-only file has nothing from other tests."""
    own = RedisServer(redis_server.folder / "faults")
    own.start()
    with connect(own.url) as connection:
        connection.config_set("appendfsync", "always")  # else a busy disk delays the file by up to 2 s
    yield own
    own.stop()


@pytest.fixture
def store(server: RedisServer, tmp_path: Path) -> Iterator[JobStore]:
    connection = connect(server.url)
    yield JobStore(connection, Settings(redis_url=server.url, pictures=tmp_path))
    connection.close()


def create(store: JobStore, pictures: int = 2) -> JobRecord:
    add_job(store, job := record(pictures))
    return job


def begin(store: JobStore, job: JobRecord) -> None:
    store.begin(stream(store), [Claim("1-1", job.id, 0)])


def commit(store: JobStore, job: JobRecord, *indices: int) -> list[BegunClaim]:
    """Store pictures; return the job's grid to compose if they were the last ones."""
    claims = [BegunClaim("1-1", job.id, index, record=job) for index in indices]
    complete, _ = store.commit(stream(store), [done(claim) for claim in claims], {})
    return complete


def finish(store: JobStore, complete: list[BegunClaim]) -> None:
    store.finish(stream(store), [(claim, RESULT) for claim in complete])


def stream(store: JobStore) -> PictureStream:
    return PictureStream(store.connection, store.settings, DIGEST, "w")


def problems(store: JobStore, server: RedisServer, job: JobRecord, fetched: Fetched = UNDISTURBED) -> str:
    found = history.read(server.folder)[job.id]
    return "; ".join(checks.check_states(found) + checks.check_pictures(found, 2, fetched, UNDISTURBED))


def good(store: JobStore) -> JobRecord:
    job = create(store)
    begin(store, job)
    finish(store, commit(store, job, 0, 1))
    return job


def test_a_correct_job_has_no_problems(store: JobStore, server: RedisServer) -> None:
    job = good(store)
    store.fail(job.id, "too late, so it changes nothing")
    assert problems(store, server, job) == ""


def test_a_job_that_ends_with_its_only_picture_has_no_problems(store: JobStore, server: RedisServer) -> None:
    job = create(store, pictures=1)
    begin(store, job)
    made = done(BegunClaim("1-1", job.id, 0, record=job), FIRST)
    store.commit(stream(store), [made], results={job.id: RESULT})
    found, alone = history.read(server.folder)[job.id], Fetched([FIRST], FIRST)
    assert checks.check_states(found) + checks.check_pictures(found, 1, alone, alone) == []


def test_a_short_lived_second_terminal_state_is_found(store: JobStore, server: RedisServer) -> None:
    job = good(store)
    store.connection.hset(keys.job(job.id), "status", "failed")
    store.connection.hset(keys.job(job.id), "status", "finished")
    found = problems(store, server, job)
    assert "its states were queued -> running -> finished -> failed -> finished" in found
    assert "its events announced running -> finished, its states were" in found


@pytest.mark.parametrize("state", ["running", "queued"])
def test_a_job_without_a_terminal_state_or_with_one_after_it_is_found(
    store: JobStore, server: RedisServer, state: str
) -> None:
    begun, back = create(store), good(store)
    begin(store, begun)
    store.connection.hset(keys.job(back.id), "status", state)
    assert "its states were queued -> running" in problems(store, server, begun)
    assert f"finished -> {state}" in problems(store, server, back)


def test_a_lost_picture_is_found(store: JobStore, server: RedisServer) -> None:
    job = create(store)
    begin(store, job)
    commit(store, job, 0)
    store.connection.hset(keys.job(job.id), "status", "finished")
    found = problems(store, server, job, Fetched(UNDISTURBED.pictures[:1], UNDISTURBED.grid))
    assert "its pictures were stored 1: 0 times" in found
    assert "its events announced pictures 1: 0 times" in found
    assert "differ from an undisturbed run" in found


def test_a_picture_stored_twice_and_a_deleted_record_are_found(store: JobStore, server: RedisServer) -> None:
    job = good(store)
    store.connection.hset(keys.verdicts(job.id), "1", b"another")
    store.connection.hset(keys.verdicts(job.id), "2", b"not requested")
    store.connection.delete(keys.job(job.id))
    found = problems(store, server, job)
    assert "its pictures were stored 1: 2 times, 2: 1 times" in found
    assert "its record was deleted" in found


def test_a_picture_announced_twice_or_after_the_end_is_found(store: JobStore, server: RedisServer) -> None:
    job = good(store)
    store.connection.xadd(keys.events(job.id), {"picture": 1})
    found = problems(store, server, job)
    assert "its events announced pictures 1: 2 times" in found
    assert "its last event was 'picture 1'" in found


@pytest.mark.parametrize(
    ("fetched", "problem"),
    [
        (Fetched([FIRST, OTHER], GRID), "its pictures [1] differ from an undisturbed run"),
        (Fetched([FIRST, SECOND], b""), "its grid differs from an undisturbed run"),
        (Fetched([FIRST, png(1, compress_level=0)], GRID), ""),  # another release may compress otherwise
    ],
)
def test_different_pictures_are_found(store: JobStore, server: RedisServer, fetched: Fetched, problem: str) -> None:
    assert problems(store, server, good(store), fetched) == problem


def test_a_truncated_log_is_read_up_to_its_last_command() -> None:
    log = b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$1\r\nb\r\n"
    assert list(history.commands(log)) == [[b"SET", b"a", b"b"]]
    for length in range(len(log)):
        assert list(history.commands(log[:length])) == []
    with pytest.raises(ValueError, match="byte 0"):
        list(history.commands(b"SET a b\r\n"))


def test_a_truncated_transaction_does_not_count() -> None:
    """As Redis undoes it. It goes on in the same file, and selects its database first."""

    def written(*names: str) -> bytes:
        return b"".join(b"*1\r\n$%d\r\n%s\r\n" % (len(name), name.encode()) for name in names)

    log = written("SELECT", "MULTI", "A", "EXEC", "B", "MULTI", "C", "SELECT", "MULTI", "D", "EXEC", "MULTI", "E")
    assert list(history.applied(log)) == [[b"A"], [b"B"], [b"D"]]


def test_the_committed_document_is_written_from_the_committed_results() -> None:
    assert report.DOCUMENT.read_text() == report.document(report.read()), "run `python -m faults.report`"
    assert report.SERIES.read_text() == report.series(json.loads(report.SOAK.read_text()))
