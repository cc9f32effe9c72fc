"""A worker's writes: a job is kept whole, and loses nothing if storage fails, hangs or comes back."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from service.contract.job_ids import new_job_id
from service.contract.kept import KeptJob
from service.results.writer import Finished, ResultWriter, StorageAway
from service.store import keys
from service.store.claims import Claim
from service.store.jobs import JobStore
from service.worker.completion import complete_jobs
from tests.service.api.uploads.zips import png
from tests.service.results.helpers import finish, noise
from tests.service.store.helpers import RESULT, done, record

RECENT_S = 60  # as in `jobs.lua`


@pytest.fixture
def writer(tmp_path: Path) -> ResultWriter:
    return ResultWriter(tmp_path, 60)


def job(n: int = 1, owner: str = "alice", **more: Any) -> Any:
    return record(n, owner, **more).model_copy(update={"id": new_job_id(1767268800.0)})


def break_writes(writer: ResultWriter, monkeypatch: pytest.MonkeyPatch, only: Callable[[str], bool]) -> None:
    write = writer.files.write

    def fail(owner: str, job_id: str, name: str, content: bytes) -> None:
        if only(name):
            raise OSError("no space left")
        write(owner, job_id, name, content)

    monkeypatch.setattr(writer.files, "write", fail)


def test_a_kept_job_leaves_no_picture_in_redis(store: JobStore, writer: ResultWriter, connection: Redis) -> None:
    one = job(3)
    pngs = [png(seed) for seed in range(3)]
    finish(store, writer, one, pngs)
    assert store.statuses([one.id]) == {one.id: "finished"}
    assert not connection.exists(keys.png(one.id))
    assert 0 < connection.ttl(keys.verdicts(one.id)) <= RECENT_S
    assert connection.ttl(keys.job(one.id)) > RECENT_S
    assert writer.read_pictures("alice", one.id, [2, 0, 1]) == [pngs[2], pngs[0], pngs[1]]
    kept = writer.files.read_job("alice", one.id)
    assert kept is not None
    assert kept.record == one
    assert [verdict.index for verdict in kept.verdicts] == [0, 1, 2]
    assert connection.hget(keys.job(one.id), "result") == kept.result.write().encode()
    assert float(connection.hget(keys.job(one.id), "finished_at") or 0) == kept.finished_at
    names = {path.name for path in writer.files.job("alice", one.id).iterdir()}
    assert names == {"0.png", "1.png", "2.png", "grid.png", "job.json"}


def test_a_picture_of_a_job_that_is_gone_is_not_kept(writer: ResultWriter) -> None:
    one, gone = job(), job()
    made = [done(Claim("1-1", next(each.pictures()), 0.0))[1] for each in (one, gone)]
    assert writer.keep_pictures(made, {one.id: "alice"}) == {(one.id, 0)}


def test_a_kept_job_counts_for_its_owner_like_one_in_redis(
    store: JobStore, writer: ResultWriter, connection: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    for broken in (False, True):
        if broken:
            break_writes(writer, monkeypatch, lambda name: True)
        one = job(2)
        finish(store, writer, one, [png(0), png(1)])
        assert bool(connection.exists(keys.png(one.id))) == broken
        counted = int(connection.hget(keys.job(one.id), "bytes") or 0)
        sizes.append(counted - len(one.write()))  # a time has more digits or fewer
    assert sizes[0] == sizes[1] > len(png(0)) + len(png(1))


def test_a_jobs_verdicts_stay_while_a_webhook_may_need_them(
    store: JobStore, writer: ResultWriter, connection: Redis
) -> None:
    one = job().model_copy(update={"webhook": "https://example.org", "webhook_events": ("finished",)})
    finish(store, writer, one, [noise(0, 100)])
    assert connection.ttl(keys.verdicts(one.id)) > RECENT_S


@pytest.mark.parametrize("broken", [r"0.png", "job.json"])
def test_what_storage_does_not_take_stays_in_redis(
    store: JobStore, writer: ResultWriter, connection: Redis, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    break_writes(writer, monkeypatch, lambda name: name == broken)
    one = job(2)
    finish(store, writer, one, [png(0), png(1)])
    assert store.statuses([one.id]) == {one.id: "finished"}
    assert connection.hexists(keys.png(one.id), keys.GRID)
    assert connection.hexists(keys.png(one.id), "0") == (broken == "0.png")
    assert writer.files.read_job("alice", one.id) is None
    assert connection.ttl(keys.verdicts(one.id)) > RECENT_S


def test_what_storage_does_not_take_of_one_owner_keeps_nothing_of_others_out_of_it(
    writer: ResultWriter, tmp_path: Path
) -> None:
    """As where an owner's folder was restored by another user."""
    writer.files.owner("alice").write_text("a file where the folder should be")
    jobs = [job(owner=owner) for owner in ("alice", "bob")]
    made = [done(Claim("1-1", next(each.pictures()), 0.0))[1] for each in jobs]
    assert writer.keep_pictures(made, {each.id: each.owner for each in jobs}) == {(jobs[1].id, 0)}
    finished = [
        Finished(KeptJob(record=each, started_at=None, finished_at=1.0, result=RESULT, verdicts=()), {"grid.png": b"x"})
        for each in jobs
    ]
    assert writer.keep_jobs(finished) == {jobs[1].id}
    assert writer.files.read_job("bob", jobs[1].id) == finished[1].job


def test_pictures_that_storage_missed_are_written_at_the_end(
    store: JobStore, writer: ResultWriter, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = job(1)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "keep_pictures", lambda *_: set())
        finish(store, writer, one, [noise(0, 100)])
    assert writer.read_pictures("alice", one.id, [0]) == [noise(0, 100)]
    assert not connection.exists(keys.png(one.id))


def test_storage_that_hangs_holds_nobody_up_and_its_job_finishes_in_redis(
    store: JobStore, writer: ResultWriter, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang, begun = threading.Event(), threading.Event()

    def write(*_: object) -> None:
        begun.set()
        hang.wait()

    monkeypatch.setattr(writer.files, "write", write)
    one, other = job(), job(2)
    with monkeypatch.context() as patch:
        patch.setattr("service.storage_threads.wait", lambda futures, within_s: begun.wait())
        finish(store, writer, one, [png(0)])
    writer.patience_s = 10**6  # for the second job nobody waits
    finish(store, writer, other, [png(0), png(1)])
    hang.set()
    assert store.statuses([one.id, other.id]) == {one.id: "finished", other.id: "finished"}
    for each in one, other:
        assert store.pngs(each.id, range(each.total)) == [png(i) for i in range(each.total)]
        assert writer.files.read_job("alice", each.id) is None


def test_a_job_whose_pictures_cannot_be_read_for_its_grid_stays_open_until_they_can(
    store: JobStore, writer: ResultWriter, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = job(2)

    def away(*_: object) -> list[bytes]:
        raise StorageAway("it does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "read_pictures", away)
        finish(store, writer, one, [png(0), png(1)])
    assert store.statuses([one.id]) == {one.id: "running"}
    complete_jobs(store, None, [one.id], {}, writer)
    assert store.statuses([one.id]) == {one.id: "finished"}
    assert writer.files.read_job("alice", one.id) is not None


def test_a_job_that_is_cancelled_while_it_is_written_is_not_kept(
    store: JobStore, writer: ResultWriter, connection: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, keep = job(), writer.keep_jobs

    def cancelled(*args: Any) -> set[str]:
        store.cancel(one.id)
        return keep(*args)

    monkeypatch.setattr(writer, "keep_jobs", cancelled)
    finish(store, writer, one, [noise(0, 100)])
    assert store.statuses([one.id]) == {one.id: "cancelled"}
    assert writer.files.read_job("alice", one.id) is None
