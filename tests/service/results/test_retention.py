"""Old results are removed by age, and the oldest of an owner beyond a size."""

from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from service.contract.job_ids import hour_of, new_job_id
from service.results.files import ResultFiles
from service.results.retention import prune
from shared import storage
from shared.storage import Location

DAY_S, HOUR_S = 86400, 3600
NOW = 1767268800.0  # on the hour


def add(files: ResultFiles, owner: str, age_s: float, size: int = 10) -> str:
    job_id = new_job_id(NOW - age_s)
    files.write(owner, job_id, "0.png", b"x" * (size - 1))
    files.write(owner, job_id, "job.json", b"x")
    return job_id


def left(files: ResultFiles, owner: str) -> set[str]:
    return set(files.job_ids(owner))


def test_what_is_older_than_so_many_days_is_removed(files: ResultFiles) -> None:
    young = add(files, "alice", 2 * DAY_S)
    add(files, "alice", 2 * DAY_S + 1)  # of the hour before
    add(files, "alice", 2 * DAY_S + 2)
    add(files, "bob", 9 * DAY_S)
    undated = uuid4().hex
    files.write("bob", undated, "0.png", b"")
    assert prune(files, 2, None, HOUR_S, NOW) == 2  # hours
    assert left(files, "alice") == {young}
    assert left(files, "bob") == {undated}
    assert prune(files, 2, None, HOUR_S, NOW) == 0


def test_an_owners_oldest_jobs_beyond_the_limit_are_removed(files: ResultFiles) -> None:
    ids = [add(files, "alice", age_s) for age_s in (5, 4, 3, 7200)]
    other = add(files, "bob", 9, size=25)
    assert prune(files, 30, 25, HOUR_S, NOW) == 2
    assert left(files, "alice") == {ids[1], ids[2]}
    assert left(files, "bob") == {other}
    assert prune(files, 30, 24, HOUR_S, NOW) == 1
    assert left(files, "bob") == set()


def test_the_limit_does_not_concern_a_job_that_may_still_be_open(files: ResultFiles) -> None:
    """Its grid needs its pictures, and others of its owner may have ended since it was created."""
    ids = [new_job_id(NOW - age_s) for age_s in (2 * HOUR_S, HOUR_S, 1)]
    for job_id in ids:
        files.write("alice", job_id, "0.png", b"x" * 100)
    finished = add(files, "alice", 0)
    assert prune(files, 30, 10, HOUR_S, NOW) == 1  # it failed, or was cancelled
    assert left(files, "alice") == {*ids[1:], finished}
    files.write("alice", ids[1], "job.json", b"")
    assert prune(files, 30, 10, HOUR_S, NOW) == 1
    assert left(files, "alice") == {ids[2], finished}


def test_of_a_link_to_old_results_only_the_link_is_removed(tmp_path: Path) -> None:
    """Somebody may have moved them to another disk; the other owners' results must still be removed."""
    files, moved = ResultFiles(tmp_path / "results"), tmp_path / "moved"
    for owner in ("alice", "bob"):
        add(files, owner, 9 * DAY_S)
    hour = tmp_path / "results" / files.owner("alice").name / hour_of(new_job_id(NOW - 9 * DAY_S))
    hour.rename(moved)
    hour.symlink_to(moved)
    assert prune(files, 2, None, HOUR_S, NOW) == 2
    assert left(files, "alice") == left(files, "bob") == set()
    assert len(list(moved.iterdir())) == 1


def test_nothing_is_removed_from_an_empty_storage(files: ResultFiles) -> None:
    assert prune(files, 1, 1, HOUR_S, NOW) == 0


def test_files_that_are_not_of_a_job_stay(files: ResultFiles) -> None:
    mine = add(files, "alice", 9 * DAY_S)
    owner = files.owner("alice")
    others = [owner / ".DS_Store", owner / ".trash" / "0.png", owner / "undated" / "notes" / "long" / "a.txt"]
    others += [owner / hour_of(new_job_id(NOW)) / "notes.txt", files.root / "README"]
    others += [files.root / "backup" / "2020-01-01T00" / "a.txt"]
    for path in others:
        storage.write(path, b"x" * 1000)
    assert prune(files, 30, 10, HOUR_S, NOW) == 0
    assert left(files, "alice") == {mine}
    assert prune(files, 2, 9, HOUR_S, NOW) == 1
    assert left(files, "alice") == set()
    assert all(storage.read(path) for path in others)


@pytest.mark.parametrize(("refused", "other"), [("alice", "bob"), ("bob", "alice")])
def test_an_owners_files_that_may_not_be_removed_keep_nobody_elses(
    refused: str, other: str, files: ResultFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a backup was restored by another user."""
    kept, _ = (add(files, owner, 9 * DAY_S) for owner in (refused, other))

    def remove_folder(folder: Location, remove: Callable[[Location], None] = storage.remove_folder) -> None:
        if folder.parent == files.owner(refused):
            raise PermissionError(13, "Permission denied", str(folder))
        remove(folder)

    monkeypatch.setattr(storage, "remove_folder", remove_folder)
    with pytest.raises(PermissionError):
        prune(files, 2, None, HOUR_S, NOW)
    assert left(files, refused) == {kept}
    assert left(files, other) == set()
