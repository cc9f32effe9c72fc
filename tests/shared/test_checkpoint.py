"""Checkpoints: what is written comes back, a crash leaves the old file, a bad file is refused by name and reason."""

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared import storage
from shared.checkpoint import (
    FORMAT_VERSION,
    CheckpointError,
    list_checkpoints,
    load,
    promote,
    promoted,
    publish,
    read_info,
    resolve,
    scan,
)
from shared.vocabulary import ICLEVR
from tests.paths import ROOT

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
    options: dict[str, Any] = {
        "kind": "denoiser",
        "vocabulary": ICLEVR.names,
        "config": CONFIG,
        "training": TRAINING,
        **changes,
    }
    return publish(storage, name, toy_tensors(value), **options)


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


# --- there and back ---


def test_what_is_published_comes_back(tmp_path: Path) -> None:
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


def test_any_safetensors_reader_can_read_it(tmp_path: Path) -> None:
    assert_same_tensors(load_file(publish_toy(tmp_path)), toy_tensors())


def test_the_same_input_gives_the_same_bytes_and_the_time_is_utc(tmp_path: Path) -> None:
    when = "2026-01-02T03:04:05+00:00"
    assert (
        publish_toy(tmp_path, "a", created_at=when).read_bytes()
        == publish_toy(tmp_path, "b", created_at=when).read_bytes()
    )
    assert read_info(publish_toy(tmp_path)).created_at.endswith("+00:00")


def test_tensors_that_share_memory_or_are_no_plain_rows_are_published(tmp_path: Path) -> None:
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


def test_loaded_tensors_can_be_written_to(tmp_path: Path) -> None:
    path = publish_toy(tmp_path)
    load(path)[1]["weight"].zero_()
    assert_same_tensors(load(path)[1], toy_tensors())


def test_a_renamed_file_answers_to_its_new_name(tmp_path: Path) -> None:
    publish_toy(tmp_path, "old").rename(tmp_path / "new.safetensors")
    assert read_info(resolve(tmp_path, "new", "denoiser")).name == "new"


def test_others_may_read_what_was_published(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        path = publish_toy(tmp_path)
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o644  # trainer and service run as different users


# --- publishing ---

BAD_NAMES = ["", ".", "..", "../evil", "a/b", "a\\b", "/etc/passwd", ".hidden", "a b", "a\n", "a\0", "é", "x" * 101]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_no_plain_file_name_is_refused(name: str, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    storage.mkdir()
    for act in (
        lambda: publish_toy(storage, name),
        lambda: promote(storage, name),
        lambda: resolve(storage, name, "denoiser"),
    ):
        assert "not a checkpoint's name" in refusal(act)
    assert os.listdir(tmp_path) == ["storage"]
    assert os.listdir(storage) == []


def test_a_promoted_file_cannot_lead_out_of_the_storage(tmp_path: Path) -> None:
    publish_toy(tmp_path, "outside")
    storage = tmp_path / "storage"
    storage.mkdir()
    (storage / "promoted.json").write_text('{"denoiser": "../outside"}')
    assert "not a checkpoint's name" in refusal(lambda: resolve(storage, None, "denoiser"))


def test_what_could_not_be_read_again_is_not_published(tmp_path: Path) -> None:
    assert refusal(lambda: publish_toy(tmp_path, config={"x": object()})).startswith("toy: config and training must be")
    assert refusal(lambda: publish_toy(tmp_path, training={"loss": float("nan")})).startswith(
        "toy: config and training"
    )
    assert "created_at: Value error, a time needs" in refusal(lambda: publish_toy(tmp_path, created_at="2026-01-02"))
    assert "kind: Input should be" in refusal(lambda: publish_toy(tmp_path, kind="unet"))
    options: Any = {"kind": "denoiser", "vocabulary": ("a",), "config": {}, "training": {}}
    assert refusal(lambda: publish(tmp_path, "toy", {}, **options)) == "toy: no tensors to publish"
    assert os.listdir(tmp_path) == []


def test_an_error_before_the_rename_leaves_the_old_one_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = publish_toy(tmp_path, value=1.0)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            with pytest.raises(OSError, match="No space left"):
                publish_toy(tmp_path, value=2.0)
        assert_same_tensors(load(path)[1], toy_tensors(1.0))
        assert os.listdir(tmp_path) == ["toy.safetensors"]


CRASH = """
import os, signal, sys
from pathlib import Path
from tests.shared.test_checkpoint import publish_toy
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
publish_toy(Path(sys.argv[1]), value=2.0)
"""


def test_a_process_killed_before_the_rename_leaves_the_old_one(tmp_path: Path) -> None:
    path = publish_toy(tmp_path, value=1.0)
    root = ROOT
    done = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path)], cwd=root, timeout=120)
    assert done.returncode == -9
    assert len(os.listdir(tmp_path)) == 2  # it did get as far as writing beside it
    assert_same_tensors(load(path)[1], toy_tensors(1.0))
    infos, problems = scan(tmp_path)
    assert [info.name for info in infos] == ["toy"]
    assert problems == {}


def test_the_file_is_on_disk_before_its_name_and_the_name_before_we_return(
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
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    path = publish_toy(tmp_path)
    assert events == [f"fsync file of {path.stat().st_size} bytes", "rename", "fsync folder"]


# --- bad files ---


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    path = publish_toy(tmp_path)
    content = path.read_bytes()
    data_start = 8 + int.from_bytes(content[:8], "little")
    cuts = {
        0: "not a safe",
        5: "not a safe",
        9: "cut short",
        data_start - 1: "cut short",
        len(content) - 1: "cut short",
    }
    for length, reason in cuts.items():
        path.write_bytes(content[:length])
        for read in (read_info, load):
            assert refusal(partial(read, path)).startswith(f"toy.safetensors: {reason}")


def test_a_file_with_something_behind_it_is_refused(tmp_path: Path) -> None:
    path = publish_toy(tmp_path)
    path.write_bytes(path.read_bytes() + b"abc")
    assert refusal(lambda: read_info(path)) == "toy.safetensors: damaged: 3 bytes too many"


def test_one_changed_bit_of_a_tensor_is_refused(tmp_path: Path) -> None:
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
    assert refusal(lambda: load(path)) == "foreign.safetensors: a safetensors file, but without labelgrid's description"
    save_file(toy_tensors(), path, {"labelgrid": "hello"})
    assert "damaged: its description is not JSON" in refusal(lambda: load(path))
    save_file(toy_tensors(), path, {"labelgrid": "[]"})
    assert "damaged: its description is not an object" in refusal(lambda: load(path))


@pytest.mark.parametrize("header", [b"{" * 50, b"{" * 200_000, b'{"a": }', b'{"a":"\xff"}', b'{"a": 3}', b'{"a": {}}'])
def test_a_damaged_header_is_refused(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert refusal(lambda: read_info(path)).startswith("x.safetensors: damaged: the header ")


def test_tensors_that_the_header_misplaces_are_refused(tmp_path: Path) -> None:
    path = publish_toy(tmp_path)
    edit_header(path, lambda header: header["weight"].update(shape=[5, 5]))
    assert refusal(lambda: load(path)).startswith("toy.safetensors: damaged: ")
    edit_header(path, lambda header: header["weight"].update(data_offsets=[0, float("inf")]))
    assert refusal(lambda: load(path)) == "toy.safetensors: damaged: the header does not place its tensors"


def test_a_newer_format_is_refused_whatever_else_it_holds(tmp_path: Path) -> None:
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
        ({"created_at": "yesterday"}, "created_at: "),
    ],
)
def test_a_wrong_description_is_refused_by_field(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = publish_toy(tmp_path)
    edit_description(path, **changes)
    assert refusal(lambda: read_info(path)).startswith(f"toy.safetensors: damaged: its description's {reason}")


def test_a_file_that_cannot_be_opened_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        for read in (read_info, load):
            message = refusal(partial(read, path))
            assert message.startswith(f"{path.name}: cannot be read: ")


# --- the storage folder ---


def test_a_scan_lists_the_good_and_names_the_bad(tmp_path: Path) -> None:
    publish_toy(tmp_path, "b")
    publish_toy(tmp_path, "a", kind="evaluator")
    (tmp_path / "c.safetensors").write_bytes(b"junk")
    (tmp_path / "a b.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes())
    (tmp_path / "notes.txt").write_text("not looked at")
    infos, problems = scan(tmp_path)
    assert [(info.name, info.kind) for info in infos] == [("a", "evaluator"), ("b", "denoiser")]
    assert infos == list_checkpoints(tmp_path)
    assert problems.keys() == {"c.safetensors", "a b.safetensors"}
    assert problems["c.safetensors"] == "not a safetensors file"
    assert scan(tmp_path / "absent") == ([], {})


def test_promotion_is_by_kind(tmp_path: Path) -> None:
    for name, kind in (("d1", "denoiser"), ("d2", "denoiser"), ("e1", "evaluator")):
        publish_toy(tmp_path, name, kind=kind)
    assert promoted(tmp_path) is None
    for name in ("d1", "e1", "d2"):
        promote(tmp_path, name)
    assert (promoted(tmp_path), promoted(tmp_path, "evaluator")) == ("d2", "e1")
    assert json.loads((tmp_path / "promoted.json").read_text()) == {"denoiser": "d2", "evaluator": "e1"}
    assert resolve(tmp_path, None, "denoiser") == tmp_path / "d2.safetensors"
    assert resolve(tmp_path, "d1", "denoiser") == tmp_path / "d1.safetensors"
    assert sorted(os.listdir(tmp_path)) == ["d1.safetensors", "d2.safetensors", "e1.safetensors", "promoted.json"]


def test_a_denoiser_is_promoted_after_an_evaluator_that_knows_its_labels(tmp_path: Path) -> None:
    publish_toy(tmp_path, "colours", kind="evaluator")
    publish_toy(tmp_path, "animals", vocabulary=("cat", "dog"))
    promote(tmp_path, "colours")
    assert refusal(lambda: promote(tmp_path, "animals")) == (
        "animals: has labels that the evaluator colours does not know: cat, dog; "
        "promote an evaluator that knows them first"
    )
    assert promoted(tmp_path) is None
    publish_toy(tmp_path, "judge", kind="evaluator", vocabulary=("dog", "cat", "cow"))
    promote(tmp_path, "judge")
    promote(tmp_path, "animals")
    assert promoted(tmp_path) == "animals"


def test_an_evaluator_that_is_gone_keeps_nothing_from_being_promoted(tmp_path: Path) -> None:
    publish_toy(tmp_path, "judge", kind="evaluator", vocabulary=("cow",))
    promote(tmp_path, "judge")
    (tmp_path / "judge.safetensors").unlink()
    publish_toy(tmp_path)
    promote(tmp_path, "toy")
    assert promoted(tmp_path) == "toy"


def test_promotions_wait_for_one_another(tmp_path: Path) -> None:
    publish_toy(tmp_path, "d1")
    other = threading.Thread(target=promote, args=(tmp_path, "d1"))
    with storage.locked(tmp_path):
        other.start()
        other.join(0.3)
        assert other.is_alive()
        assert promoted(tmp_path) is None
    other.join(60)
    assert promoted(tmp_path) == "d1"


def test_what_cannot_be_found_is_refused_with_what_is_there(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    for act in (
        lambda: resolve(absent, None, "denoiser"),
        lambda: resolve(absent, "d1", "denoiser"),
        lambda: promote(absent, "d1"),
    ):
        assert refusal(act) == f"{absent}: there is no folder {absent}"
    assert refusal(lambda: resolve(tmp_path, None, "denoiser")) == (
        f"{tmp_path}: no denoiser is promoted in {tmp_path}; there is no denoiser"
    )
    publish_toy(tmp_path, "d1")
    publish_toy(tmp_path, "d2")
    publish_toy(tmp_path, "e1", kind="evaluator")
    assert refusal(lambda: resolve(tmp_path, "d3", "denoiser")) == f"d3: no such denoiser in {tmp_path}; there: d1, d2"
    assert refusal(lambda: resolve(tmp_path, None, "evaluator")).endswith("; there: e1")
    assert refusal(lambda: promote(tmp_path, "d3")) == f"d3: no such checkpoint in {tmp_path}; there: d1, d2, e1"
    assert refusal(lambda: resolve(tmp_path, "e1", "denoiser")) == (
        "e1: is not a denoiser but a checkpoint of kind evaluator; there: d1, d2"
    )
    promote(tmp_path, "d1")
    (tmp_path / "d1.safetensors").unlink()
    assert refusal(lambda: resolve(tmp_path, None, "denoiser")) == (
        f"d1: no such promoted denoiser in {tmp_path}; there: d2"
    )


def test_a_damaged_checkpoint_is_not_promoted(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"junk")
    assert refusal(lambda: promote(tmp_path, "x")) == "x.safetensors: not a safetensors file"
    assert promoted(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"denoiser": 3}'])
def test_a_damaged_promoted_file_is_refused_by_name(content: str, tmp_path: Path) -> None:
    (tmp_path / "promoted.json").write_text(content)
    assert refusal(lambda: promoted(tmp_path)).startswith("promoted.json: ")
