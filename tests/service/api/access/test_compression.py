"""The large answers in JSON are compressed for clients that take it, and nothing else is."""

import httpx
import pytest

from service.store.jobs import JobStore
from tests.service.api.answers import LISTS
from tests.service.api.routes.test_jobs import finished


@pytest.mark.parametrize("path", ["/models", "/openapi.json"])
def test_a_large_answer_is_compressed_for_those_who_take_it(client: httpx.Client, path: str) -> None:
    packed, plain = (client.get(path, headers={"accept-encoding": name}) for name in ("gzip", "identity"))
    assert (packed.headers["content-encoding"], plain.headers.get("content-encoding")) == ("gzip", None)
    assert int(packed.headers["content-length"]) < len(plain.content) / 2
    assert packed.content == plain.content
    assert {one.headers["vary"] for one in (packed, plain)} == {"Accept-Encoding"}


def test_jobs_pictures_and_streams_are_not_compressed(client: httpx.Client, alive: JobStore) -> None:
    job_id, _ = finished(alive, 20)
    wanted = {"prefer": "respond-async", "accept-encoding": "gzip"}
    answers = [client.get(f"/jobs/{job_id}{path}") for path in ("", "/images/0.png", "/pictures.zip", "/events")]
    answers.append(client.post("/generate", json={"labels": LISTS * 20}, headers=wanted))
    assert [answer.status_code for answer in answers] == [200] * 4 + [202]
    assert not any("content-encoding" in answer.headers for answer in answers)
