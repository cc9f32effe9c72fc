"""A worker whose storage changes under it: what was begun or accepted is made as it was promised."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from redis import Redis

from service.contract.records import JobRecord
from service.settings import Settings
from service.store.jobs import JobStore, new_id
from service.store.keys import job_key
from service.worker.checkpoint_cache import CheckpointCache
from service.worker.loaded_models import LoadedModel
from service.worker.runner import Runner
from shared import storage as files
from shared.checkpoint import CheckpointError, CheckpointInfo, read_info
from shared.diffusion.model import load_denoiser
from shared.evaluator import JudgeInside
from shared.options import SamplingOptions
from shared.registry import promote
from tests.toy_checkpoint import publish_toy_adapter, publish_toy_denoiser, publish_toys

LISTS = [["red cube", "blue sphere"], ["gray cylinder"]]
MANY_TURNS = 2000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    publish_toys(tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture
def own(settings: Settings, folder: Path, tmp_path: Path) -> Settings:
    """Settings on a storage and a cache of the test's own; storage is looked at at every turn."""
    return settings.model_copy(update={"storage": folder, "cache": tmp_path / "cache", "storage_every_s": 0.0})


@pytest.fixture
def store(connection: Redis, own: Settings) -> JobStore:
    return JobStore(connection, own)


@pytest.fixture
def create(store: JobStore) -> Callable[..., JobRecord]:
    def create(info: CheckpointInfo, *, steps: int = 4) -> JobRecord:
        job = JobRecord(
            id=new_id(), kind="generate", created_at=time.time(), model=info.name, digest=info.digest, labels=LISTS,
            seed=7, columns=2, options=SamplingOptions(steps=steps),
        )  # fmt: skip
        store.create(job)
        return job

    return create


def toy(folder: Path) -> CheckpointInfo:
    return read_info(folder / "toy.safetensors")


def turn_until(runner: Runner, condition: Callable[[], object]) -> None:
    for _ in range(MANY_TURNS):
        if condition():
            return
        runner.run_once()
        time.sleep(0.002)
    raise AssertionError("it did not come to pass")


def test_what_was_begun_and_accepted_is_made_with_the_old_weights(
    connection: Redis, own: Settings, folder: Path, store: JobStore, create: Callable[..., JobRecord]
) -> None:
    old, runner = toy(folder), Runner(connection, own, "w1")
    lane = runner.models.load()
    undisturbed = create(old)
    runner.run(undisturbed.id)
    begun = create(old)
    runner.run_once(lane)
    new = publish_toy_denoiser(folder, "toy", 5)
    accepted, fresh = create(old), create(new)
    for job in (begun, fresh, accepted):
        runner.run(job.id)
    made = [store.pngs(job.id, range(2)) for job in (undisturbed, begun, accepted, fresh)]
    assert made[0] == made[1] == made[2] != made[3]
    assert {lane.digest for lane in runner.models} == {old.digest, new.digest}


@pytest.mark.parametrize("change", ["replaced", "damaged", "gone"])
def test_a_worker_that_starts_anew_still_makes_what_was_accepted(
    connection: Redis, own: Settings, folder: Path, store: JobStore, create: Callable[..., JobRecord], change: str
) -> None:
    old = toy(folder)
    undisturbed, accepted = create(old), create(old)
    Runner(connection, own, "w1").run(undisturbed.id)
    if change == "replaced":
        publish_toy_denoiser(folder, "toy", 5)
    elif change == "damaged":
        (folder / "toy.safetensors").write_bytes(b"junk")
    else:
        (folder / "toy.safetensors").unlink()
    Runner(connection, own, "w2").run(accepted.id)
    assert store.pngs(accepted.id, range(2)) == store.pngs(undisturbed.id, range(2))


def test_a_promoted_model_is_loaded_before_anybody_asks_for_it(connection: Redis, own: Settings, folder: Path) -> None:
    runner = Runner(connection, own, "w1")
    runner.models.load()
    promote(folder, "other")
    turn_until(runner, lambda: len(list(runner.models)) == 2)
    assert runner.models.promoted == read_info(folder / "other.safetensors").digest
    new = publish_toy_denoiser(folder, "other", 6)
    turn_until(runner, lambda: runner.models.promoted == new.digest and runner.models.get(new.digest))


def test_a_promoted_model_that_is_damaged_is_complained_of_once(
    connection: Redis, own: Settings, folder: Path, create: Callable[..., JobRecord], caplog: pytest.LogCaptureFixture
) -> None:
    old, runner = toy(folder), Runner(connection, own, "w1")
    runner.models.load()
    content = bytearray((folder / "other.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "other.safetensors").write_bytes(content)
    promote(folder, "other")
    turn_until(runner, lambda: caplog.records)
    job = create(old)
    runner.run(job.id)
    assert connection.hget(job_key(job.id), "status") == b"finished"
    (record,) = caplog.records
    assert "other.safetensors: damaged: the tensors do not match their digest" in record.__dict__["reason"]


def test_a_padded_networks_pictures_are_judged_without_their_borders(
    connection: Redis, own: Settings, folder: Path
) -> None:
    runner = Runner(connection, own, "w1")
    padded = publish_toy_denoiser(folder, "padded", 5, aspect=4 / 3)
    judges = [runner.models.loader.load(name, None).engine.judge for name in ("toy", padded.name)]
    assert judges == [runner.judge, JudgeInside(runner.judge, 4 / 3)]


def test_unused_models_are_let_go_but_never_one_with_pictures_in_work(
    connection: Redis, own: Settings, folder: Path, create: Callable[..., JobRecord]
) -> None:
    runner = Runner(connection, own.model_copy(update={"idle_model_s": 0.0}), "w1")
    promoted = runner.models.load()
    other = runner.models.load("other")
    create(read_info(folder / "other.safetensors"), steps=30)
    runner.run_once(other)
    for _ in range(20):
        runner.run_once()
    assert other.engine.busy
    assert {model.digest for model in runner.models} == {promoted.digest, other.digest}
    turn_until(runner, lambda: runner.models.get(other.digest) is None)
    assert {model.digest for model in runner.models} == {promoted.digest}


def test_pictures_in_work_go_on_while_another_model_loads(
    connection: Redis, own: Settings, folder: Path, store: JobStore, create: Callable[..., JobRecord],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    runner = Runner(connection, own, "w1")
    lane = runner.models.load()
    first, second = create(toy(folder)), create(read_info(folder / "other.safetensors"))
    runner.run_once(lane)
    load = runner.models.loader.load

    def slow_load(name: str | None, digest: str | None) -> LoadedModel:
        assert threading.current_thread() is not threading.main_thread()
        while store.is_open(first.id):  # would never end if the batch waited for us
            time.sleep(0.002)
        return load(name, digest)

    monkeypatch.setattr(runner.models.loader, "load", slow_load)
    runner.run(second.id)
    assert list(store.statuses([first.id, second.id]).values()) == ["finished", "finished"]


# --- the cache ---


@pytest.fixture
def cache(folder: Path, tmp_path: Path) -> CheckpointCache:
    return CheckpointCache(tmp_path / "cache", folder, 1 << 30)


def test_an_adapter_has_what_it_changes_beside_it(cache: CheckpointCache, folder: Path) -> None:
    base = toy(folder)
    adapter = publish_toy_adapter(folder, "fast", base)
    kept = cache.fetch("fast")
    assert kept == cache.folder / adapter.digest / "fast.safetensors"
    plain, adapted = load_denoiser(cache.fetch("toy")), load_denoiser(kept)
    change = adapted.network.state_dict()["head.bias"] - plain.network.state_dict()["head.bias"]
    torch.testing.assert_close(change, torch.full_like(change, 0.2))
    publish_toy_denoiser(folder, "toy", 5)  # the adapter now has nothing to change in storage
    assert cache.fetch("fast", adapter.digest) == kept
    assert torch.equal(load_denoiser(kept).network.state_dict()["head.bias"], adapted.network.state_dict()["head.bias"])
    kept.with_name("toy.safetensors").unlink()
    assert load_denoiser(cache.fetch("fast", adapter.digest)).info == adapter  # the base has a place of its own, too
    cache.forget(kept)
    cache.forget(cache.folder / base.digest / "toy.safetensors")
    with pytest.raises(CheckpointError, match="no longer the checkpoint"):
        cache.fetch("fast", adapter.digest)


def test_what_is_damaged_in_storage_does_not_come_into_the_cache(cache: CheckpointCache, folder: Path) -> None:
    content = bytearray((folder / "toy.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "toy.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"toy\.safetensors: damaged"):
        cache.fetch("toy")
    assert not list(cache.folder.rglob("*.safetensors"))


def test_what_went_bad_in_the_cache_is_fetched_again(
    connection: Redis, own: Settings, folder: Path, cache: CheckpointCache
) -> None:
    kept = cache.fetch("toy")
    assert isinstance(kept, Path)
    content = bytearray(kept.read_bytes())
    kept.write_bytes(content[:-10])
    assert kept.read_bytes() != content
    assert cache.fetch("toy") == kept
    assert kept.read_bytes() == content
    content[-1] ^= 1
    kept.write_bytes(content)
    runner = Runner(connection, own, "w1")
    with pytest.raises(CheckpointError, match="do not match"):
        runner.models.load()
    assert runner.models.load().name == "toy"


def test_the_same_weights_with_another_configuration_are_fetched_again(cache: CheckpointCache, folder: Path) -> None:
    from shared.checkpoint import load, publish

    old, tensors = load(folder / "toy.safetensors")
    config = {**old.config, "sampling": {"steps": 5}}
    cache.fetch("toy")
    publish(folder, "toy", tensors, kind="denoiser", vocabulary=old.vocabulary, config=config, training={})
    kept = cache.fetch("toy")
    assert read_info(kept).digest == old.digest
    assert load_denoiser(kept).options.steps == 5


def test_the_cache_keeps_what_was_used_last_within_its_bounds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (folder / "toy.safetensors").stat().st_size
    small = CheckpointCache(tmp_path / "cache", folder, int(2.5 * size))
    monkeypatch.setattr("service.worker.checkpoint_cache.IN_USE_S", -1.0)
    digests = [publish_toy_denoiser(folder, "x", seed).digest for seed in (10, 11, 12)]
    for i, digest in enumerate(digests):
        assert publish_toy_denoiser(folder, "x", 10 + i).digest == digest
        small.fetch("x")
        os.utime(small.folder / digest, (i, i))
    assert {path.name for path in small.folder.iterdir()} == set(digests[1:])


def test_where_the_disk_takes_nothing_storage_itself_is_read(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    path = CheckpointCache(tmp_path / "file", folder, 1 << 30).fetch("toy")
    assert path == folder / "toy.safetensors"
    assert [record.message for record in caplog.records] == ["checkpoint cannot be cached"]


def test_versions_are_of_files_and_change_with_them(folder: Path) -> None:
    before = files.versions(folder)
    assert before.keys() == {"toy.safetensors", "other.safetensors", "toy-evaluator.safetensors", "promoted.json"}
    publish_toy_denoiser(folder, "toy", 0)
    after = files.versions(folder)
    assert {name for name in after if after[name] != before[name]} == {"toy.safetensors"}
    assert files.versions(folder / "absent") == {}
