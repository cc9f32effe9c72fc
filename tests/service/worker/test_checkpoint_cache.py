"""The cache of checkpoints: whole files only, with their bases, within its bounds."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from service.worker.checkpoint_cache import CheckpointCache
from shared.checkpoint import CheckpointError, read_info
from shared.diffusion.model import load_denoiser
from shared.storage import Location
from tests.toy_checkpoint import publish_toy_adapter, publish_toy_denoiser


@pytest.fixture
def cache(folder: Path, tmp_path: Path) -> CheckpointCache:
    return CheckpointCache(tmp_path / "cache", folder, 1 << 30)


def digest_of(storage: Location, name: str) -> str:
    return read_info(storage / f"{name}.safetensors").digest


def fetch(cache: CheckpointCache, name: str) -> Location:
    """Fetch what storage has now."""
    return cache.fetch(name, digest_of(cache.storage, name), "evaluator" if "evaluator" in name else "denoiser")


def test_a_user_without_a_home_folder_learns_what_to_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)  # as a container with an arbitrary user has it
    with pytest.raises(RuntimeError, match=r"^LABELGRID_CACHE=~/kept: this user has no home folder"):
        CheckpointCache(Path("~/kept"), folder, 1 << 30)


def test_an_adapter_has_its_base_beside_it(cache: CheckpointCache, folder: Path) -> None:
    base = read_info(folder / "toy.safetensors")
    adapter = publish_toy_adapter(folder, "fast", base)
    kept = fetch(cache, "fast")
    assert kept == cache.folder / adapter.digest / "fast.safetensors"
    plain, adapted = load_denoiser(fetch(cache, "toy")), load_denoiser(kept)
    change = adapted.network.state_dict()["head.bias"] - plain.network.state_dict()["head.bias"]
    torch.testing.assert_close(change, torch.full_like(change, 0.2))
    publish_toy_denoiser(folder, "toy", 5)  # storage no longer holds the adapter's base
    assert cache.fetch("fast", adapter.digest) == kept
    assert torch.equal(load_denoiser(kept).network.state_dict()["head.bias"], adapted.network.state_dict()["head.bias"])
    kept.with_name("toy.safetensors").unlink()
    assert load_denoiser(cache.fetch("fast", adapter.digest)).info == adapter  # the base has its own copy
    shutil.rmtree(cache.folder)
    with pytest.raises(CheckpointError, match="no longer the checkpoint"):
        cache.fetch("fast", adapter.digest)


def test_a_damaged_checkpoint_is_refused_each_time(cache: CheckpointCache, folder: Path) -> None:
    content = bytearray((folder / "toy.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "toy.safetensors").write_bytes(content)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"toy\.safetensors: damaged"):
            fetch(cache, "toy")


def test_a_copy_that_was_damaged_in_the_cache_is_fetched_again(cache: CheckpointCache) -> None:
    kept = fetch(cache, "toy")
    assert isinstance(kept, Path)
    content = kept.read_bytes()
    for damaged in (content[:-10], content[:-1] + bytes([content[-1] ^ 1])):
        kept.write_bytes(damaged)
        assert fetch(cache, "toy") == kept
        assert kept.read_bytes() == content


def test_the_cache_keeps_the_most_recently_used_within_its_bound_and_what_others_keep_in_its_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, other = (folder / "toy.safetensors").stat().st_size, tmp_path / "cache" / "huggingface"
    other.mkdir(parents=True)
    os.utime(other, (0, 0))
    small = CheckpointCache(tmp_path / "cache", folder, int(2.5 * size))
    monkeypatch.setattr("service.worker.checkpoint_cache.IN_USE_S", -1.0)
    digests = [publish_toy_denoiser(folder, "x", seed).digest for seed in (10, 11, 12)]
    for i, digest in enumerate(digests):
        assert publish_toy_denoiser(folder, "x", 10 + i).digest == digest
        fetch(small, "x")
        os.utime(small.folder / digest, (i + 1, i + 1))
    assert {path.name for path in small.folder.iterdir()} == {*digests[1:], other.name}


def test_if_the_disk_cannot_be_written_storage_is_read_directly(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert fetch(CheckpointCache(tmp_path / "file", folder, 1 << 30), "toy") == folder / "toy.safetensors"


def test_a_copy_is_used_while_storage_is_away(
    cache: CheckpointCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, digest = fetch(cache, "toy"), digest_of(folder, "toy")
    monkeypatch.setattr("service.worker.checkpoint_cache.resolve", lambda *_: pytest.fail("storage is asked"))
    assert cache.fetch("toy", digest) == kept
