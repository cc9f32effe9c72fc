"""The models in storage, as the API sees them: they appear, change, break and go while it runs."""

import asyncio
import gc
import json
import math
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from redis import Redis

from iclevr.labels import ICLEVR
from service.api import catalog
from service.contract.errors import BadRequest, NoModel, UnknownCheckpoint
from service.settings import Settings
from service.store.jobs import JobStore
from shared import storage as files
from shared.checkpoint import CheckpointInfo, publish, read_info
from shared.registry import PROMOTED_FILE, Registry, promote
from tests.conftest import serving
from tests.service.api.answers import problem
from tests.service.api.fresh import Fresh
from tests.shared.test_checkpoint import edit_header
from tests.toy_checkpoint import publish_toy_adapter, publish_toy_denoiser, publish_toys
from trainer.studies.card import write_card


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A storage of two denoisers, `a`, which is promoted, and `b`."""
    for seed, name in enumerate("ab"):
        publish_toy_denoiser(tmp_path, name, seed)
    promote(tmp_path, "a")
    return tmp_path


@pytest.fixture
def models(folder: Path) -> Fresh:
    return Fresh(folder)


def file_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def test_checkpoints_appear_change_and_go(models: Fresh, folder: Path) -> None:
    with pytest.raises(BadRequest, match="no such denoiser in the storage; available:") as caught:
        models.find("c")
    assert caught.value.members["models"] == ["a", "b"]
    first = publish_toy_denoiser(folder, "c", 2)
    assert models.find("c") == first
    second = publish_toy_denoiser(folder, "c", 3)
    assert models.find("c") == second
    assert second.digest != first.digest
    assert [info.name for info in models().denoisers] == ["a", "b", "c"]
    file_of(folder, "c").unlink()
    with pytest.raises(BadRequest, match="no such denoiser"):
        models.find("c")
    assert [info.name for info in models().denoisers] == ["a", "b"]


def test_a_promotion_takes_effect_at_once(models: Fresh, folder: Path) -> None:
    assert (models.find(None).name, models().promoted) == ("a", "a")
    promote(folder, "b")
    assert (models.find(None).name, models().promoted) == ("b", "b")
    (folder / PROMOTED_FILE).unlink()
    with pytest.raises(NoModel, match=r"no denoiser is promoted; available: a, b"):
        models.find(None)


def test_a_damaged_checkpoint_is_refused_with_its_reason_until_it_is_published_again(
    models: Fresh, folder: Path
) -> None:
    before, reason = models.find("a"), "truncated"
    file_of(folder, "a").write_bytes(file_of(folder, "a").read_bytes()[:-10])
    with pytest.raises(BadRequest, match=f"{reason}.*; publish it again, or use another model") as caught:
        models.find("a")
    assert caught.value.members["models"] == ["b"]
    with pytest.raises(NoModel, match=rf"a\.safetensors: .*{reason}.*; publish it again, or use another model"):
        models.find(None)
    with pytest.raises(UnknownCheckpoint):
        models().with_digest(before.digest)
    listing = models()
    assert ([info.name for info in listing.denoisers], listing.promoted) == (["b"], None)
    assert reason in listing.registry.problems["a.safetensors"]
    assert listing.registry.problems.keys() == {"a.safetensors"}
    again = publish_toy_denoiser(folder, "a", 8)
    assert models.find("a") == models.find(None) == again
    assert models().registry.problems == {}


@pytest.mark.parametrize(
    ("promoted", "problem"),
    [
        ('{"denoiser": "b"}', r"b\.safetensors: not a safetensors file"),
        ('{"denoiser": "c"}', "c: no such promoted denoiser"),
        ("{", r"promoted\.json: cannot be read"),
    ],
)
def test_without_a_default_that_can_be_used_models_are_found_by_name_only(
    models: Fresh, folder: Path, promoted: str, problem: str
) -> None:
    default = models.find(None)
    file_of(folder, "b").write_bytes(b"junk")
    (folder / PROMOTED_FILE).write_text(promoted)
    with pytest.raises(NoModel, match=problem):
        models.find(None)
    assert models.find("a") == default
    listing = models()
    assert listing.promoted is None
    assert listing.registry.problems.keys() == {"b.safetensors"} | ({PROMOTED_FILE} if "b" not in promoted else set())


def test_a_missing_folder_is_a_problem(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    models = Fresh(folder)
    assert models().registry.problems == {PROMOTED_FILE: f"{folder}: there is no folder {folder}"}
    with pytest.raises(NoModel, match=rf"there is no folder {folder}$"):
        models.find(None)
    publish_toys(folder)
    assert models().registry.problems == {}


def test_an_adapter_is_refused_without_its_base(models: Fresh, folder: Path) -> None:
    base = models.find("b")
    adapter = publish_toy_adapter(folder, "fast", base)
    assert Fresh(folder).find("fast") == adapter
    publish_toy_denoiser(folder, "b", 9)
    with pytest.raises(BadRequest, match=f"changes b of digest {base.digest[:16]}"):
        models.find("fast")
    listing = models()
    assert "changes b of digest" in listing.registry.problems["fast.safetensors"]
    assert [info.name for info in listing.denoisers] == ["a", "b"]
    file_of(folder, "b").unlink()
    with pytest.raises(BadRequest, match="changes b, which is missing"):
        models.find("fast")


def test_a_model_with_labels_that_the_evaluator_does_not_know_is_refused(models: Fresh, folder: Path) -> None:
    evaluator = {"kind": "evaluator", "config": {}, "training": {}}
    publish(folder, "judge", {"x": torch.zeros(1)}, vocabulary=ICLEVR.names[2:], **evaluator)  # type: ignore[arg-type]
    promote(folder, "judge")
    words = f"has labels that the evaluator judge does not know, nor any other: {ICLEVR.names[0]}, {ICLEVR.names[1]}"
    with pytest.raises(BadRequest, match=words):
        models.find("b")
    with pytest.raises(NoModel, match=words):
        models.find(None)
    assert models().registry.problems["b.safetensors"] == words
    assert "b" in models().names.values()  # whose jobs still count
    publish(folder, "wider", {"x": torch.zeros(1)}, vocabulary=ICLEVR.names, **evaluator)  # type: ignore[arg-type]
    assert models.find("b").name == "b"
    assert (models().find_evaluator("b").name, models().find_evaluator(None).name) == ("wider", "judge")


@pytest.fixture
def client(settings: Settings, folder: Path, connection: Redis) -> Iterator[httpx.Client]:
    with serving(settings.model_copy(update={"storage": folder})) as one:
        yield one


def test_the_list_has_cards_and_problems(client: httpx.Client, folder: Path) -> None:
    def models() -> dict[str, dict[str, object]]:
        return {model["name"]: model for model in client.get("/models").json()["models"]}

    assert [model["card"] for model in models().values()] == [None, None]
    (folder / "short.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (folder / "a.md").write_text("# a\n\nÜberaus gut.\n")
    assert (models()["a"]["card"], models()["a"]["promoted"]) == ("# a\n\nÜberaus gut.\n", True)
    (folder / "secret").write_text("of the service")
    (folder / "b.md").symlink_to(folder / "secret")
    assert models()["b"]["card"] is None
    write_card(folder, "a", log=folder / "short.jsonl")
    assert (folder / "a.md").read_text().startswith("---\n")  # for the Hugging Face Hub
    assert str(models()["a"]["card"]).startswith("# a\n")
    assert "Überaus gut." in str(models()["a"]["card"])
    publish_toy_denoiser(folder, "a", 9)
    assert models()["a"]["card"] is None
    file_of(folder, "b").write_bytes(b"junk")
    body = client.get("/models").json()
    assert [(model["name"], model["card"]) for model in body["models"]] == [("a", None)]
    assert body["problems"] == {"b.safetensors": "not a safetensors file"}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"sampling": {"steps": 0}}, "sampling.steps"),
        ({"support": {"objects": [3, 1]}}, "support: Value error, objects is"),
        ({}, "no picture or network.image_size"),
        ({"network": {"image_size": 16}, "picture": 320}, "no picture or network.image_size"),
    ],
)
def test_a_foreign_checkpoint_is_refused_with_its_reason(
    models: Fresh, folder: Path, config: dict[str, Any], reason: str
) -> None:
    weights = {"w": torch.zeros(1)}
    publish(folder, "foreign", weights, kind="denoiser", vocabulary=("red cube",), config=config, training={})
    promote(folder, "foreign")
    assert reason in models().registry.problems["foreign.safetensors"]
    for name, error in (("foreign", BadRequest), (None, NoModel)):
        with pytest.raises(error, match=re.escape(reason)):
            models.find(name)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Storage that hangs once the event is set, until it is cleared; deadlines are short."""
    hangs, ended = threading.Event(), threading.Event()

    def hang(folder: Path, versions: Callable[[Path], dict[str, str]] = files.versions) -> dict[str, str]:
        while hangs.is_set() and not ended.is_set():
            ended.wait(0.01)
        return versions(folder)

    monkeypatch.setattr(files, "versions", hang)
    monkeypatch.setattr(catalog, "PATIENCE_S", 0.2)
    yield hangs
    ended.set()


def test_the_api_answers_while_storage_hangs(
    settings: Settings, folder: Path, alive: JobStore, hanging: threading.Event
) -> None:
    later = {"prefer": "respond-async"}
    with serving(settings.model_copy(update={"storage": folder})) as client:
        body = {"labels": [["red cube"]]}
        assert client.post("/generate", json=body, headers=later).status_code == 202
        hanging.set()
        with ThreadPoolExecutor(60) as many:  # more than the API has threads
            unknown = [many.submit(client.post, "/generate", json={**body, "model": "c"}) for _ in range(60)]
            assert client.post("/generate", json=body, headers=later).status_code == 202
            assert client.get("/readyz").json()["model"] == "a"
            assert client.get("/models").json()["problems"] == {PROMOTED_FILE: f"{folder}: does not answer"}
            assert client.get("/metrics").status_code == 200
        for one in unknown:
            problem(one.result(), 503, "no-model")


def test_requests_that_come_together_share_one_look_at_storage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def versions(storage: Path) -> dict[str, str]:
        looks.append(storage)
        return files.versions(storage)

    monkeypatch.setattr("shared.registry.files", SimpleNamespace(**{**vars(files), "versions": versions}))

    async def ask() -> None:
        one = catalog.Catalog(folder, every_s=1e6)
        found = await asyncio.gather(*(one.models() for _ in range(4)))
        publish_toy_denoiser(folder, "b", 6)
        found.append(await one.models())
        assert len({id(each) for each in found}) == 1
        assert looks == [folder]
        one.every_s = 0.0
        assert (await one.models()).find("b").digest == read_info(file_of(folder, "b")).digest
        assert looks == [folder] * 2

    asyncio.run(ask())


def test_what_was_found_before_is_not_kept(folder: Path) -> None:
    """An error that is kept would keep its traceback, and with it every look before."""
    (folder / PROMOTED_FILE).write_text("damaged")
    found = catalog.Models(Registry(folder))
    first = weakref.ref(found)
    for _ in range(3):
        found = catalog.look(found)
    assert found.registry.problem is not None
    gc.collect()
    assert first() is None


def with_infinity(path: Path) -> None:
    """Put a number into a checkpoint's description that JSON does not have, and Python reads."""

    def edit(header: dict[str, Any]) -> None:
        description = json.loads(header["__metadata__"]["labelgrid"])
        description["config"]["timesteps"] = math.inf
        header["__metadata__"]["labelgrid"] = json.dumps(description)

    edit_header(path, edit)


def test_a_checkpoint_with_a_description_that_is_no_json_concerns_only_itself(
    client: httpx.Client, folder: Path, alive: JobStore
) -> None:
    with_infinity(file_of(folder, "b"))
    assert client.get("/labels").json()["model"] == "a"
    assert client.get("/readyz").status_code == client.get("/metrics").status_code == 200
    body = client.get("/models").json()
    assert [model["name"] for model in body["models"]] == ["a"]
    assert body["problems"].keys() == {"b.safetensors"}
    asked = {"labels": [["red cube"]]}
    assert client.post("/generate", json=asked, headers={"prefer": "respond-async"}).status_code == 202
    problem(client.post("/generate", json={**asked, "model": "b"}), 422, "invalid-request")
    file_of(folder, "b").unlink()
    assert client.get("/models").json()["problems"] == {}


def test_what_nobody_foresaw_in_one_file_concerns_only_that_file(
    models: Fresh, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read(path: Path) -> CheckpointInfo:
        if path.stem == "new":
            raise OverflowError("cannot convert")
        return read_info(path)

    with monkeypatch.context() as patch:
        patch.setattr("shared.registry.read_info", read)
        publish_toy_denoiser(folder, "new", 4)
        for _ in range(3):
            assert models().registry.problems == {"new.safetensors": "OverflowError: cannot convert"}
            assert [info.name for info in models().denoisers] == ["a", "b"]
    assert len([one for one in caplog.records if one.exc_info]) == 1
    assert models.find("new").name == "new"  # although the file has not changed


def test_a_look_that_fails_as_a_whole_keeps_what_was_found_and_is_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(folder: Path) -> dict[str, str]:
        raise KeyError("ContentLength")

    async def ask() -> None:
        one = catalog.Catalog(folder, every_s=0.0)
        assert (await one.models()).find("a").name == "a"
        with monkeypatch.context() as patch:
            patch.setattr(files, "versions", fail)
            for _ in range(2):
                found = await one.models()
                assert (found.find("a").name, found.promoted) == ("a", "a")
                assert found.registry.problems == {PROMOTED_FILE: f"{folder}: KeyError: 'ContentLength'"}
        publish_toy_denoiser(folder, "c", 2)
        assert ((await one.models()).find("c").name, (await one.models()).registry.problems) == ("c", {})

    asyncio.run(ask())
    assert len([one for one in caplog.records if one.exc_info]) == 1


def test_names_that_are_not_unicode_are_answered(client: httpx.Client, folder: Path) -> None:
    (folder / PROMOTED_FILE).write_text('{"denoiser": "\\ud800"}')
    (folder / os.fsdecode(b"x\xff.safetensors")).write_bytes(b"")
    assert problem(client.get("/labels"), 503, "no-model")["detail"].startswith("promoted.json: must be")
    assert client.get("/models").json()["problems"].keys() == {PROMOTED_FILE, "x\\udcff.safetensors"}
