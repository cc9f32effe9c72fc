"""The renderer against Cycles, its determinism, the placement of objects, and the folder it writes."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iclevr.labels import ICLEVR
from iclevr.scenes import render_folder
from iclevr.scenes.render import area_weights, render, squeeze
from iclevr.scenes.render_folder import random_scenes, scenes_of, write_folder, write_label_file
from iclevr.scenes.scene import CAMERA, RADIUS, SceneObject, place
from shared.vocabulary import read_test_file, read_train_file
from tests.paths import TASK_FILES
from trainer.errors import TrainerError

REFERENCE = TASK_FILES / "reference"


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="no Cycles renders beside this checkout")
def test_close_to_cycles() -> None:
    scenes = json.loads((REFERENCE / "scenes.json").read_text())
    objects = [
        [SceneObject(o["shape"], o["color"], o["x"], o["y"], o["rotation_rad"]) for o in s["objects"]] for s in scenes
    ]
    wanted = np.stack([np.asarray(Image.open(REFERENCE / s["file"]).convert("RGB"), np.float64) for s in scenes])
    got = squeeze(render(objects)).astype(np.float64)
    empty = squeeze(render([[]])).astype(np.float64)
    error = np.abs(got - wanted)
    touched = np.abs(wanted - empty).sum(-1) > 24  # objects and shadows
    assert 0.03 < touched.mean() < 0.3
    assert error.mean() <= 1.0
    assert error[touched].mean() <= 3.5


@pytest.mark.parametrize(("n", "size"), [(240, 64), (5, 3), (2, 8)])
def test_area_weights_average_without_loss(n: int, size: int) -> None:
    weights = area_weights(n, size)
    assert weights.shape == (size, n)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    if n >= size:
        np.testing.assert_allclose(weights.sum(0), size / n, atol=1e-6)
    picture = np.arange(4 * 8 * 3, dtype=np.uint8).reshape(1, 4, 8, 3)
    blocks = picture.reshape(1, 2, 2, 2, 4, 3).astype(float).mean((2, 4))
    np.testing.assert_array_equal(squeeze(picture, 2), np.floor(blocks + 0.5))


def test_placement_rules() -> None:
    forward = -CAMERA / np.linalg.norm(CAMERA)
    right = np.cross(forward, [0, 0, 1]) / np.linalg.norm(np.cross(forward, [0, 0, 1]))
    up = np.cross(right, forward)
    ground_forward = forward[:2] / np.linalg.norm(forward[:2])
    rng = np.random.default_rng(3)
    for _ in range(30):
        scene = place([("red", "cube"), ("blue", "sphere"), ("gray", "cylinder")], rng)
        assert (scene[0].x, scene[0].y) == (0, 0)
        assert [o.color for o in scene] == ["red", "blue", "gray"]
        for a, b in itertools.combinations(scene, 2):
            apart = np.array([a.x - b.x, a.y - b.y])
            assert np.hypot(*apart) - 2 * RADIUS >= 0.25
            assert abs(apart @ right[:2]) >= 0.4
            assert abs(apart @ ground_forward) >= 0.4
        for o in scene[1:]:
            assert max(abs(o.x), abs(o.y)) <= 3
            centre = np.array([o.x, o.y, RADIUS]) - CAMERA
            half_width = centre @ forward * 16 / 35
            assert abs(centre @ right) + 1.25 * RADIUS <= 0.97 * half_width
            assert abs(centre @ up) + 1.25 * RADIUS <= 0.97 * half_width * 3 / 4


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    def contents(name: str, seed: int, *, jitter: bool = True) -> dict[str, bytes]:
        write_folder(tmp_path / name, random_scenes(2, 3, seed), seed=seed, size=32, jitter=jitter)
        paths = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in paths}

    first, again, other = contents("a", 5), contents("b", 5), contents("c", 6)
    assert len(first) == 6 + 6
    assert first == again
    assert first.keys() == other.keys()
    still = contents("d", 5, jitter=False)  # the same scenes in another light
    assert still["positions.json"] == first["positions.json"]
    for name in (name for name in first if name.endswith(".png")):
        assert first[name] not in (other[name], still[name])


def test_scenes_without_a_test_files_label_sets() -> None:
    everything = random_scenes(200, 3, 0)
    without = [
        labels[n::-1] for labels, n in zip(list(everything.values())[:40], itertools.cycle(range(3)), strict=False)
    ]
    scenes = random_scenes(200, 3, 0, without)
    shown = {frozenset(labels[:n]) for labels in scenes.values() for n in (1, 2, 3)}
    assert list(scenes) == list(everything)
    assert shown.isdisjoint(map(frozenset, without))
    assert list(everything.values())[-1] in scenes.values()  # the others are drawn as before


def test_scenes_that_all_have_an_excluded_set_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_folder, "TRIES", 500)
    with pytest.raises(TrainerError, match="in 500 scenes of 2 objects, each had a set that --without excludes"):
        random_scenes(1, 2, 0, [[name] for name in ICLEVR.names])
    assert len(random_scenes(60, 1, 0, [[name] for name in ICLEVR.names[1:]])) == 60


def test_layout_of_the_folder(tmp_path: Path) -> None:
    count = write_folder(tmp_path, random_scenes(2, 3, 0), seed=0, size=None)
    train = read_train_file(tmp_path / "train.json", ICLEVR)
    assert count == len(train) == 6
    for number in ("000000", "000001"):
        lists = [train[f"CLEVR_train_{number}_{k}.png"] for k in range(3)]
        assert [lists[2][:1], lists[2][:2]] == lists[:2]
    for name in train:
        with Image.open(tmp_path / "iclevr" / name) as picture:
            assert (picture.size, picture.mode) == ((320, 240), "RGB")
    assert sorted(path.name for path in (tmp_path / "iclevr").iterdir()) == sorted(train)
    assert {len(labels) for labels in read_test_file(tmp_path / "test.json", ICLEVR)} == {1, 2, 3}
    assert all(len(labels) == 3 for labels in read_test_file(tmp_path / "new_test.json", ICLEVR))


def test_an_unfinished_folder_has_no_train_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make train` renders a folder again where there is no train.json."""

    def interrupted(path: Path, content: object) -> None:
        if path.name == "new_test.json":
            raise KeyboardInterrupt
        write_label_file(path, content)

    monkeypatch.setattr(render_folder, "write_label_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path, random_scenes(2, 2, 0), seed=0, size=16)
    assert (tmp_path / "test.json").exists()
    assert not (tmp_path / "train.json").exists()


def test_a_train_files_pictures_keep_their_names_and_labels(tmp_path: Path) -> None:
    train = {
        "CLEVR_train_000007_0.png": ["cyan cube"],
        "CLEVR_train_000007_1.png": ["cyan cube", "red sphere"],
        "CLEVR_train_000002_0.png": ["gray cylinder"],
    }
    assert write_folder(tmp_path, scenes_of(train), seed=0, size=16) == 3
    assert read_train_file(tmp_path / "train.json", ICLEVR) == train


def test_train_files_without_scenes_are_refused() -> None:
    with pytest.raises(TrainerError, match=r'picture "picture\.png" is not named CLEVR_train_NNNNNN_K\.png'):
        scenes_of({"picture.png": ["red cube"]})
    with pytest.raises(TrainerError, match=r"scene 000001: .* does not extend"):
        scenes_of({"CLEVR_train_000001_0.png": ["red cube"], "CLEVR_train_000001_1.png": ["blue cube", "red cube"]})
