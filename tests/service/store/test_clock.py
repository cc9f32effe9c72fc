"""Redis's clock dates jobs and their files: those of API, webhooks and commands may be wrong."""

import time

import httpx
import pytest

from service.contract.records import created_at
from service.files import PictureFiles
from service.settings import Settings
from service.store.jobs import JobStore
from tests.service.api.answers import problem, submitted

WRONG_S = 40 * 24 * 3600


@pytest.mark.parametrize("wrong_s", [-WRONG_S, WRONG_S])
def test_an_api_whose_clock_is_40_days_off_loses_no_job_and_no_picture(
    client: httpx.Client, alive: JobStore, settings: Settings, monkeypatch: pytest.MonkeyPatch, wrong_s: int
) -> None:
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + wrong_s)
    created = submitted(client)
    alive.cancel(created)
    retried = client.post(f"/jobs/{created}/retry", headers={"prefer": "respond-async"}).json()["id"]
    now = alive.connection.time()[0]
    files = PictureFiles(settings.pictures)
    for job_id in (created, retried):
        assert abs(created_at(job_id) - now) < 60
        files.write(job_id, "0.png", b"")
    files.remove_older(now - settings.keep_s)
    for job_id in (created, retried):
        assert files.read(job_id, "0.png") == b""
        alive.cancel(job_id)
        alive.delete(job_id)
        problem(client.get(f"/jobs/{job_id}"), 404, "unknown-job")  # not 410, which only age explains
