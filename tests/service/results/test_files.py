"""What lies where in storage, in a folder and on an object store."""

import stat
from pathlib import Path
from uuid import uuid4

import pytest

from service.contract.job_ids import new_job_id
from service.contract.kept import KeptJob
from service.results.files import ResultFiles
from tests.service.store.helpers import RESULT, record

NOON = 1767268800.0


def kept(owner: str, job_id: str) -> KeptJob:
    job = record(1, owner).model_copy(update={"id": job_id})
    return KeptJob(record=job, started_at=None, finished_at=NOON, result=RESULT, verdicts=())


def test_files_are_read_as_written_by_their_owner_alone(files: ResultFiles) -> None:
    job_id = new_job_id(NOON)
    files.write("alice", job_id, "0.png", b"picture")
    files.write_job(kept("alice", job_id))
    assert files.read("alice", job_id, "0.png") == b"picture"
    assert files.read_job("alice", job_id) == kept("alice", job_id).model_copy(
        update={"record": files.read_job("alice", job_id).record}  # type: ignore[union-attr]
    )
    assert files.read("bob", job_id, "0.png") is None
    assert files.read_job("bob", job_id) is None
    assert files.read("alice", job_id, "1.png") is None
    assert files.read("alice", new_job_id(NOON), "0.png") is None


def test_other_users_of_the_machine_see_nothing(tmp_path: Path) -> None:
    ResultFiles(tmp_path / "results").write("alice", new_job_id(NOON), "0.png", b"picture")
    (owner,) = (tmp_path / "results").iterdir()
    assert stat.S_IMODE(owner.stat().st_mode) == 0o700


@pytest.mark.parametrize("job_id", ["..", "../../secret", "", "." * 32, "A" * 32, "\n" * 32, "0" * 31])
def test_no_id_leads_out_of_its_owners_folder(files: ResultFiles, job_id: str) -> None:
    assert files.read("alice", job_id, "0.png") is None
    files.remove_job("alice", job_id)


def test_jobs_are_listed_newest_first_from_any_of_them(files: ResultFiles) -> None:
    ids = [new_job_id(NOON + seconds) for seconds in (0, 1, 3600, 3601, 86400)]
    earlier = uuid4().hex  # of a release whose ids had no time
    for job_id in (earlier, *ids):
        files.write("alice", job_id, "0.png", b"")
    files.write("bob", new_job_id(NOON), "0.png", b"")
    newest_first = [*reversed(ids), earlier]
    assert list(files.job_ids("alice")) == newest_first
    for i, job_id in enumerate(newest_first):
        assert list(files.job_ids("alice", job_id)) == newest_first[i + 1 :]
    assert list(files.job_ids("nobody")) == []


def test_a_removed_job_is_gone_and_the_others_stay(files: ResultFiles) -> None:
    one, other = new_job_id(NOON), new_job_id(NOON)
    for job_id in (one, other):
        files.write("alice", job_id, "0.png", b"picture")
        files.write_job(kept("alice", job_id))
    for _ in range(2):
        files.remove_job("alice", one)
        assert list(files.job_ids("alice")) == [other]
        assert files.read_job("alice", one) is None
    assert files.read_job("alice", other) is not None


def test_a_record_of_another_version_is_no_job(files: ResultFiles) -> None:
    job_id = new_job_id(NOON)
    files.write("alice", job_id, "job.json", b'{"record": "of a later version"}')
    assert files.read_job("alice", job_id) is None
    raw = kept("alice", job_id).write().replace("{", '{"new": 1, ', 1)
    files.write("alice", job_id, "job.json", raw.encode())
    assert files.read_job("alice", job_id) is not None
