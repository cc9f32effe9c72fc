"""One checkpoint file: it loads as published, a crash keeps the old file, a bad file is refused by name and reason."""

import fcntl
import json
import math
import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from iclevr.labels import ICLEVR
from shared.checkpoint import (
    FORMAT_VERSION,
    CheckpointError,
    CheckpointInfo,
    load,
    publish,
    read_info,
    reconfigure,
)

CONFIG = {"network": {"channels": 8, "levels": [1, 2]}, "schedule": "cosine", "prediction": "v"}
TRAINING = {"steps": 10, "loss": 0.25, "data": None}


def toy_tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.arange(12, dtype=torch.float32).reshape(3, 4) * value,
        "half": torch.tensor([1.5, -2.0, 3.0e38, float("inf")], dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "nothing": torch.zeros(0, 3),
    }


def publish_toy(storage: Path, name: str = "toy", value: float = 1.0, **changes: Any) -> Path:
    described: dict[str, Any] = {"vocabulary": ICLEVR.names, "config": CONFIG, "training": TRAINING}
    return publish(storage, name, toy_tensors(value), **{"kind": "denoiser", **described, **changes})


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        act()
    assert str(caught.value) == f"{caught.value.subject}: {caught.value.reason}"
    return str(caught.value)


def assert_same_tensors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    edit(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[end:])


def edit_description(path: Path, **changes: Any) -> None:
    def edit(header: dict[str, Any]) -> None:
        description = json.loads(header["__metadata__"]["labelgrid"])
        header["__metadata__"]["labelgrid"] = json.dumps(description | changes)

    edit_header(path, edit)


# --- round trip ---


def test_a_published_checkpoint_loads_as_it_was(tmp_path: Path) -> None:
    storage = tmp_path / "new" / "storage"
    path = publish_toy(storage, created_at="2026-01-02T03:04:05+00:00")
    assert path == storage / "toy.safetensors"
    info, tensors = load(path)
    assert_same_tensors(tensors, toy_tensors())
    assert info == read_info(path)
    assert (info.name, info.kind, info.format_version) == ("toy", "denoiser", FORMAT_VERSION)
    assert (info.vocabulary, info.config, info.training) == (ICLEVR.names, CONFIG, TRAINING)
    assert info.created_at == "2026-01-02T03:04:05+00:00"
    assert os.listdir(storage) == ["toy.safetensors"]  # no temporary file stays


def test_tied_strided_and_grad_tensors_can_be_published(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "tied": base,
        "again": base,
        "turned": base.T,
        "part": base[1:, ::2],
        "grad": base.clone().requires_grad_(),
    }
    path = publish(tmp_path, "x", tensors, kind="evaluator", vocabulary=("a",), config={}, training={})
    loaded = load(path)[1]
    assert_same_tensors(loaded, tensors)
    assert not any(tensor.requires_grad for tensor in loaded.values())


def test_a_published_file_is_readable_by_other_users(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        path = publish_toy(tmp_path)
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o644  # trainer and service run as different users


# --- publishing ---

BAD_NAMES = ["", ".", "..", "../evil", "a/b", "a\\b", "/etc/passwd", ".hidden", "a b", "a\n", "a\0", "é", "x" * 101]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_publish_refuses_a_name_that_is_not_a_plain_file_name(name: str, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    storage.mkdir()
    assert "not a checkpoint's name" in refusal(lambda: publish_toy(storage, name))
    assert os.listdir(tmp_path) == ["storage"]
    assert os.listdir(storage) == []


def test_publish_refuses_what_could_not_be_read_back(tmp_path: Path) -> None:
    assert refusal(lambda: publish_toy(tmp_path, config={"x": object()})).startswith("toy: config and training must be")
    assert refusal(lambda: publish_toy(tmp_path, training={"loss": float("nan")})).startswith(
        "toy: config and training"
    )
    assert "created_at: Value error, a time needs" in refusal(lambda: publish_toy(tmp_path, created_at="2026-01-02"))
    assert "kind: Input should be" in refusal(lambda: publish_toy(tmp_path, kind="unet"))
    options: Any = {"kind": "denoiser", "vocabulary": ("a",), "config": {}, "training": {}}
    assert refusal(lambda: publish(tmp_path, "toy", {}, **options)) == "toy: no tensors to publish"
    assert os.listdir(tmp_path) == []


def test_publish_keeps_a_checkpoint_of_another_kind_and_an_adapters_base(tmp_path: Path) -> None:
    path = publish_toy(tmp_path)
    kept = path.read_bytes()
    assert refusal(lambda: publish_toy(tmp_path, value=2.0, kind="evaluator")) == (
        "toy: exists and is of kind denoiser; choose another name for the evaluator"
    )
    config = {**CONFIG, "base": {"name": "toy", "digest": read_info(path).digest}}
    assert refusal(lambda: publish_toy(tmp_path, value=2.0, config=config)) == (
        "toy: is the checkpoint that the new one changes, so it must stay; choose another name"
    )
    assert path.read_bytes() == kept
    path.write_bytes(b"junk")  # of no use to anyone
    publish_toy(tmp_path, kind="evaluator")
    assert read_info(path).kind == "evaluator"


def test_publish_syncs_the_file_then_renames_then_syncs_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        is_folder = stat.S_ISDIR(status.st_mode)
        events.append("fsync folder" if is_folder else f"fsync file of {status.st_size} bytes")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        assert source.parent == target.parent  # a rename across file systems is no rename
        assert source.suffix != target.suffix  # lest a listing finds it
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    path = publish_toy(tmp_path)
    assert events == [f"fsync file of {path.stat().st_size} bytes", "rename", "fsync folder"]


# --- bad files ---


def test_a_file_of_another_length_is_refused(tmp_path: Path) -> None:
    path = publish_toy(tmp_path)
    content = path.read_bytes()
    data_start = 8 + int.from_bytes(content[:8], "little")
    for length in (0, 5, 9, data_start - 1, len(content) - 1):
        path.write_bytes(content[:length])
        for read in (read_info, load):
            reason = "truncated" if length > 8 else "not a safetensors file"
            assert refusal(partial(read, path)).startswith(f"toy.safetensors: {reason}")
    path.write_bytes(content + b"abc")
    assert refusal(lambda: read_info(path)) == "toy.safetensors: damaged: 3 bytes too many"


def test_load_refuses_one_flipped_bit_of_a_tensor(tmp_path: Path) -> None:
    path = publish_toy(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert refusal(lambda: load(path)) == "toy.safetensors: damaged: the tensors do not match their digest"
    assert read_info(path).name == "toy"  # the header alone says nothing of it


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    torch.save({"model": toy_tensors()}, path)
    assert refusal(lambda: read_info(path)) == "foreign.safetensors: not a safetensors file"
    path.write_bytes(b"\xff" * 100)
    assert refusal(lambda: load(path)) == "foreign.safetensors: not a safetensors file"
    save_file(toy_tensors(), path)
    assert refusal(lambda: load(path)) == (
        "foreign.safetensors: a safetensors file, but not one of Labelgrid's: no description"
    )
    save_file(toy_tensors(), path, {"labelgrid": "hello"})
    assert "damaged: its description is not JSON" in refusal(lambda: load(path))
    save_file(toy_tensors(), path, {"labelgrid": "[]"})
    assert "damaged: its description is not an object" in refusal(lambda: load(path))


@pytest.mark.parametrize("header", [b"{" * 50, b"{" * 200_000, b'{"a": }', b'{"a":"\xff"}', b'{"a": 3}', b'{"a": {}}'])
def test_a_damaged_header_is_refused(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert refusal(lambda: read_info(path)).startswith("x.safetensors: damaged: the header ")


def test_a_header_that_misplaces_its_tensors_is_refused(tmp_path: Path) -> None:
    path = publish_toy(tmp_path)
    edit_header(path, lambda header: header["weight"].update(shape=[5, 5]))
    assert refusal(lambda: load(path)).startswith("toy.safetensors: damaged: ")
    edit_header(path, lambda header: header["weight"].update(data_offsets=[0, float("inf")]))
    assert refusal(lambda: load(path)) == "toy.safetensors: damaged: the header does not place its tensors"


def test_a_dtype_that_torch_lacks_is_named(tmp_path: Path) -> None:
    path = publish_toy(tmp_path)
    edit_header(
        path, lambda header: header["weight"].update(dtype="F4", shape=[8 * math.prod(header["weight"]["shape"])])
    )
    assert refusal(lambda: load(path)) == "toy.safetensors: this torch has no dtype 'F4'"


def test_a_newer_format_is_refused_before_its_fields_are_read(tmp_path: Path) -> None:
    path = publish_toy(tmp_path)
    edit_description(path, format_version=2, novelty=True, config=None)
    assert refusal(lambda: read_info(path)) == "toy.safetensors: format version 2; this program reads version 1"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "unet"}, "kind: Input should be 'denoiser' or 'evaluator'"),
        ({"novelty": 1}, "novelty: Extra inputs are not permitted"),
        ({"vocabulary": "abc"}, "vocabulary: "),
        ({"config": None}, "config: "),
        ({"config": {"base": {"name": "a", "digest": "../b"}}}, "config: Value error, base must be "),
        ({"config": {"timesteps": "abc"}}, "config: Value error, timesteps must be a whole number from 1 to 4096"),
        ({"config": {"timesteps": 0}}, "config: Value error, timesteps must be a whole number from 1 to 4096"),
        ({"config": {"timesteps": 10**30}}, "config: Value error, timesteps has a number beyond 4096"),
        ({"config": {"network": {"image_size": 10**6}}}, "config: Value error, network has a number beyond 4096"),
        ({"config": {"network": {"channels": [1, -1e9]}}}, "config: Value error, network has a number beyond 4096"),
        ({"config": {"layouts": {"layers": 10**5}}}, "config: Value error, layouts has a number beyond 4096"),
        ({"digest": "../../elsewhere"}, "digest: String should match pattern "),  # it names a worker's folder
        ({"created_at": "yesterday"}, "created_at: "),
        ({"vocabulary": ["cat", "cat"]}, "vocabulary: Value error, names of a vocabulary must be distinct"),
        ({"vocabulary": []}, "vocabulary: Value error, a vocabulary needs at least one name"),
    ],
)
def test_an_invalid_description_is_refused_by_field(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = publish_toy(tmp_path)
    edit_description(path, **changes)
    assert refusal(lambda: read_info(path)).startswith(f"toy.safetensors: damaged: its description's {reason}")


def test_a_file_that_cannot_be_opened_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        for read in (read_info, load):
            message = refusal(partial(read, path))
            assert message.startswith(f"{path.name}: cannot be read: ")


def test_a_configuration_is_changed_by_one_process_at_a_time(tmp_path: Path) -> None:
    path = publish_toy(tmp_path)

    def change(info: CheckpointInfo) -> dict[str, Any]:
        with pytest.raises(BlockingIOError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return {"seen": info.config["schedule"]}

    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        reconfigure(path, change)
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(folder)
    assert read_info(path).config == {**CONFIG, "seen": "cosine"}
