"""The client's edits: of a job's picture, and of a PNG; and the words of the command line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from typer.testing import CliRunner

from service.client import Client, ClientError
from service.client.__main__ import app
from service.client.edits import read_edit
from service.settings import Settings
from service.store import keys
from service.store.jobs import JobStore
from tests.conftest import running, serving

EDITS: list[dict[str, Any]] = [
    {"add": {"label": "green cube", "x": 0.25, "y": 0.75}},
    {"recolour": {"label": "red cube", "to": "cyan cube"}},
]
WORDS = ["add green cube at 0.25 0.75", "recolour red cube to cyan cube"]


@pytest.fixture
def client(placed: Settings, connection: Redis, alive: JobStore) -> Iterator[Client]:
    with serving(placed) as http, running(connection, placed), Client(str(http.base_url)) as client:
        yield client


def test_a_jobs_picture_and_a_png_are_edited_alike(client: Client, alive: JobStore, tmp_path: Path) -> None:
    job = client.generate([["red cube", "blue sphere"]], model="placed", seed=7, steps=2)
    edited = client.edit(job.id, 0, EDITS, deadline_s=60)
    assert json.loads(str(alive.connection.hget(keys.job(edited.id), "record")))["deadline_s"] == 60
    assert edited.result is not None
    assert edited.result.pictures[0].labels == ["cyan cube", "blue sphere", "green cube"]
    wanted, before = client.image(edited.id, 0), client.image(job.id, 0)
    assert client.image(client.generate(recipe=before, edits=EDITS).id, 0) == wanted

    (tmp_path / "before.png").write_bytes(before)
    url = ["--url", str(client._client._http.base_url)]
    for source in (job.id, str(tmp_path / "before.png")):
        options = ["-o", str(tmp_path / "after.png"), "--deadline-s", "60", *url]
        done = CliRunner().invoke(app, ["edit", source, *WORDS, *options])
        assert (done.exit_code, done.stderr) == (0, "")
        assert (tmp_path / "after.png").read_bytes() == wanted
    done = CliRunner().invoke(app, ["edit", job.id, "remove gray cube", *url])
    assert (done.exit_code, done.stderr) == (
        1,
        'labelgrid: edits.0: no object is "gray cube": there are red cube, blue sphere\n',
    )


@pytest.mark.parametrize(
    ("words", "edit"),
    [
        *zip(WORDS, EDITS, strict=True),
        ("recolor  red cube to blue to red", {"recolour": {"label": "red cube", "to": "blue to red"}}),
        ("move cat at home to .5, 1", {"move": {"label": "cat at home", "x": 0.5, "y": 1.0}}),
        ("remove red cube", {"remove": {"label": "red cube"}}),
    ],
)
def test_edits_in_words(words: str, edit: dict[str, Any]) -> None:
    assert read_edit(words) == edit


@pytest.mark.parametrize("words", ["", "remove", "add red cube", "move red cube to the left", "paint red cube blue"])
def test_other_words_are_refused_with_those_that_are_known(words: str) -> None:
    with pytest.raises(ClientError, match='is no edit: give "add LABEL at X Y"'):
        read_edit(words)
