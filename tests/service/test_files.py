"""Files of pictures in a folder, on an object store in memory, and on a real S3 server; and calls that hang."""

import asyncio
import stat
import threading
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest

from service.contract.records import hour_of, new_job_id
from service.files import GRID, PictureFiles, Stalled, StorageThreads, picture_name, trajectory_name
from shared import storage
from shared.storage import Location, open_storage
from tests.s3 import BUCKET

HOUR_S, DAY_S = 3600, 86400
NOW = 1767268800.0  # on the hour


@pytest.fixture(params=["folder", "memory", "s3"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> PictureFiles:
    if request.param == "s3":
        request.getfixturevalue("s3_server")
    name = f"{uuid4().hex}/pictures"
    roots: dict[str, str | Path] = {"folder": tmp_path / "pictures", "memory": f"memory://{name}"}
    return PictureFiles(open_storage(roots.get(request.param, f"s3://{BUCKET}/{name}")))


def add(files: PictureFiles, age_s: float) -> str:
    job_id = new_job_id(NOW - age_s)
    for name in (picture_name(0), trajectory_name(0), GRID):
        files.write(job_id, name, f"{name} of {job_id}".encode())
    return job_id


def is_there(files: PictureFiles, job_id: str) -> bool:
    try:
        return files.read(job_id, "0.png") == f"0.png of {job_id}".encode()
    except FileNotFoundError:
        return False


def test_files_are_read_as_written_and_the_last_write_counts(files: PictureFiles) -> None:
    one, other = add(files, 0), add(files, 0)
    files.write(one, "grid.png", b"again")  # as a second worker does
    assert files.read(one, "grid.png") == b"again"
    assert files.read(other, "trajectory-0.png") == f"trajectory-0.png of {other}".encode()
    for job_id, name in ((one, "1.png"), (new_job_id(NOW), "0.png")):
        with pytest.raises(FileNotFoundError):
            files.read(job_id, name)


def test_a_removed_job_is_gone_and_the_others_stay(files: PictureFiles) -> None:
    one, other = add(files, 0), add(files, 0)
    for _ in range(2):
        files.remove(one)
        assert [is_there(files, job_id) for job_id in (one, other)] == [False, True]


def test_old_hours_are_removed_and_newer_ones_stay(files: PictureFiles) -> None:
    assert files.remove_older(NOW) == 0  # there is nothing at all
    ages_s = (0, 2 * DAY_S - 1, 2 * DAY_S, 2 * DAY_S + 3 * HOUR_S + 1, 9 * DAY_S)
    ids = [add(files, age_s) for age_s in ages_s]
    assert files.remove_older(NOW - 2 * DAY_S) == 2  # hours
    assert [is_there(files, job_id) for job_id in ids] == [True, True, True, False, False]


def test_files_that_are_not_of_a_job_stay(files: PictureFiles) -> None:
    mine = add(files, 9 * DAY_S)
    hour = hour_of(mine)
    names = ["README", "backup/a.txt", f"{hour}.old/a.txt", f"backup/{hour}/a.txt", f"x{hour}/a.txt"]
    for name in names:
        storage.write(files.root / name, b"x")
    assert files.remove_older(NOW) == 1
    assert not is_there(files, mine)
    assert all(storage.read(files.root / name) for name in names)


def test_other_users_of_the_machine_see_nothing(tmp_path: Path) -> None:
    add(PictureFiles(tmp_path / "data" / "pictures"), 0)
    assert stat.S_IMODE((tmp_path / "data" / "pictures").stat().st_mode) == 0o700


def test_of_a_link_to_an_old_hour_only_the_link_is_removed(tmp_path: Path) -> None:
    """Somebody may have moved it to another disk; the other hours must still be removed."""
    files = PictureFiles(tmp_path / "pictures")
    old = [add(files, age_s) for age_s in (9 * DAY_S, 8 * DAY_S)]
    hour = files.root / hour_of(old[0])
    (files.root / hour).rename(tmp_path / "moved")
    hour.symlink_to(tmp_path / "moved")
    assert files.remove_older(NOW) == 2
    assert list(files.root.iterdir()) == []
    assert (tmp_path / "moved" / old[0] / "0.png").exists()


@pytest.mark.parametrize("refused", [0, 1])
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(40, "Too many levels of links")])
def test_an_hour_that_cannot_be_removed_keeps_no_other(
    files: PictureFiles, monkeypatch: pytest.MonkeyPatch, refused: int, error: OSError
) -> None:
    """As after a backup was restored by another user."""
    old, remove = [add(files, age_s) for age_s in (9 * DAY_S, 8 * DAY_S)], storage.remove_folder

    def refuse(folder: Location) -> None:
        if folder.name == hour_of(old[refused]):
            raise error
        remove(folder)

    monkeypatch.setattr(storage, "remove_folder", refuse)
    assert files.remove_older(NOW) == 1
    assert [is_there(files, job_id) for job_id in old] == [refused == 0, refused == 1]


def test_a_call_returns_or_raises_what_it_does() -> None:
    threads = StorageThreads(2)
    with pytest.raises(ZeroDivisionError):
        threads.submit(lambda: 1 // 0).result()
    assert asyncio.run(threads.one(lambda: 7, 60)) == 7


def test_calls_behind_one_that_hangs_are_given_up() -> None:
    threads, hang, begun = StorageThreads(1), threading.Event(), threading.Event()
    calls = list[int]()

    def hanging() -> None:
        begun.set()
        hang.wait()

    late = threads.submit(hanging)
    begun.wait()
    with pytest.raises(Stalled, match=r"within 0\.01 s"):
        asyncio.run(threads.one(partial(calls.append, 1), 0.01))
    hang.set()
    late.result()
    threads.submit(lambda: None).result()
    asyncio.run(threads.one(partial(calls.append, 3), 60))
    assert calls == [3]


def test_the_event_loop_goes_on_while_a_call_hangs() -> None:
    threads, hang = StorageThreads(1), threading.Event()

    async def work() -> str:
        other = asyncio.create_task(asyncio.sleep(0, "done"))
        with pytest.raises(Stalled):
            await threads.one(hang.wait, 0.01)
        with pytest.raises(Stalled):  # the only thread is taken
            await threads.one(lambda: None, 0.01)
        return await other

    assert asyncio.run(work()) == "done"
    hang.set()
