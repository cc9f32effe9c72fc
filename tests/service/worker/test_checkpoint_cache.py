"""The cache of checkpoints: whole files only, with their bases, within its bounds."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from redis import Redis

from service.settings import Settings
from service.worker.checkpoint_cache import READS_AT_ONCE, CheckpointCache
from service.worker.models import _Fetched
from shared.checkpoint import CheckpointError, CheckpointKind, read_info
from shared.diffusion.model import load_denoiser
from tests.service.worker.conftest import started
from tests.toy_checkpoint import publish_toy_adapter, publish_toy_denoiser


@pytest.fixture
def cache(folder: Path, tmp_path: Path) -> CheckpointCache:
    return CheckpointCache(tmp_path / "cache", folder, 1 << 30)


def test_a_user_without_a_home_folder_learns_what_to_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)  # as a container with an arbitrary user has it
    with pytest.raises(RuntimeError, match=r"^LABELGRID_CACHE=~/kept: this user has no home folder"):
        CheckpointCache(Path("~/kept"), folder, 1 << 30)


def test_an_adapter_has_its_base_beside_it(cache: CheckpointCache, folder: Path) -> None:
    base = read_info(folder / "toy.safetensors")
    adapter = publish_toy_adapter(folder, "fast", base)
    kept = cache.fetch("fast")
    assert kept == cache.folder / adapter.digest / "fast.safetensors"
    plain, adapted = load_denoiser(cache.fetch("toy")), load_denoiser(kept)
    change = adapted.network.state_dict()["head.bias"] - plain.network.state_dict()["head.bias"]
    torch.testing.assert_close(change, torch.full_like(change, 0.2))
    publish_toy_denoiser(folder, "toy", 5)  # storage no longer holds the adapter's base
    assert cache.fetch("fast", adapter.digest) == kept
    assert torch.equal(load_denoiser(kept).network.state_dict()["head.bias"], adapted.network.state_dict()["head.bias"])
    kept.with_name("toy.safetensors").unlink()
    assert load_denoiser(cache.fetch("fast", adapter.digest)).info == adapter  # the base has its own copy
    cache.forget(kept)
    cache.forget(cache.folder / base.digest / "toy.safetensors")
    with pytest.raises(CheckpointError, match="no longer the checkpoint"):
        cache.fetch("fast", adapter.digest)


def test_a_damaged_checkpoint_is_not_cached(cache: CheckpointCache, folder: Path) -> None:
    content = bytearray((folder / "toy.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "toy.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"toy\.safetensors: damaged"):
        cache.fetch("toy")
    assert not list(cache.folder.rglob("*.safetensors"))


@pytest.mark.parametrize("kind", ["denoiser", "evaluator"])
def test_a_copy_that_was_damaged_in_the_cache_is_fetched_again(
    connection: Redis, own: Settings, cache: CheckpointCache, kind: CheckpointKind
) -> None:
    kept = cache.fetch("toy" if kind == "denoiser" else "toy-evaluator", kind=kind)
    assert isinstance(kept, Path)
    content = kept.read_bytes()
    for damaged in (content[:-10], content[:-1] + bytes([content[-1] ^ 1])):
        kept.write_bytes(damaged)
        models = started(connection, own).models
        assert [loaded.name for loaded in models] == ["toy"]
        assert models.judge.info is not None
        assert kept.read_bytes() == content
    info = read_info(kept)
    kept.write_bytes(damaged)  # and storage is away, so that it is loaded
    with pytest.raises(CheckpointError, match="damaged"):
        models._denoiser(_Fetched(kept, info)) if kind == "denoiser" else models._read_evaluator(kept)
    assert not kept.exists()


def test_the_same_weights_with_another_configuration_are_fetched_again(cache: CheckpointCache, folder: Path) -> None:
    from shared.checkpoint import load, publish

    old, tensors = load(folder / "toy.safetensors")
    config = {**old.config, "sampling": {"steps": 5}}
    cache.fetch("toy")
    publish(folder, "toy", tensors, kind="denoiser", vocabulary=old.vocabulary, config=config, training={})
    kept = cache.fetch("toy")
    assert read_info(kept).digest == old.digest
    assert load_denoiser(kept).options.steps == 5


def test_the_cache_keeps_the_most_recently_used_within_its_bound(
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


def test_what_others_keep_in_the_folder_of_the_cache_stays(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "cache" / "huggingface" / "model"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"x" * 1000)
    os.utime(other.parent, (0, 0))
    monkeypatch.setattr("service.worker.checkpoint_cache.IN_USE_S", -1.0)
    CheckpointCache(tmp_path / "cache", folder, 1).fetch("toy")
    assert other.exists()


def test_a_copy_is_used_although_older_ones_cannot_be_removed(
    cache: CheckpointCache, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As if another worker removed the same ones at this moment."""
    cache.folder.mkdir()
    (cache.folder / ("a" * 64)).write_text("")
    digest = read_info(folder / "toy.safetensors").digest
    assert cache.fetch("toy") == cache.folder / digest / "toy.safetensors"
    assert [record.message for record in caplog.records] == ["cached checkpoints cannot be removed"]


def test_if_the_disk_cannot_be_written_storage_is_read_directly(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    path = CheckpointCache(tmp_path / "file", folder, 1 << 30).fetch("toy")
    assert path == folder / "toy.safetensors"
    assert [record.message for record in caplog.records] == ["checkpoint cannot be cached"]


@pytest.fixture
def hanging(cache: CheckpointCache, monkeypatch: pytest.MonkeyPatch) -> Iterator[CheckpointCache]:
    """A cache with a copy of `toy`, whose storage hangs until the end of the test."""
    cache.fetch("toy")
    answers = threading.Event()
    monkeypatch.setattr("service.worker.checkpoint_cache.resolve", lambda *_: answers.wait())
    monkeypatch.setattr("service.worker.checkpoint_cache.PATIENCE_S", 0.01)
    cache.timeout_s = 0.01
    yield cache
    answers.set()


def test_while_storage_hangs_a_copy_is_used(hanging: CheckpointCache, folder: Path) -> None:
    digest = read_info(folder / "toy.safetensors").digest
    assert hanging.fetch("toy", digest) == hanging.folder / digest / "toy.safetensors"


def test_without_a_copy_a_hang_of_storage_is_an_error(hanging: CheckpointCache, folder: Path) -> None:
    for read in (
        hanging.promoted,
        lambda: hanging.fetch("toy"),
        lambda: hanging.fetch("other", read_info(folder / "other.safetensors").digest),
    ):
        with pytest.raises(CheckpointError, match=f"{folder}: has not answered within 0.01 s"):
            read()


def test_while_storage_hangs_threads_do_not_become_more(hanging: CheckpointCache) -> None:
    with pytest.raises(CheckpointError):
        hanging.promoted()
    before = {thread for thread in threading.enumerate() if thread.name == "storage"}
    assert all(thread.daemon for thread in before)  # else the process could not end
    for _ in range(2 * READS_AT_ONCE):
        with pytest.raises(CheckpointError):
            hanging.promoted()
    assert {thread for thread in threading.enumerate() if thread.name == "storage"} == before
