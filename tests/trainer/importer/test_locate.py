"""Positions found in pictures: squares added one by one, with noise, and rendered scenes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from iclevr.labels import ICLEVR
from iclevr.scenes.render_folder import random_scenes, write_folder
from shared.vocabulary import read_train_file
from trainer.data import load_dataset
from trainer.errors import TrainerError
from trainer.importer.locate import locate

PIXEL = 1 / 64
SPOTS = {"zero": (20, 12), "one": (44, 40), "two": (12, 50)}  # x, y of a square's centre, in pixels
LEVELS = {"zero": 250, "one": 30, "two": 180}


def picture(labels: list[str], spots: dict[str, tuple[int, int]] = SPOTS) -> Tensor:
    """Draw a gray picture with a square of 8 x 8 for each label, and a little noise."""
    pixels = torch.full((3, 64, 64), 120)
    for label in labels:
        x, y = spots[label]
        pixels[:, y - 4 : y + 4, x - 4 : x + 4] = LEVELS[label]
    noise = torch.randint(-3, 4, pixels.shape, generator=torch.Generator().manual_seed(len(labels)))
    return (pixels + noise).to(torch.uint8)


def near(found: tuple[float, float], spot: tuple[int, int]) -> bool:
    return all(abs(at - wanted * PIXEL) < PIXEL for at, wanted in zip(found, spot, strict=True))


def test_a_new_object_is_where_pictures_differ_in_any_order() -> None:
    elsewhere = {"zero": (40, 20)}
    train = {"a_2.png": ["two", "zero", "one"], "a_0.png": ["zero"], "a_1.png": ["one", "zero"], "b_0.png": ["zero"]}
    images = [*(picture(train[name]) for name in list(train)[:3]), picture(["zero"], elsewhere)]
    found = locate(train, torch.stack(images))
    assert list(found) == list(train)
    assert near(found["a_2.png"][0], SPOTS["two"])
    assert near(found["a_2.png"][2], SPOTS["one"])
    assert found["a_2.png"][1:] == [found["a_1.png"][1], found["a_1.png"][0]]
    assert found["a_1.png"][1] == found["a_0.png"][0]


def test_single_objects_that_are_all_in_one_place() -> None:
    """Their median shows an object itself, so the difference from the median alone would not show a like one."""
    train = {f"s{i}_0.png": [label] for i, label in enumerate(["zero", "one", "two", "one", "one"])}
    middle = dict.fromkeys(SPOTS, (32, 28))
    found = locate(train, torch.stack([picture(labels, middle) for labels in train.values()]))
    assert all(near(points[0], (32, 28)) for points in found.values())


def test_pictures_without_a_difference_get_the_centre() -> None:
    same = picture(["zero"])
    found = locate({"a_0.png": ["zero"], "a_1.png": ["zero", "one"]}, torch.stack([same, same]))
    assert found["a_1.png"][1] == (0.5, 0.5)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            {"a_0.png": ["zero"], "b_1.png": ["zero", "one"]},
            r'"b_1\.png": no picture of its scene has all of its labels',
        ),
        ({"a_0.png": ["zero"], "a_2.png": ["zero", "one", "two"]}, r'"a_2\.png": no picture of its scene'),
        ({"a_0.png": ["two"], "a_1.png": ["zero", "one"]}, r'"a_1\.png": no picture of its scene'),
        ({"a.png": ["zero"], "b.png": ["zero", "one"]}, r'"b\.png": no picture of its scene'),
        (
            {"pic_0.png": ["zero"], "pic_1.png": ["zero"], "pic_2.png": ["zero", "one"]},
            r'"pic_0\.png" and "pic_1\.png" have the same labels and are named as .*"pic_2\.png"',
        ),
    ],
)
def test_a_picture_without_one_earlier_one_is_refused(train: dict[str, list[str]], message: str) -> None:
    with pytest.raises(TrainerError, match=message):
        locate(train, torch.stack([picture(labels) for labels in train.values()]))


def test_rendered_scenes(tmp_path: Path) -> None:
    write_folder(tmp_path / "d", random_scenes(12, 3, 5), seed=5, size=64, centre=0.5)
    expected = json.loads((tmp_path / "d" / "positions.json").read_text())
    train = read_train_file(tmp_path / "d" / "train.json", ICLEVR)
    found = locate(train, load_dataset(tmp_path / "d", size=64).images)
    errors = np.array([np.subtract(found[name], expected[name]) for name in train if len(train[name]) == 3])
    assert errors.shape == (12, 3, 2)
    assert np.linalg.norm(errors, axis=-1).max() < 5 * PIXEL
