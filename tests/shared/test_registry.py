"""The registry: checkpoints are found by name, promoted by kind, and an error names what exists."""

import errno
import fcntl
import json
import os
import threading
from pathlib import Path

import pytest

from shared import storage
from shared.checkpoint import CheckpointInfo, read_info
from shared.registry import Registry, promote, promoted, resolve, scan
from tests.shared.test_checkpoint import publish_toy, refusal


def test_a_name_that_is_not_a_plain_file_name_is_neither_resolved_nor_promoted(tmp_path: Path) -> None:
    for act in (lambda: promote(tmp_path, "../evil"), lambda: resolve(tmp_path, "../evil", "denoiser")):
        assert "not a checkpoint's name" in refusal(act)
    assert os.listdir(tmp_path) == []


def test_scan_lists_readable_checkpoints_and_names_the_others(tmp_path: Path) -> None:
    publish_toy(tmp_path, "b")
    publish_toy(tmp_path, "a", kind="evaluator")
    (tmp_path / "c.safetensors").write_bytes(b"junk")
    (tmp_path / "a b.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes())
    (tmp_path / "notes.txt").write_text("not looked at")
    found = scan(tmp_path)
    problems = found.problems
    assert [(info.name, info.kind) for info in found.infos] == [("a", "evaluator"), ("b", "denoiser")]
    assert problems.keys() == {"c.safetensors", "a b.safetensors"}
    assert problems["c.safetensors"] == "not a safetensors file"
    assert refusal(lambda: scan(tmp_path / "absent")) == f"{tmp_path}/absent: there is no folder {tmp_path}/absent"


def test_each_kind_has_its_own_promoted_checkpoint(tmp_path: Path) -> None:
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


def test_a_denoiser_is_promoted_only_if_an_evaluator_knows_its_labels(tmp_path: Path) -> None:
    publish_toy(tmp_path, "colours", kind="evaluator")
    publish_toy(tmp_path, "animals", vocabulary=("cat", "dog"))
    promote(tmp_path, "colours")
    assert refusal(lambda: promote(tmp_path, "animals")) == (
        "animals: has labels that the evaluator colours does not know, nor any other: cat, dog"
    )
    assert promoted(tmp_path) is None
    publish_toy(tmp_path, "judge", kind="evaluator", vocabulary=("dog", "cat", "cow"))
    promote(tmp_path, "animals")
    assert promoted(tmp_path) == "animals"


def test_a_denoiser_is_judged_by_the_promoted_evaluator_or_the_newest_that_knows_its_labels() -> None:
    def info(name: str, vocabulary: str, time: str = "01T23:00:00+02:00") -> CheckpointInfo:
        return CheckpointInfo(
            name=name, kind="evaluator", format_version=1, digest="d" * 64, vocabulary=tuple(vocabulary), config={},
            training={}, created_at=f"2026-01-{time}",
        )  # fmt: skip

    evaluators = [  # in the order of their times, whatever the offset from UTC
        info("old", "abc"), info("new", "abcd", "01T22:00:00+00:00"), info("other", "xyz", "03T00:00:00+00:00"),
    ]  # fmt: skip
    registries = {
        promoted: Registry(Path(), {one.name: one for one in evaluators}, {"evaluator": promoted} if promoted else {})
        for promoted in ("old", "other", None)
    }
    found = [registries[promoted].judge_of(info("d", labels)) for labels, promoted in
             [("ab", "old"), ("ab", "other"), ("ab", None), ("zx", "old"), ("dz", "old")]]  # fmt: skip
    assert [one and one.name for one in found] == ["old", "new", "new", "other", None]


def test_concurrent_promotions_are_serialised(tmp_path: Path) -> None:
    publish_toy(tmp_path, "d1")
    other = threading.Thread(target=promote, args=(tmp_path, "d1"))
    with storage.locked(tmp_path):
        other.start()
        other.join(0.3)
        assert other.is_alive()
        assert promoted(tmp_path) is None
    other.join(60)
    assert promoted(tmp_path) == "d1"


def test_a_file_system_without_locks_can_hold_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))  # as Lustre does, by default

    publish_toy(tmp_path, "d1")
    monkeypatch.setattr(fcntl, "flock", refuse)
    promote(tmp_path, "d1")
    assert promoted(tmp_path) == "d1"


def test_an_unknown_checkpoint_is_refused_with_the_available_ones(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    for act in (
        lambda: resolve(absent, None, "denoiser"),
        lambda: resolve(absent, "d1", "denoiser"),
        lambda: promote(absent, "d1"),
    ):
        assert refusal(act) == f"{absent}: there is no folder {absent}"
    assert refusal(lambda: resolve(tmp_path, None, "denoiser")) == (
        f"{tmp_path}: no denoiser is promoted; it contains no denoiser"
    )
    publish_toy(tmp_path, "d1")
    publish_toy(tmp_path, "d2")
    publish_toy(tmp_path, "e1", kind="evaluator")
    assert (
        refusal(lambda: resolve(tmp_path, "d3", "denoiser")) == "d3: no such denoiser in the storage; available: d1, d2"
    )
    assert refusal(lambda: resolve(tmp_path, None, "evaluator")).endswith("; available: e1")
    assert refusal(lambda: promote(tmp_path, "d3")) == "d3: no such checkpoint in the storage; available: d1, d2, e1"
    assert refusal(lambda: resolve(tmp_path, "e1", "denoiser")) == (
        "e1: is of kind evaluator, not denoiser; available: d1, d2"
    )
    promote(tmp_path, "d1")
    (tmp_path / "d1.safetensors").unlink()
    assert refusal(lambda: resolve(tmp_path, None, "denoiser")) == (
        "d1: no such promoted denoiser in the storage; available: d2"
    )


def test_a_damaged_checkpoint_is_not_promoted(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"junk")
    assert refusal(lambda: promote(tmp_path, "x")) == "x.safetensors: not a safetensors file"
    path = publish_toy(tmp_path)
    digest = read_info(path).digest
    publish_toy(tmp_path, "adapter", config={"base": {"name": "toy", "digest": digest}})
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")  # the header stays readable
    assert refusal(lambda: promote(tmp_path, "toy")).endswith("damaged: the tensors do not match their digest")
    assert "changes toy, which cannot be loaded: damaged" in refusal(lambda: promote(tmp_path, "adapter"))
    assert promoted(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, '{"denoiser": 3}'])
def test_a_damaged_promoted_json_is_refused_by_name(content: str, tmp_path: Path) -> None:
    (tmp_path / "promoted.json").write_text(content)
    assert refusal(lambda: promoted(tmp_path)).startswith("promoted.json: ")


def test_a_missing_evaluator_blocks_no_promotion(tmp_path: Path) -> None:
    publish_toy(tmp_path, "judge", kind="evaluator", vocabulary=("cow",))
    promote(tmp_path, "judge")
    (tmp_path / "judge.safetensors").unlink()
    publish_toy(tmp_path)
    promote(tmp_path, "toy")
    assert promoted(tmp_path) == "toy"
