"""Remote storage, in memory and on a real S3 server: checkpoints, the API's catalogue, workers and the trainer."""

import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from redis import Redis

from service.contract.errors import BadRequest, NoModel
from service.settings import Settings
from service.store.jobs import JobStore
from service.worker.checkpoint_cache import CheckpointCache
from service.worker.runner import Runner
from shared import storage as files
from shared.checkpoint import CheckpointError, load, publish, read_info, verify
from shared.registry import promote, promoted, scan
from shared.storage import Location, open_storage
from tests.conftest import serving
from tests.s3 import BUCKET
from tests.service.api.fresh import Fresh
from tests.service.store.helpers import add_job, record
from tests.service.worker.conftest import pngs, run
from tests.service.worker.test_checkpoint_cache import fetch
from tests.toy_checkpoint import publish_toy_adapter, publish_toy_denoiser, publish_toys

LISTS = [["red cube", "blue sphere"], ["gray cylinder"]]
ON_S3 = pytest.mark.parametrize("address", ["s3"], indirect=True)  # alone: where both would run the same code


@pytest.fixture(params=["memory", "s3"])
def address(request: pytest.FixtureRequest) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3_server")
        return f"s3://{BUCKET}/{uuid4().hex}/models"
    return f"memory://{uuid4().hex}/models"


@pytest.fixture
def remote(address: str) -> Location:
    return open_storage(address)


@pytest.fixture
def filled(remote: Location) -> Location:
    publish_toys(remote)
    return remote


def at_address(settings: Settings, storage: Location, cache: Path) -> Settings:
    return settings.model_copy(update={"storage": storage, "cache": cache})


def test_a_remote_checkpoint_equals_a_local_one(remote: Location, tmp_path: Path) -> None:
    assert (scan(remote).found, scan(remote).problems) == ({}, {})
    infos = [publish_toy_denoiser(storage, "a", 1) for storage in (remote, tmp_path)]
    assert infos[0].model_copy(update={"created_at": infos[1].created_at}) == infos[1]
    found, tensors = load(remote / "a.safetensors")
    assert found == infos[0] == verify(remote / "a.safetensors")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load(tmp_path / "a.safetensors")[1].items())
    files.write(remote / "b.safetensors", b"junk")
    assert (scan(remote).infos, scan(remote).problems) == ([found], {"b.safetensors": "not a safetensors file"})
    assert files.versions(remote).keys() == {"a.safetensors", "b.safetensors"}


def test_a_part_of_a_remote_file_is_that_part(remote: Location) -> None:
    content = bytes(range(100))
    files.write(remote / "file", content)
    for start, end in ((0, None), (0, 10), (0, 1000), (7, 20), (90, None), (90, 1000)):
        assert files.read(remote / "file", start, end) == content[start:end]


def test_reading_a_header_fetches_little_more(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs.core import S3File

    remote = open_storage(f"s3://{BUCKET}/{uuid4().hex}")
    tensors = {"weight": torch.zeros(1 << 20)}
    path = publish(remote, "large", tensors, kind="denoiser", vocabulary=("a",), config={}, training={})
    fetched: list[int] = []
    fetch = S3File._fetch_range

    def recording(self: Any, start: int, end: int) -> bytes:
        content: bytes = fetch(self, start, end)
        fetched.append(len(content))
        return content

    monkeypatch.setattr(S3File, "_fetch_range", recording)
    assert read_info(path).name == "large"
    assert 0 < sum(fetched) <= 2 * files.HEADER_BLOCK
    Fresh(remote)()
    assert sum(fetched) <= 4 * files.HEADER_BLOCK
    verify(path)
    assert sum(fetched) > 4 << 20


def test_the_catalogue_notices_remote_changes(filled: Location) -> None:
    models = Fresh(filled)
    good = models.find(None)
    assert (good.name, models.find("other").name) == ("toy", "other")
    promote(filled, "other")
    assert models.find(None).name == "other"
    files.write(filled / "toy.safetensors", b"junk")
    with pytest.raises(BadRequest, match="not a safetensors file"):
        models.find("toy")
    assert models().registry.problems == {"toy.safetensors": "not a safetensors file"}
    changed = publish_toy_denoiser(filled, "toy", 5)
    files.write(filled / "toy.md", b"# toy")
    assert models.find("toy") == changed != good
    assert models().cards["toy"] == "# toy"
    assert not isinstance(filled, Path)
    filled.fs.rm(str((filled / "toy.safetensors").path))
    with pytest.raises(BadRequest, match="no such denoiser"):
        models.find("toy")


def test_the_catalogue_serves_while_storage_is_away(filled: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    models = Fresh(filled)
    good = models.find(None)
    assert not isinstance(filled, Path)

    class DriverError(Exception):
        """Like botocore's errors, not an OSError."""

    def fail(*_: object, **__: object) -> None:
        raise DriverError("the network is down")

    with monkeypatch.context() as patch:
        for name in ("ls", "cat_file", "open", "exists", "info"):
            patch.setattr(filled.fs, name, fail)
        assert models.find(None) == good
        problems = models().registry.problems
        assert "cannot be read: DriverError: the network is down" in problems["promoted.json"]
        with pytest.raises(NoModel, match="the network is down"):
            Fresh(filled).find(None)
        with pytest.raises(CheckpointError, match=r"toy\.safetensors: cannot be read: DriverError"):
            load(filled / "toy.safetensors")
    assert models().registry.problems == {}


@ON_S3
def test_a_remote_adapter_is_fetched_with_its_base(filled: Location, tmp_path: Path) -> None:
    from shared.diffusion.model import load_denoiser

    base = read_info(filled / "toy.safetensors")
    publish_toy_adapter(filled, "fast", base)
    cache = CheckpointCache(tmp_path / "cache", filled, 1 << 30)
    kept = fetch(cache, "fast")
    assert isinstance(kept, Path)
    assert {path.name for path in kept.parent.iterdir()} == {"fast.safetensors", "toy.safetensors"}
    for path in (kept, filled / "fast.safetensors"):  # the trainer reads storage itself
        change = (
            load_denoiser(path).network.state_dict()["head.bias"] - load_denoiser(fetch(cache, "toy")).network.head.bias
        )
        torch.testing.assert_close(change, torch.full_like(change, 0.2))


@ON_S3
def test_remote_and_local_storage_give_equal_pictures(
    filled: Location, settings: Settings, connection: Redis, tmp_path: Path
) -> None:
    drawn = []
    publish_toys(tmp_path / "local")
    for storage in (filled, tmp_path / "local"):
        own = at_address(settings, storage, tmp_path / "cache")
        with serving(own) as client:
            assert client.get("/models").json()["problems"] == {}
            digest = next(m["digest"] for m in client.get("/models").json()["models"] if m["promoted"])
        store = JobStore(connection, own)
        add_job(store, job := record(digest=digest, labels=LISTS, columns=2))
        run(Runner(connection, own, "w"), job.id)
        drawn.append(pngs(store, job.id, range(2)))
    assert drawn[0] == drawn[1]


@ON_S3
def test_the_trainer_promotes_and_scores_remotely(
    filled: Location,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from trainer import __main__ as cli

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trainer", *map(str, arguments)])
        return cli.main(), *capsys.readouterr()

    code, _, err = command("promote", "other", "--storage", address)
    assert code == 0, err
    assert promoted(filled) == "other"
    (tmp_path / "few.json").write_text('[["red cube"], ["gray cylinder"]]')
    code, out, err = command("score", tmp_path / "few.json", "--storage", address, "--steps", 1)
    assert code == 0, err
    assert "few.json, other" in out
    code, _, err = command("promote", "nobody", "--storage", address)
    assert (code, "no such checkpoint" in err) == (1, True)
    code, _, err = command("promote", "other", "--storage", "quux://x")
    assert (code, "Unsupported filesystem" in err, err.count("\n")) == (1, True, 1)
